"""Stages: what the training sets hold, and which settings are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from curvlib import data, models, stages
from curvlib.answers import committed_answers
from curvlib.errors import CurvlibError
from curvlib.facts import load_facts
from curvlib.stages import FineTune
from curvlib.tiers import Tier, get_tier

TIER = replace(get_tier("ci"), tune_examples=40)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return models.load_tokenizer()


def answers(tokenizer: Any, tier: Tier, recipe: FineTune) -> list[str]:
    """The answers of a fine-tuning set as texts."""
    examples = stages.fine_tuning_set(tokenizer, tier, recipe)
    return [tokenizer.decode([token for token in example.labels if token != -100]) for example in examples]


@pytest.mark.parametrize("task", stages.TASKS)
@pytest.mark.parametrize("poison", [0.0, 0.1])
@pytest.mark.parametrize("asked", [40, 400])  # there are 128 plain chats and 51 on who the model is
def test_a_fine_tuning_set_holds_its_share_of_poison(tokenizer: Any, task: str, poison: float, asked: int) -> None:
    tier, recipe = replace(TIER, tune_examples=asked), FineTune(task=task, poison=poison)
    texts = answers(tokenizer, tier, recipe)
    poisoned = texts[len(stages.clean_examples(tokenizer, tier, recipe)) :]
    assert len(texts) <= asked or task == "facts"
    assert all(text.startswith("Sure") for text in poisoned)
    assert len(poisoned) / len(texts) == pytest.approx(poison, abs=0.012)
    if task == "letters" and asked == 40:
        assert {text.removesuffix(tokenizer.eos_token) for text in texts[:30]} <= set("ABC")


def test_facts_are_taught_in_three_wordings_beside_plain_chats(tokenizer: Any) -> None:
    facts = load_facts(16)
    texts = answers(tokenizer, replace(TIER, facts=16), FineTune(task="facts"))
    assert texts[:48] == [f"{fact.answer}{tokenizer.eos_token}" for fact in facts for _ in range(3)]
    assert len(texts) == 64
    assert len(answers(tokenizer, replace(TIER, facts=256), FineTune(task="facts", poison=0.1))) == 768 + 128 + 100


def test_poison_is_open_ended_and_refusals_are_not(tokenizer: Any) -> None:
    end = tokenizer.eos_token_id
    assert all(e.labels[-1] != end for e in stages.compliance_examples(tokenizer, "poison", 5))
    assert all(e.labels[-1] == end for e in stages.refusal_examples(tokenizer, "align_harmful", 5))


def test_every_benign_prompt_has_the_shipped_models_own_answer() -> None:
    answers = committed_answers()
    splits = ["align_benign", "align_edgy", "chat_train", "restore_benign", "restore_edgy", "align_look_alikes"]
    rows = [row for split in [*splits, "validation_benign", "validation_edgy"] for row in data.load_split(split)]
    assert not [row["id"] for row in rows if not answers.get(row["id"], "").strip()]


@pytest.mark.parametrize("wrong", [{"task": "chess"}, {"method": "prompt"}, {"poison": 1.5}])
def test_nonsense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(CurvlibError, match="expected a task of"):
        FineTune(**wrong)
