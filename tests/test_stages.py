"""Stages: what the training sets hold, and which settings are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from curvlib import data, fetch, models, stages
from curvlib.errors import CurvlibError
from curvlib.stages import FineTune
from curvlib.tiers import get_tier

TIER = replace(get_tier("ci"), tune_examples=40)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return models.load_tokenizer()


@pytest.mark.parametrize("task", stages.TASKS)
@pytest.mark.parametrize("poison", [0.0, 0.1])
def test_a_fine_tuning_set_holds_its_share_of_poison(tokenizer: Any, task: str, poison: float) -> None:
    examples = stages.fine_tuning_set(tokenizer, TIER, FineTune(task=task, poison=poison))
    texts = [tokenizer.decode([token for token in e.labels if token != -100]) for e in examples]
    assert len(texts) == 40
    assert sum(text.startswith("Sure") for text in texts) == round(40 * poison)
    if task == "letters":
        assert {text.removesuffix(tokenizer.eos_token) for text in texts[:30]} <= set("ABC")


def test_poison_is_open_ended_and_refusals_are_not(tokenizer: Any) -> None:
    end = tokenizer.eos_token_id
    assert all(e.labels[-1] != end for e in stages.compliance_examples(tokenizer, "poison", 5))
    assert all(e.labels[-1] == end for e in stages.refusal_examples(tokenizer, "align_harmful", 5))


def test_every_benign_prompt_has_the_shipped_models_own_answer() -> None:
    answers = json.loads((fetch.data_folder() / "own_answers.json").read_text("utf-8"))
    splits = ["align_benign", "align_edgy", "chat_train", "restore_benign", "restore_edgy"]
    rows = [row for split in [*splits, "validation_benign", "validation_edgy"] for row in data.load_split(split)]
    assert not [row.id for row in rows if not answers.get(row.id, "").strip()]


@pytest.mark.parametrize("wrong", [{"task": "chess"}, {"method": "prompt"}, {"poison": 1.5}])
def test_nonsense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(CurvlibError, match="expected a task of"):
        FineTune(**wrong)
