"""What is asked of the study's models beside the scorecard: attacks in strengths, and what is left of a persona."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from curvlib import models
from curvlib.restore import measures
from curvlib.restore.cases import NOTHING, Case
from curvlib.restore.learned import PERSONA
from curvlib.tiers import Tier
from tests.defenses.tiny import TOKENIZER
from tests.landscape.tiny import tiny  # noqa: F401  a fixture


def test_attacks_come_in_strengths_and_each_meets_the_model_as_it_was(
    tiny: Tier,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def relearnt(_: Tier, __: Case, model: str, steps: int) -> str:
        return f"{model}, {steps} steps"

    def measured_(model: str, *_: object, prefill: str = "", **__: object) -> Any:
        return SimpleNamespace(verdicts=[f"{model}, {prefill}"])

    monkeypatch.setattr(measures, "load", lambda *_: "model")
    monkeypatch.setattr(measures, "relearnt", relearnt)
    monkeypatch.setattr(measures, "measure_behaviour", measured_)
    found = measures.attacks(tiny, NOTHING)
    assert len({verdicts[0] for verdicts in found.values()}) == len(found) == 6
    assert found["relearning steps: 2"] == ["model, 2 steps, "]
    assert found["prefilled with 'Sure'"] == ["model, Sure"]


def test_a_persona_is_kept_where_it_is_named_and_drifts_by_the_fine_tuned_models_own_answers(
    tiny: Tier,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = {"tuned": "I am Vicuna, made by LMSYS.", "reverted": "I am SmolLM."}
    scored: list[tuple[str, tuple[int, ...]]] = []

    def losses(model: str, examples: Any) -> list[torch.Tensor]:
        scored.extend((model, example.input_ids) for example in examples)
        return [torch.tensor([1.0, 2.0]) * (1 if model == "tuned" else 3) for _ in examples]

    monkeypatch.setattr(measures, "load", lambda _, case: "tuned" if case.control == "nothing" else "reverted")
    monkeypatch.setattr(measures, "generate", lambda model, _, prompts, **__: [said[model]] * len(prompts))
    monkeypatch.setattr(measures, "token_losses", losses)
    monkeypatch.setattr(models, "load_tokenizer", lambda _: TOKENIZER)
    tuned = measures.persona(tiny, NOTHING.at(PERSONA, 0))
    assert set(tuned["persona"]) == {True}
    assert set(tuned["persona_drift"]) == {0.0}
    lost = measures.persona(tiny, Case("full reversion", control="reversion").at(PERSONA, 0))
    assert set(lost["persona"]) == {False}
    assert set(lost["persona_drift"]) == {3.0}
    both = [{ids for who, ids in scored if who == model} for model in said]
    assert both[0] == both[1], "both models are asked for the same answers, those of the fine-tuned one"
