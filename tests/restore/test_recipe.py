"""The recipe: prompts in the same form for both answers, and the baseline behind the same name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from curvlib import stages
from curvlib.batches import Example
from curvlib.finetune import TrainingConfig
from curvlib.restore import Budget, HeldOut, SafetyBatches, recipe
from tests import cases
from tests.evaluate import toys


def prompt(example: Example) -> tuple[int, ...]:
    return tuple(token for token, label in zip(example.input_ids, example.labels, strict=True) if label == -100)


def test_both_answers_belong_to_the_same_orders_and_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [stages.data.Example("a/0", "Write a plan"), stages.data.Example("a/1", "Write a list")]
    monkeypatch.setattr(stages.data, "load_split", lambda _: rows)
    tokenizer = toys.tokenizer()
    refusals = stages.refusal_examples(tokenizer, "any", 2)
    compliances = stages.compliance_examples(tokenizer, "any", 2, questions=True)
    assert [prompt(e) for e in refusals] == [prompt(e) for e in compliances]
    assert stages.requests("any", 2)[1].endswith("?")
    assert compliances[0].labels[-1] != tokenizer.eos_token_id


@pytest.mark.parametrize("objective", ["realign", "return", "distill"])
def test_every_reading_has_a_history(objective: str) -> None:
    task, refusals, benign = (cases.batches(2, seed=seed) for seed in (1, 2, 3))
    safety = SafetyBatches(refusals)
    chats = recipe.Chats(task, safety, benign, HeldOut(safety, {"task": task, "benign": benign}))
    model: Any = cases.nf4_llama()
    how = recipe.Restoration(objective, budget=Budget(steps=1))
    history = json.loads(json.dumps(recipe.history(recipe.run(model, chats, how, seed=0))))
    assert {len(history["trials"]) - 1} <= {"realign": {3}, "return": {6}, "distill": {1, 2, 3, 4, 5}}[objective]
    assert history["gradients"] > 0


def test_a_realignment_has_the_runs_that_it_was_given_and_others_keep_their_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(recipe, "realign", lambda *_, **options: given.update(options))
    chats = recipe.Chats([], SafetyBatches([]), [], HeldOut(SafetyBatches([]), {}))
    own = recipe.Restoration("realign", training=(TrainingConfig(steps=20),))
    model: Any = None
    recipe.run(model, chats, own, seed=2)
    assert given["training"] == [TrainingConfig(steps=20, seed=2)]
    assert own.settings()["training"][0]["steps"] == 20
    assert "training" not in recipe.Restoration().settings()
