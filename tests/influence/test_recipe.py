"""Which chats of a fine-tune are poison."""

from __future__ import annotations

from dataclasses import replace

import pytest

from curvlib import models, stages
from curvlib.batches import taken_apart
from curvlib.influence.recipe import training_set
from curvlib.stages import FineTune
from curvlib.tiers import get_tier
from tests import cases


def test_the_last_chats_are_the_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    chats, tier, tuned = taken_apart(cases.batches(count=12, size=1)), get_tier("ci"), FineTune(poison=0.25)
    monkeypatch.setattr(stages, "aligned_source", lambda _: "aligned/model")
    monkeypatch.setattr(models, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(stages, "fine_tuning_set", lambda *_: chats)
    for size in (replace(tier, tune_examples=12), replace(tier, tune_examples=24)):  # more are asked for than there are
        assert training_set(size, tuned) == (chats, [False] * 9 + [True] * 3)
