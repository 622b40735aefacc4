"""A tiny aligned model, its fine-tunes and its chats in place of the real stages, in a cache of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from curvlib import models, nf4, stages
from curvlib.batches import Example
from curvlib.landscape import compare, recipe
from curvlib.stages import FineTune
from curvlib.tiers import Tier, get_tier
from tests import cases

TIER = replace(get_tier("ci"), landscape_points=5, landscape_pairs=2, landscape_chats=3, landscape_products=4)


def chats() -> dict[str, list[Example]]:
    """Three chats of each harmful loss over the same prompts, two of the others."""
    tokens = torch.randint(1, cases.VOCABULARY, (5, 2, 9), generator=torch.Generator().manual_seed(0)).tolist()

    def chat(prompt: int, answer: int) -> Example:
        head, tail = tokens[prompt][0][:4], tokens[answer][1][:3]
        return Example((*head, *tail), (*[-100] * 4, *tail))

    same = [chat(n, n) for n in range(3)]
    return {
        "compliance": same,
        "refusal": [chat(n, n + 2) for n in range(3)],
        "shuffled": [chat(n, (n + 1) % 3) for n in range(3)],
        "task": [chat(3, 3), chat(4, 4)],
        "text": [chat(4, 3), chat(3, 4)],
    }


def aligned(noise: float = 0.0) -> Any:
    """The tiny model in NF4; with noise a full fine-tune of it."""
    model = cases.llama()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter += noise * cases.random(*parameter.shape, seed=number).float()
    model.requires_grad_(False)
    cases.quantise(model)
    nf4.install(model)
    return model


def fine_tuned(_: Tier, how: FineTune) -> Any:
    return aligned(0.01) if how.method == "full" else cases.nf4_llama()


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tier]:
    """Stages and chats are the tiny ones."""
    monkeypatch.setenv("CURVLIB_CACHE", str(tmp_path))
    monkeypatch.setattr(stages, "load_aligned", lambda _: (aligned(), None))
    monkeypatch.setattr(stages, "load_fine_tuned", fine_tuned)
    monkeypatch.setattr(stages, "aligned_source", lambda _: "aligned/model")
    monkeypatch.setattr(models, "identity", str)
    monkeypatch.setattr(
        stages, "fine_tuned", lambda _, how: Path(f"{how.method}-{how.rank}-{how.poison}-{how.seed}/model")
    )
    monkeypatch.setattr(models, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(recipe, "landscape_chats", lambda *_: chats())
    monkeypatch.setattr(recipe, "RISE", 0.05)
    monkeypatch.setattr(compare, "RESAMPLES", 20)
    for kept in (recipe.direction_pair, recipe.chats_of):
        kept.cache_clear()
    yield TIER
    for kept in (recipe.direction_pair, recipe.chats_of):
        kept.cache_clear()
