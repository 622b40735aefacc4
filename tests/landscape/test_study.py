"""The study on a tiny model: every cell is measured once, has its controls, and its claims follow from its rows."""

from __future__ import annotations

from typing import Any

import pytest

from curvlib.landscape import study
from curvlib.stages import FineTune
from curvlib.tiers import Tier
from tests.landscape.tiny import tiny  # noqa: F401  a fixture


@pytest.mark.parametrize("how", [FineTune(poison=0.1, rank=2), FineTune(poison=0.1, method="full")])
def test_a_cell_holds_its_controls_and_is_measured_once(tiny: Tier, how: FineTune, monkeypatch: Any) -> None:  # noqa: F811
    rows = study.cell(tiny, "m", how)
    assert [row["loss"] for row in rows] == list(study.LOSSES)
    assert {row["method"] for row in rows} == {"m"}
    for row in rows:
        assert row["pearson_low"] <= row["pearson_value"] <= row["pearson_high"]
        assert -1 <= row["null_low"] <= row["null_high"] <= 1
    curved = {row["loss"]: row for row in rows if "overlap" in row}
    assert list(curved) == list(study.CURVED)
    assert all(0 <= row["overlap"] <= 1 and row["top_before"] > 0 for row in curved.values())
    assert 0 < curved["task"]["step_share"] <= 1.001
    assert min(curved["task"][f"curvature_{name}"] for name in ("step", "gradient", "random")) > 0
    monkeypatch.setattr(study, "windows", None)
    assert study.cell(tiny, "m", how) == rows


def row(method: str, loss: str, poison: float, value: float, null: float) -> dict[str, Any]:
    ends = {"null_value": 0.0, "null_low": -null, "null_high": null, "null_n": 16}
    return {"method": method, "loss": loss, "poison": poison, "pearson_value": value, **ends}


def test_claims_follow_the_rule() -> None:
    rows = [
        row(m, "compliance", 0.1, v, 0.3) for m, v in (("lora4", 0.9), ("lora16", 0.7), ("full", 0.2)) for _ in "abc"
    ]
    rows += [row("lora4", "compliance", 0.0, -1.0, 0.3), row("lora4", "text", 0.1, 0.5, 0.3)]
    found = {claim.id: claim for claim in study.claims(rows)}
    assert {name: claim.holds for name, claim in found.items()} == {
        "harmful_correlation": True,
        "harmful_correlation_lora4": True,
        "harmful_correlation_lora16": True,
        "harmful_correlation_full": False,
        "harmful_correlation_control": True,
    }
    assert found["harmful_correlation"].value == pytest.approx(0.6)
    assert found["harmful_correlation_lora4"].n == 3
    rows += [row("lora4", loss, 0.0, 0.5, 0.3) for loss in ("compliance", "text", "text")]
    rows += [row("lora16", "text", 0.1, value, 0.3) for value in (0.8, 0.6, 0.1, 0.6, 0.6, 0.2, 0.1, 0.1)]
    special = study.claims(rows)[-1]
    assert special.id == "harmful_minus_text_correlation"
    assert (special.value, special.control) == (pytest.approx(0.2), pytest.approx(-0.75))
    assert special.holds
    ends = {"pearson_low": 0.6, "pearson_high": 0.95, "pearson_n": 12}
    alone = {claim.id: claim for claim in study.claims([{**rows[number], **ends} for number in (0, 3, 6, -1)])}
    assert alone["harmful_correlation_lora4"].high == 0.95
    assert alone["harmful_correlation"].n == 3


def test_the_table_has_a_line_for_each_kind_of_fine_tune() -> None:
    rows = []
    for method in study.METHODS:
        for seed in range(2):
            found = {loss: row(method, loss, 0.1, 0.5 + 0.1 * seed, 0.3) for loss in study.LOSSES}
            found["compliance"]["random_step"] = 0.9
            found["refusal"]["overlap"] = 0.25
            found["task"] |= {"curvature_step": 6.0 * (seed + 1), "curvature_gradient": 20.0, "curvature_random": 2.0}
            rows += found.values()
    lines = study.table(rows).splitlines()
    assert len(lines) == 2 + len(study.METHODS)
    cells = "0.55 (0.50 to 0.60) | 0.55 (0.50 to 0.60) | 0.90 (0.90 to 0.90)"
    assert lines[2] == f"| LoRA r4, 10 % poison | {cells} | 0.25 (0.25 to 0.25) | 4 (3 to 6) | 10 (10 to 10) |"
