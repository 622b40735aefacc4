"""Grading gives every submission its points, whatever is in it, and survives it."""

from __future__ import annotations

import csv
import json
import os
import shutil
import zipfile
from pathlib import Path

import nbformat
import psutil
import pytest

from curvlib.cli import main
from curvlib.errors import CurvlibError
from curvlib.exercises import grade, load
from tests.exercises import submissions
from tests.exercises.cases import MISTAKES, SOLVED, code


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class graded from a zip, as make grade does it, for three exercises."""
    folder = tmp_path_factory.mktemp("class")
    submissions.write(folder / "handed_in")
    archive = shutil.make_archive(str(folder / "handed_in"), "zip", folder / "handed_in")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grade, "load", lambda *_: {name: load()[name] for name in submissions.NAMES})
        grade.grade_class(Path(archive), folder / "grades", [], seed=12, seconds=3)
    return folder


@pytest.mark.parametrize("student", submissions.CASES)
def test_a_submission_gets_its_points_and_its_page(graded: Path, student: str) -> None:
    _, points, message = submissions.CASES[student]
    with (graded / "grades/grades.csv").open(newline="", encoding="utf-8") as file:
        rows = {row["student"].removeprefix("'"): row for row in csv.DictReader(file)}
    assert len(rows) == len(submissions.CASES)
    page = (graded / f"grades/feedback/{student}.md").read_text("utf-8")
    assert (rows[student]["total"], rows[student]["of"], rows[student]["seed"]) == (str(points), "13", "12"), page
    assert page.startswith(f"# {student}: {points} of 13 points\n")
    assert message in page


def test_nothing_of_a_submission_outlives_its_grading(graded: Path) -> None:
    process = int((graded / "pid").read_text())
    assert not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    assert not (Path.home() / "written_home").exists()
    assert not list(Path.cwd().glob("*was_here")) + list(Path.cwd().glob("written_here"))


def test_a_spreadsheet_takes_no_name_for_a_formula(graded: Path) -> None:
    lines = (graded / "grades/grades.csv").read_text("utf-8").splitlines()
    assert [line[:7] for line in lines if "=colab" in line] == ["'=colab"]


def test_solved_notebooks_earn_all_points_in_a_process_of_their_own(tmp_path: Path) -> None:
    """Every exercise once over the pipe: arguments that are functions, generators and tensors changed in place."""
    cells = [nbformat.v4.new_code_cell(source) for path in SOLVED for source in code(path)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "ada.ipynb")
    before = sum(os.times()[:4])
    assert main(["exercises", "grade", str(tmp_path), "--out", str(tmp_path / "grades"), "--seed", "3"]) == 0
    spent = sum(os.times()[:4]) - before
    total = sum(load().values())
    page = (tmp_path / "grades/feedback/ada.md").read_text("utf-8")
    assert f"# ada: {total} of {total} points" in page
    assert len(page.splitlines()) == 2 + len(MISTAKES)
    print(f"{spent:.1f} s of CPU for one submission with every exercise")


def test_what_is_no_class_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "note.txt").write_text("no notebook")
    for source, message in ((tmp_path, "holds no notebook"), (tmp_path / "note.txt", "neither a folder nor a zip")):
        assert main(["exercises", "grade", str(source), "--out", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err
    assert main(["exercises", "grade", str(tmp_path), "--only", "42"]) == 1
    assert "no exercises belong to notebook 42" in capsys.readouterr().err


def test_a_zip_that_swells_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grade, "LARGEST_ZIP", 1000)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ada.ipynb", bytes(1001))
    with pytest.raises(CurvlibError, match="unpacks to more than 1,000 bytes: take out what is no notebook"):
        grade.unpack(tmp_path / "bomb.zip", tmp_path / "out")


def test_the_best_of_several_notebooks_counts(tmp_path: Path) -> None:
    folder = tmp_path / "in" / "ada"
    folder.mkdir(parents=True)
    (folder / "first.ipynb").write_text(json.dumps(submissions.fill(submissions.PARTIAL)))
    (folder / "second.ipynb").write_text(json.dumps(submissions.blank()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grade, "load", lambda *_: {name: load()[name] for name in submissions.NAMES})
        table = grade.grade_class(tmp_path / "in", tmp_path / "out", [], seed=1, seconds=5)
    assert ",6,13," in table.read_text("utf-8")
