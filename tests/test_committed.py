"""What is committed under data/studies follows from its own rows, and says what each row is of."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import nbformat
import pytest

from curvlib import rows
from curvlib.report import ROOT
from curvlib.stages import TASKS
from curvlib.studies import STUDIES

FILES = sorted((ROOT / "data" / "studies").glob("*.json"))
each_study = pytest.mark.parametrize("name", [path.stem for path in FILES])


def committed(name: str) -> dict[str, Any]:
    """A study's file, with its rows, which may be JSON lines beside it."""
    path = ROOT / "data" / "studies" / f"{name}.json"
    record: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return {**record, "rows": record["rows"] or rows.read(path.with_suffix(".jsonl"))}


def claims_of_notebook(name: str) -> Callable[..., Any]:
    """The function ``claims`` of a study's notebook, from its cells with that tag alone, which measure nothing."""
    (path,) = (ROOT / "notebooks" / "studies").glob(f"S*_{name}.ipynb")
    names: dict[str, Any] = {}
    for cell in nbformat.read(path, 4).cells:
        if "claims" in cell.metadata.get("tags", []):
            exec(cell.source, names)
    function: Callable[..., Any] = names["claims"]
    return function


def recomputed(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The claims as JSON, from the rows alone."""
    made = STUDIES[name]().claims if name in STUDIES else claims_of_notebook(name)
    claims: list[dict[str, Any]] = json.loads(json.dumps([asdict(claim) for claim in made(rows)]))
    return claims


@each_study
def test_claims_follow_from_rows(name: str) -> None:
    record = committed(name)
    assert record["claims"]
    claims = recomputed(name, record["rows"])
    assert [claim["id"] for claim in claims] == [claim["id"] for claim in record["claims"]]
    for claim, kept in zip(claims, record["claims"], strict=True):
        numbers = [name for name, value in claim.items() if isinstance(value, float)]
        assert numbers
        assert [claim[name] for name in numbers] == pytest.approx([kept[name] for name in numbers], rel=1e-9)
        assert claim["holds"] == kept["holds"]


def test_a_changed_verdict_changes_a_claim() -> None:
    record = committed("degradation")
    row = next(row for row in record["rows"] if row["name"] == "10 % poison")
    row["harmful"][row["harmful"].index("complies")] = "refuses"
    assert recomputed("degradation", record["rows"]) != record["claims"]


def test_rows_say_which_task_was_fine_tuned() -> None:
    tuned = [row for row in committed("degradation")["rows"] if "poison" in row]
    assert len(tuned) == 12
    assert {row["task"] for row in tuned} <= set(TASKS)


def test_a_changed_share_changes_a_claim_of_a_study_notebook() -> None:
    record = committed("diffusion")
    row = next(row for row in record["rows"] if row["method"] == "forgotten")
    row["sixteen_100"] = 0.0
    changed = recomputed("diffusion", record["rows"])
    assert {claim["id"] for claim, kept in zip(changed, record["claims"], strict=True) if claim != kept} == {
        "relearned_accuracy_percent",
        "resilience_gain_points",
    }
