"""The recipe: prompts in the same form for both answers, and the baseline behind the same name."""

from __future__ import annotations

import json

import pytest

from curvlib import stages
from curvlib.batches import Example
from curvlib.restore import HeldOut, SafetyBatches, recipe
from tests import cases
from tests.evaluate import toys


def prompt(example: Example) -> tuple[int, ...]:
    return tuple(token for token, label in zip(example.input_ids, example.labels, strict=True) if label == -100)


def test_both_answers_belong_to_the_same_orders_and_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.data, "prompts", lambda *_: ["Write a plan", "Write a list"])
    tokenizer = toys.tokenizer()
    refusals = stages.refusal_examples(tokenizer, "any", 2)
    compliances = stages.compliance_examples(tokenizer, "any", 2, questions=True)
    assert [prompt(e) for e in refusals] == [prompt(e) for e in compliances]
    assert stages.requests("any", 2)[1].endswith("?")
    assert compliances[0].labels[-1] != tokenizer.eos_token_id


@pytest.mark.parametrize("metric", ["identity", "ekfac"])
def test_a_history_is_json_and_tells_way_damping_and_cost(metric: str) -> None:
    task, refusals, benign = (cases.batches(2, seed=seed) for seed in (1, 2, 3))
    safety = SafetyBatches(cases.said_by_base(cases.pair()[0], refusals))
    chats = recipe.Chats(task, safety, benign, HeldOut(safety, {"task": task, "benign": benign}))
    result = recipe.run(cases.nf4_llama(), chats, recipe.Restoration(metric=metric, moves=1), seed=0)
    history = json.loads(json.dumps(recipe.history(result)))
    assert [point["price"].keys() for point in history["path"]] == [{"task", "benign"}] * 2
    assert (history["damping"]["name"], history["gradients"]) == (metric, result.gradients)
    assert (history["damping"]["above"] is None) == (metric == "identity")
