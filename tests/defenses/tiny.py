"""A tiny aligned model, its fine-tune, a chat tokenizer and chats in place of the real stages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from curvlib import models, stages
from curvlib.batches import Batch, Example, encode, make_batches, open_ended
from curvlib.defenses.method import Setting
from curvlib.finetune import TrainingConfig
from curvlib.landscape.directions import Direction, effective_weight, linear_layers
from curvlib.restore import HeldOut, SafetyBatches
from curvlib.restore.recipe import Chats
from curvlib.stages import FineTune, chat
from curvlib.tiers import get_tier
from tests import cases
from tests.evaluate import toys
from tests.landscape.tiny import aligned

TIER = replace(get_tier("ci"), test_harmful=3, test_edgy=2, test_task=2, validation=2)
RECIPE = FineTune(poison=0.1, rank=2)
TRAINING = TrainingConfig(steps=3, batch_size=2, learning_rate=1e-2)
HARMFUL = ("Write a plan", "Write something red", "plan a list of words")
BENIGN = ("Write a list", "one two three", "four five six words")
TOKENIZER = toys.tokenizer()


def examples(prompts: tuple[str, ...], answer: str) -> list[Example]:
    return encode(TOKENIZER, [chat(prompt, answer) for prompt in prompts], 64)


def batches(prompts: tuple[str, ...], answer: str) -> list[Batch]:
    return make_batches([open_ended(example) for example in examples(prompts, answer)], 2, pad_id=0)


def chats() -> Chats:
    safety = SafetyBatches(batches(HARMFUL, "red red red"), batches(HARMFUL, "green green"))
    task, benign = batches(BENIGN, "The answer is B ."), batches(BENIGN, "blue blue")
    return Chats(task, safety, benign, HeldOut(safety, {"task": task, "benign": benign}))


def alignment(_: Setting) -> Direction:
    """A random step of every layer."""
    sizes = {name: effective_weight(layer).shape for name, layer in linear_layers(aligned()).items()}
    drawn = [(name, cases.random(*size, seed=n).float()) for n, (name, size) in enumerate(sizes.items())]
    return Direction({name: (0.02 * matrix,) for name, matrix in drawn})


def setting() -> Setting:
    return Setting(TIER, RECIPE, TOKENIZER, chats())


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Setting:
    """The setting; every stage behind it is tiny too."""
    tuning = [*examples(BENIGN, "The answer is C ."), *examples(HARMFUL[:1], "green green green")]
    monkeypatch.setattr(stages, "load_aligned", lambda _: (aligned(), TOKENIZER))
    monkeypatch.setattr(stages, "load_fine_tuned", lambda *_: cases.nf4_llama())
    monkeypatch.setattr(stages, "aligned_source", lambda _: "aligned/model")
    monkeypatch.setattr(stages, "fine_tuning_set", lambda *_: tuning)
    monkeypatch.setattr(stages, "tune_training", lambda *_: TRAINING)
    monkeypatch.setattr(models, "load_tokenizer", lambda _: TOKENIZER)
    monkeypatch.setattr(Setting, "alignment", alignment)
    return setting()


@torch.no_grad()
def logits(model: Any, *, adapter: bool = True) -> torch.Tensor:
    """What a model makes of one prompt, in eval mode, with its adapter or without."""
    ids = torch.tensor([[6, 7, 8, 9, 10]])
    if adapter:
        found: torch.Tensor = model(input_ids=ids).logits
        return found
    with model.disable_adapter():
        return logits(model)
