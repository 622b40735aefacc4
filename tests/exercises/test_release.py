"""Releases leak nothing, and both kinds of notebooks run: solved ones earn all points, untouched ones none."""

from __future__ import annotations

import importlib.util
import re
import sys
import zipfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from IPython.core.interactiveshell import InteractiveShell
from nbformat import NotebookNode

from curvlib import __version__
from curvlib.errors import CurvlibError
from curvlib.exercises import assess, load
from curvlib.exercises.core import LAST, Answer
from curvlib.exercises.release import BEGIN, DOOR, END, REPOSITORY, build, release, split
from tests.exercises.cases import ROOT, SOLVED

each = pytest.mark.parametrize("path", SOLVED, ids=lambda path: path.stem)
TYPOS = [
    "### BEGIN SOLUTON",
    "### BEGIN  SOLUTION",
    "## BEGIN SOLUTION",
    "# BEGIN SOLUTION",
    "###BEGIN SOLUTION",
    "### begin solution",
    "### START SOLUTION",
    "### BEGIN SOLUTION.",
    "# SOLUTION",
    "",
]


BADGE = re.compile(r"\(https://colab\.research\.google\.com/github/([^/)]+/[^/)]+)/blob/([^/)]+)/([^)]+)\)")


def total(path: Path) -> int:
    return sum(load(path.name[:2]).values())


def printed(notebook: NotebookNode) -> list[str]:
    return ["".join(output.text for output in cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]


def play(notebook: NotebookNode, names: dict[str, Any]) -> list[str]:
    """Run the code cells as one kernel would; return what each prints."""
    LAST.clear()
    texts = []
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.id != "colab":
            with redirect_stdout(StringIO()) as out:
                exec(cell.source, names)
            texts.append(out.getvalue())
    return texts


def spoilt(path: Path, folder: Path, change: Any) -> Path:
    """A solved notebook after a change of its cells."""
    notebook = nbformat.read(path, 4)
    change(notebook)
    nbformat.write(notebook, folder / path.name)
    return folder / path.name


@each
def test_the_solved_notebook_earns_every_point_and_prints_what_is_committed(path: Path) -> None:
    solved = nbformat.read(path, 4)
    texts = play(solved, {})
    assert texts[-1].endswith(f"{total(path)} of {total(path)} points\n")
    assert "✘" not in "".join(texts)
    assert texts == printed(solved)


@each
def test_the_untouched_notebook_runs_whole_and_says_what_is_missing(path: Path) -> None:
    text = "".join(play(nbformat.reads(build(path, fold=False), 4), {}))
    assert text.endswith(f"\n0 of {total(path)} points\n")
    assert all(f"✘ {name}: not written yet" in text for name in load(path.name[:2]))


def test_both_kinds_run_in_a_kernel(tmp_path: Path) -> None:
    student = tmp_path / SOLVED[0].name
    student.write_text(build(SOLVED[0], fold=True))
    for path, points in ((SOLVED[0], 14), (student, 0)):
        done = papermill.execute_notebook(str(path), None, kernel_name="python3", progress_bar=False, cwd=str(ROOT))
        assert printed(done)[-1].endswith(f"{points} of 14 points\n")


@each
def test_a_folded_solution_pasted_over_its_stub_passes(path: Path) -> None:
    notebook, names = nbformat.reads(build(path, fold=True), 4), dict[str, Any]()
    folded = {cell.id: re.search(r"```python\n(.*?)```", cell.source, re.DOTALL) for cell in notebook.cells}
    for cell in notebook.cells:
        if fold := folded.get(f"{cell.id}-solution"):
            cell.source = fold[1]
    play(notebook, names)
    assert all(assess(name, Answer(names[name])) for name in load(path.name[:2]))


@each
def test_the_committed_student_notebook_is_a_fresh_build(path: Path) -> None:
    committed = ROOT / "notebooks/exercises" / path.name
    assert committed.read_text("utf-8") == build(path, fold=True), "run make release and commit what it writes"
    assert not committed.read_text("utf-8").count(BEGIN)


def test_every_student_notebook_has_a_source() -> None:
    assert [path.name for path in sorted((ROOT / "notebooks/exercises").glob("*"))] == [path.name for path in SOLVED]


def test_every_badge_leads_to_a_notebook_of_this_repository() -> None:
    places = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("notebooks/**/*.ipynb")]
    badges = [match for place in places for match in BADGE.findall(place.read_text("utf-8"))]
    assert {path for _, _, path in badges} == {f"notebooks/exercises/{path.name}" for path in SOLVED}
    assert {(repository, tag) for repository, tag, _ in badges} == {(REPOSITORY, f"v{__version__}")}
    assert all((ROOT / path).is_file() for _, _, path in badges)


@pytest.mark.parametrize(("modules", "commands"), [([], []), (["google.colab"], [DOOR.split("%pip ")[1]])])
def test_the_first_cell_installs_on_colab_only(
    monkeypatch: pytest.MonkeyPatch, modules: list[str], commands: list[str]
) -> None:
    shell, ran = InteractiveShell(), []
    shell.register_magic_function(ran.append, magic_name="pip")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)  # as on a machine without curvlib
    for name in modules:
        monkeypatch.setitem(sys.modules, name, sys)
    shell.run_cell(DOOR).raise_error()
    assert ran == commands
    assert all("--no-deps" in command for command in ran)


@each
def test_ids_are_kept_and_unique(path: Path) -> None:
    ids = [cell.id for cell in nbformat.read(path, 4).cells]
    released = [cell.id for cell in nbformat.reads(build(path, fold=False), 4).cells]
    assert released == [ids[0], "colab", *ids[1:]]
    assert len(set(ids)) == len(ids)


@each
def test_headings_tell_the_points_the_minutes_and_the_difficulty(path: Path) -> None:
    notebook = nbformat.read(path, 4)
    heading = re.compile(r"^## Exercise (\d): .* \((\d+) points, (\d+) minutes, (●+)\)$", re.MULTILINE)
    tasks, question = [], 0
    for before, after in zip(notebook.cells, notebook.cells[1:], strict=False):
        if match := heading.match(before.source):
            name = re.findall(r"check\((\w+)\)", after.source)[0]
            tasks.append(name)
            assert int(match[1]) == len(tasks)
            assert int(match[2]) == load()[name]
            assert all(part in before.source for part in ("*Why it matters:*", "<summary>Hint"))
            assert after.source.endswith(f"\n\n\ncheck({name})")
        if before.source.startswith("## Question"):
            question += 1
            assert after.metadata.tags == ["answer"]
            assert sum(map(int, re.findall(r"(\d) points? for", after.source))) == 4
    assert tasks == list(load(path.name[:2]))
    assert question == 2
    points = re.search(r"\*Points:\* (\d+), and (\d+) more", notebook.cells[0].source)
    assert points
    assert (int(points[1]), int(points[2])) == (total(path), 8)
    assert f"lesson {path.name[:2]}" in notebook.cells[0].source
    lessons = [lesson.name for lesson in (ROOT / "notebooks").glob(f"{path.name[:2]}_*.ipynb")]
    assert lessons in ([path.name], [])  # the lesson of this number has this name, if it is there


def misspell(notebook: NotebookNode, typo: str, marker: str) -> None:
    cell = next(cell for cell in notebook.cells if BEGIN in cell.source)
    for right in (BEGIN, END) if marker == "both" else (marker,):
        cell.source = cell.source.replace(right, typo.replace("BEGIN", right.split()[1]))


@pytest.mark.parametrize("typo", TYPOS)
@pytest.mark.parametrize("marker", [BEGIN, END, "both"])
def test_a_misspelt_marker_stops_the_release(tmp_path: Path, typo: str, marker: str) -> None:
    path = spoilt(SOLVED[5], tmp_path, lambda notebook: misspell(notebook, typo, marker))
    with pytest.raises(CurvlibError, match=f"^not released: {path.name}: "):
        build(path, fold=False)


def copy_solution(notebook: NotebookNode) -> None:
    source = next(cell.source for cell in notebook.cells if BEGIN in cell.source)
    notebook.cells.append(nbformat.v4.new_code_cell(split(source)[1]))


def copy_answer(notebook: NotebookNode) -> None:
    answer = next(cell.source for cell in notebook.cells if cell.metadata.get("tags") == ["answer"])
    notebook.cells.append(nbformat.v4.new_markdown_cell(f"Remember:\n\n{answer}"))


SPOILS = {
    "unknown tag soluton": lambda notebook: notebook.cells[0].metadata.update(tags=["soluton"]),
    "a line of a solution is left": copy_solution,
    "a model answer is left": copy_answer,
    "there is a check, but no such function": lambda notebook: notebook.cells.pop(3),
    "has no such exercise": lambda notebook: notebook.cells.append(nbformat.v4.new_code_cell("check(slerp)")),
    "a marker is left": lambda notebook: notebook.cells.append(nbformat.v4.new_code_cell("# end of the solution")),
}


@pytest.mark.parametrize("message", SPOILS)
def test_a_slip_stops_the_release(tmp_path: Path, message: str) -> None:
    path = spoilt(SOLVED[0], tmp_path, SPOILS[message])
    with pytest.raises(CurvlibError, match=message):
        build(path, fold=False)


def test_a_cell_tagged_solution_is_left_out(tmp_path: Path) -> None:
    secret = nbformat.v4.new_code_cell("secret = 1", metadata={"tags": ["solution"]})
    path = spoilt(SOLVED[0], tmp_path, lambda notebook: notebook.cells.append(secret))
    assert "secret" not in build(path, fold=True)


def test_a_release_writes_all_or_nothing_and_the_same_bytes_twice(tmp_path: Path) -> None:
    for name in ("solutions", "exercises"):
        (tmp_path / name).mkdir()
    for path in SOLVED[:2]:
        (tmp_path / "solutions" / path.name).write_bytes(path.read_bytes())
    archive = tmp_path / "out" / "exercises.zip"
    assert release(tmp_path, archive) == 2
    first = archive.read_bytes()
    release(tmp_path, archive)
    assert archive.read_bytes() == first
    with zipfile.ZipFile(archive) as content:
        texts = [content.read(name).decode() for name in content.namelist()]
    assert not any("<summary>Solution" in text or "Rubric" in text for text in texts)
    stamps = {path: path.read_bytes() for path in (tmp_path / "exercises").iterdir()}
    assert len(stamps) == 2
    spoilt(SOLVED[1], tmp_path / "solutions", copy_solution)
    spoilt(SOLVED[0], tmp_path / "solutions", lambda notebook: notebook.cells[0].update(source="changed"))
    with pytest.raises(CurvlibError):
        release(tmp_path, archive)
    assert {path: path.read_bytes() for path in (tmp_path / "exercises").iterdir()} == stamps
    assert archive.read_bytes() == first
