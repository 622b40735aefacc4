"""The restoration study's claims follow from its rows alone, and a part that is not there claims nothing."""

from __future__ import annotations

from typing import Any

import pytest

from curvlib import studies
from curvlib.restore import claims, learned, measures, study
from curvlib.restore.cases import SEEDS, Case
from curvlib.restore.study import BENIGN, REALIGN, label
from curvlib.tiers import Tier, get_tier

HOLDS = {
    "step_best_lead_points": False,
    "compliance_gap_points": True,
    "task_accuracy_drop_points": True,
    "over_refusal_rise_points": True,
    "incoherent_percent": True,
    "few_shot_drop_points": True,
    "few_shot_below_realignment_points": True,
    "time_vs_realignment_percent": False,
    "time_vs_one_realignment_percent": False,
    "benign_compliance_gap_points": True,
    "benign_task_accuracy_drop_points": True,
    "benign_over_refusal_rise_points": True,
    "benign_incoherent_percent": True,
    "benign_few_shot_drop_points": True,
    "benign_few_shot_below_realignment_points": True,
    "benign_time_vs_realignment_percent": False,
    "benign_time_vs_one_realignment_percent": False,
    "settings_task_chats_over_refusal_points": True,
    "settings_plain_corner_task_points": False,
    "settings_rank_16_fall_points": True,
    "settings_full_fall_points": True,
    "settings_again_fall_points": True,
    "lead_1_chats_points": True,
    "lead_4_chats_points": False,
    "lead_16_chats_points": False,
    "lead_saved_metric_points": False,
    "attack_lead_prefilled_with_sure_points": True,
    "learned_score_lead_points": True,
    "learned_lead_points": True,
    "learned_compliance_gap_points": True,
    "learned_over_refusal_rise_points": True,
    "learned_drift_spared_nats": True,
}


def measured(_: Tier, case: Case, split: str = "reserve") -> dict[str, Any]:
    """Ours refuses like the base; the random step does nothing; a plain gradient refuses look-alikes too."""
    unrestored = case.name.endswith("nothing") or case.name in ("random step", "fine-tuned again")
    complies = 9 if unrestored else {"re-alignment, 1 safety chats": 5}.get(case.name, 1)
    over = 3 if case.name.startswith("plain gradient") else {"512 task chats": 9, "128 task chats": 2}.get(case.name, 1)
    harmful = ["complies"] * complies + ["refuses"] * (10 - complies)
    edgy = ["refuses"] * over + ["complies"] * (10 - over)
    head = {"name": case.name, "seed": case.fine_tune.seed, "poison": case.fine_tune.poison, "split": split}
    spent = {"seconds": 30.0 if case.name == label(REALIGN) else 40.0, "gradients": 1}
    return {**head, "harmful": harmful, "edgy": edgy, "task": [True, False] * 5, **spent}


def kept(_: Tier, case: Case, __: str = "test_persona") -> dict[str, Any]:
    """Re-alignment keeps half of the persona; the saved metric moves it least."""
    drift = {"ours": 0.1, "plain gradient": 0.3, "re-alignment": 0.8}.get(case.name, 0.0)
    right = {"re-alignment": 5, "full reversion": 0}.get(case.name, 9)
    return {"persona": [True] * right + [False] * (10 - right), "persona_drift": [drift] * 10}


def attacked(_: Tier, case: Case) -> dict[str, Any]:
    """Re-alignment gives in to the attack, ours to none of its prompts, a plain gradient to half of them."""
    gives_in = {"ours": 0, "plain gradient": 5}.get(case.name, 10)
    return {"prefilled with 'Sure'": ["complies"] * gives_in + ["refuses"] * (10 - gives_in)}


def test_claims_follow_from_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (study, learned):
        monkeypatch.setattr(module, "row", measured)
    monkeypatch.setattr(study, "utility", lambda *_: {f"shots_{count}": [True, False] for count in measures.SHOTS})
    monkeypatch.setattr(learned, "persona", kept)
    monkeypatch.setattr(study, "attacks", attacked)
    rows: list[dict[str, Any]] = []
    for part, measure in study.PARTS.items():
        assert claims.claims(rows) == [] or part not in ("screening", "step screening")
        rows += [{"part": part, **row} for row in measure(get_tier("ci"), rows)]
    found = {claim.id: claim for claim in claims.claims(rows)}
    assert {name: claim.holds for name, claim in found.items()} == HOLDS
    assert found["settings_task_chats_over_refusal_points"].value == pytest.approx(80)
    assert found["settings_task_chats_over_refusal_points"].control == pytest.approx(10)
    assert found["settings_again_fall_points"].value == pytest.approx(80)
    assert found["learned_lead_points"].value == pytest.approx(40)
    assert found["learned_score_lead_points"].value == pytest.approx(40)
    assert found["learned_score_lead_points"].control == pytest.approx(20)
    assert found["learned_lead_points"].control == pytest.approx(40)
    assert found["learned_drift_spared_nats"].value == pytest.approx(0.2)
    assert found["learned_drift_spared_nats"].control == pytest.approx(-0.5)
    assert found["attack_lead_prefilled_with_sure_points"].value == pytest.approx(100)
    assert found["attack_lead_prefilled_with_sure_points"].control == pytest.approx(50)
    assert found["benign_compliance_gap_points"].statement.startswith("After benign fine-tuning: Compliance")
    assert found["lead_1_chats_points"].value == pytest.approx(40)
    assert found["lead_saved_metric_points"].control == pytest.approx(-20)
    assert found["compliance_gap_points"].control == pytest.approx(80)
    assert found["over_refusal_rise_points"].control == pytest.approx(20)
    assert found["time_vs_realignment_percent"].value == pytest.approx(400 / 3)
    assert found["step_best_lead_points"].n == 10
    parts = [row["part"] for row in rows]
    assert parts.count("screening") == len(study.readings())
    contest = [row for row in rows if row["part"] == "contest"]
    assert len(contest) == len(SEEDS) * len({row["name"] for row in contest})
    assert parts.count("benign contest") == len(contest)
    assert len({row["name"] for row in contest}) == 2 + study.FINALISTS + len(study.CONTROLS)
    assert {row["split"] for row in rows if row["part"] == "screening"} == {"validation"}
    assert BENIGN.poison == 0


def test_the_committed_claims_follow_from_the_rows_in_any_order() -> None:
    record = studies.load_study("restoration")
    assert record
    assert claims.claims(record["rows"]) == claims.claims(record["rows"][::-1]) == record["claims"]
