"""What is committed under data/studies follows from its own rows, and says what each row is of."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from curvlib.report import ROOT
from curvlib.stages import TASKS
from curvlib.studies import STUDIES

FILES = sorted((ROOT / "data" / "studies").glob("*.json"))
each_study = pytest.mark.parametrize("name", [path.stem for path in FILES])


def committed(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((ROOT / "data" / "studies" / f"{name}.json").read_text("utf-8"))
    return record


def recomputed(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The claims as JSON, from the rows alone."""
    claims: list[dict[str, Any]] = json.loads(json.dumps([asdict(claim) for claim in STUDIES[name]().claims(rows)]))
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
