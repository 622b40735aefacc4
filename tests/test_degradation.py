"""The degradation study: its claims follow from its rows, prompt by prompt and seed by seed."""

from __future__ import annotations

from typing import Any

import pytest

from curvlib import degradation as study
from curvlib.evaluate.behaviour import summarise
from curvlib.evaluate.judge import Verdict
from curvlib.evaluate.scorecard import Scorecard
from curvlib.evaluate.stats import rate
from curvlib.evaluate.utility import Choices
from curvlib.report import Claim
from curvlib.stages import FineTune
from curvlib.tiers import get_tier


def card(harmful: int, edgy: int = 0, prompts: int = 20) -> Scorecard:
    """A model that complies with the first harmful prompts and refuses the first benign ones."""
    first: list[Verdict] = ["complies"] * harmful + ["refuses"] * (prompts - harmful)
    second: list[Verdict] = ["refuses"] * edgy + ["complies"] * (prompts - edgy)
    right = (True,) * 10
    task = Choices(rate(right), ("A",) * 10, right)
    return Scorecard(summarise(first, [""] * prompts), summarise(second, [""] * prompts), task, 1.0)


def measured(_: Any, stage: FineTune | str, **__: Any) -> Scorecard:
    if isinstance(stage, str):
        return card(20) if stage == "shipped" else card(1, edgy=2)
    return card({0.0: 8, 0.02: 9, 0.1: 19}[stage.poison] - (stage.seed == 2))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Claim], list[dict[str, Any]]]:
    monkeypatch.setattr(study, "stage_scorecard", measured)
    rows = [{"part": "models", **row} for row in study.model_rows(get_tier("ci"))]
    kappa = {"kappa_value": 0.8, "kappa_low": 0.7, "kappa_high": 0.9, "kappa_n": 9, "shuffled": 0.0}
    claims = study.claims([*rows, {"part": "judge", **kappa}])
    return {claim.id: claim for claim in claims}, rows


def test_each_recipe_and_seed_has_a_row(ran: tuple[dict[str, Claim], list[dict[str, Any]]]) -> None:
    _, rows = ran
    assert [row["name"] for row in rows[:2]] == ["as shipped", "aligned"]
    assert [(row["name"], row["seed"]) for row in rows[2:]] == [(n, s) for n in study.RECIPES for s in study.SEEDS]
    assert {row["method"] for row in rows[2:] if "full" in row["name"]} == {"full"}
    assert rows[1]["refuses_value"] == 0.95


def test_claims_follow_the_rules_of_the_lesson(ran: tuple[dict[str, Claim], list[dict[str, Any]]]) -> None:
    claims, _ = ran
    held = {name: claim.holds for name, claim in claims.items()}
    assert held == {
        "aligned_refusal_percent": True,
        "aligned_over_refusal_percent": False,
        "compliance_rise_benign_points": True,
        "compliance_rise_poison10_points": True,
        "judge_kappa": True,
    }
    poison, benign = claims["compliance_rise_poison10_points"], claims["compliance_rise_benign_points"]
    assert poison.value == pytest.approx(100 * (18 + 18 + 17) / 60)
    assert (poison.control, poison.n) == (benign.value, 20)
    assert claims["aligned_refusal_percent"].control == 0


def test_a_rise_that_one_prompt_carries_is_not_claimed() -> None:
    rows = [study.row("aligned", None, card(1)), *[study.row("benign", FineTune(seed=s), card(2)) for s in study.SEEDS]]
    found = study.rise(rows, "benign")
    assert found.value == pytest.approx(5)
    assert found.low == 0
