"""The nbgrader course has nbgrader's cells, and each check is graded with its points."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import nbformat
import pytest

from curvlib.cli import main
from curvlib.exercises import load
from tests.exercises.cases import ROOT, SOLVED


def test_every_exercise_and_every_question_is_graded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["exercises", "nbgrader", str(tmp_path)]) == 0
    points, manual = {}, 0
    for path in SOLVED:
        cells = nbformat.read(tmp_path / "source" / path.stem / path.name, 4).cells
        ids = [cell.metadata.nbgrader.grade_id for cell in cells if "nbgrader" in cell.metadata]
        assert len(ids) == len(set(ids))
        for before, cell in pairwise(cells):
            meta = cell.metadata.get("nbgrader", {})
            assert not cell.get("outputs")
            if meta.get("locked"):
                name = cell.source.removeprefix("assert check(").removesuffix(")")
                points[name] = meta["points"]
                assert f"def {name}(" in before.source
                assert before.metadata.nbgrader.solution
            elif meta.get("grade"):
                manual += meta["points"]
                assert cell.source.startswith("### BEGIN SOLUTION\n")
    assert points == load()
    assert manual == 8 * len(SOLVED)
