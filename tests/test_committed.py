"""What is committed under data/studies is what its study's notebook claims of the committed rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from curvlib import report
from curvlib.report import ROOT, Claim, load_record, load_study
from curvlib.stages import TASKS
from tests.notebook_cases import executed

Row = dict[str, Any]
Recompute = Callable[..., tuple[Claim, ...]]


def changed(row: Row) -> Row:
    """The same row, or with one value that a claim rests on changed."""
    if row.get("name") == "aligned":
        return {**row, "harmful": ["complies", *row["harmful"][1:]]}
    if row.get("loss") == "compliance" and row["seed"] == 0:
        return {**row, "pearson_value": 0.0}
    if row.get("subset") == 0:
        return {**row, "losses": row["losses"][::-1]}
    return row


STUDIES = {path.stem: load_study(path.stem) for path in sorted((ROOT / "data" / "studies").glob("*.json"))}


@pytest.fixture
def recomputed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recompute:
    """Run a study's notebook on rows in a folder of its own, without its measuring, and return its claims."""
    folder = tmp_path / "data" / "studies"
    folder.mkdir(parents=True)
    monkeypatch.setattr(report, "ROOT", tmp_path)

    def run(name: str, *measured: Row) -> tuple[Claim, ...]:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in measured), "utf-8")
        (source,) = (ROOT / "notebooks" / "studies").glob(f"S*_{name}.ipynb")
        executed(source)
        return load_record(folder / f"{name}.json").claims

    return run


@pytest.mark.parametrize("name", STUDIES)
def test_the_notebook_claims_what_is_committed_and_a_changed_row_changes_it(name: str, recomputed: Recompute) -> None:
    study = STUDIES[name]
    assert study.claims
    claims = recomputed(name, *study.rows)
    assert [(claim.id, claim.n, claim.holds) for claim in claims] == [(c.id, c.n, c.holds) for c in study.claims]
    for claim, kept in zip(claims, study.claims, strict=True):
        numbers, expected = ([c.value, c.low, c.high, c.control] for c in (claim, kept))
        assert numbers == pytest.approx(expected, rel=1e-9)
    assert recomputed(name, *map(changed, study.rows)) != claims


def test_rows_say_which_task_was_fine_tuned() -> None:
    tuned = [row for row in STUDIES["degradation"].rows if "poison" in row]
    assert len(tuned) == 12
    assert {row["task"] for row in tuned} <= set(TASKS)


def test_an_absent_study_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "ROOT", tmp_path)
    with pytest.raises(report.CurvlibError, match=r"tea\.json is not there: make study NAME=tea measures it"):
        load_study("tea")
