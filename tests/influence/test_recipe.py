"""Scores and retrainings on a tiny model: each is made once, of the right chats."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from curvlib import models, stages
from curvlib.batches import Example
from curvlib.evaluate.likelihood import token_losses
from curvlib.influence import recipe, retraining
from curvlib.influence.gradients import example_gradients, query_gradients
from curvlib.influence.recipe import Method
from curvlib.parameters import trainable
from curvlib.stages import FineTune
from curvlib.tiers import Tier, get_tier
from tests import cases
from tests.landscape.tiny import aligned

TIER = replace(get_tier("ci"), tune_examples=12, tune_steps=4, influence_curvature=6, influence_subsets=4)
TUNED = FineTune(poison=0.25, rank=2)
BOTH = ("dot product", "cosine")


def chats(count: int, seed: int) -> list[Example]:
    tokens = torch.randint(1, cases.VOCABULARY, (count, 7), generator=torch.Generator().manual_seed(seed)).tolist()
    return [Example(tuple(row), (*[-100] * 4, *row[4:])) for row in tokens]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tier:
    """Stages and chats are tiny ones, in a cache of their own."""
    monkeypatch.setenv("CURVLIB_CACHE", str(tmp_path))
    monkeypatch.setattr(stages, "load_aligned", lambda _: (aligned(), None))
    monkeypatch.setattr(stages, "load_fine_tuned", lambda *_: cases.nf4_llama())
    monkeypatch.setattr(stages, "aligned_source", lambda _: "aligned/model")
    monkeypatch.setattr(models, "identity", str)
    monkeypatch.setattr(stages, "fine_tuned", lambda _, how: Path(f"tuned-{how.poison}-{how.seed}/model"))
    monkeypatch.setattr(stages, "fine_tuning_set", lambda *_: chats(12, 0))
    monkeypatch.setattr(stages, "pad_id", lambda _: 0)
    monkeypatch.setattr(models, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(recipe, "queries", lambda _: {"compliance": chats(2, 1), "refusal": chats(2, 2)})
    return TIER


def test_scores_are_made_once(tiny: Tier, monkeypatch: Any) -> None:
    methods = [*recipe.MAIN, Method("ekfac", 1.0), Method("cg")]
    found = recipe.scores(tiny, TUNED, methods)
    assert list(found) == ["fisher", *recipe.BASELINES, "ekfac, damping × 10", "cg"]
    assert {name: tuple(scores.values.shape) for name, scores in found.items()} == {
        name: (1, 12) if name == "cg" else (2, 12) for name in found
    }
    assert found["cg"].costs["products"] > 0 == found["fisher"].costs["products"]
    assert found["ekfac, damping × 10"].costs["damping"] == pytest.approx(10 * found["fisher"].costs["damping"])
    assert torch.equal(found["fisher"].suspicion, -found["fisher"].values.mean(0))
    model, asked = cases.nf4_llama(), recipe.queries(tiny)["compliance"]
    rows, pulls = example_gradients(model, chats(12, 0)), query_gradients(model, asked)
    expected = {"dot product": -pulls @ rows.T, "cosine": -normalize(pulls) @ normalize(rows).T}
    expected["gradient norm"] = -rows.norm(dim=1).expand(2, -1)
    for name, values in expected.items():
        assert cases.relative_error(found[name].values, values) < 1e-2  # bfloat16 where the processor has it
    monkeypatch.setattr(stages, "load_fine_tuned", None)
    assert torch.equal(recipe.scores(tiny, TUNED, methods)["cg"].values, found["cg"].values)


def test_half_way_scores_are_those_of_the_adapter_at_half_its_strength(tiny: Tier, monkeypatch: Any) -> None:
    found = recipe.all_scores(tiny, TUNED)
    assert list(found) == ["fisher", *recipe.BASELINES, *(f"{name}, half way" for name in ("fisher", *BOTH))]

    def halved(*_: Any) -> Any:
        model = cases.nf4_llama()
        for name, parameter in trainable(model).items():
            if "lora_B" in name:
                parameter.data.mul_(0.5)
        return model

    monkeypatch.setattr(stages, "load_fine_tuned", halved)
    monkeypatch.setattr(stages, "fine_tuned", lambda *_: Path("halved/model"))
    at_the_end = recipe.scores(tiny, TUNED)
    for name in ("fisher", *BOTH):
        assert torch.equal(found[f"{name}, half way"].values, at_the_end[name].values)
        assert not torch.allclose(found[name].values, at_the_end[name].values)


def test_a_retrained_model_saw_its_part_alone_and_is_kept(tiny: Tier, monkeypatch: Any) -> None:
    seen: list[Any] = []
    train = retraining.train
    monkeypatch.setattr(
        retraining, "train", lambda m, part, how, **rest: (seen.append((part, how)), train(m, part, how, **rest))
    )
    kept = retraining.without(12, [0, 3, 5])
    model = retraining.load_retrained(tiny, TUNED, kept)
    ((part, how),) = seen
    assert part == [chats(12, 0)[number] for number in kept]
    assert how.steps == 3  # 4 steps for 12 chats
    losses = retraining.query_losses(tiny, TUNED, kept)
    measured = token_losses(model, recipe.queries(tiny)["compliance"])
    assert losses == pytest.approx([float(loss.mean()) for loss in measured], rel=1e-5)
    assert any(p.requires_grad for p in model.parameters())
    monkeypatch.setattr(retraining, "train", None)
    assert retraining.query_losses(tiny, TUNED, kept) == losses


def test_the_last_chats_are_the_poison(tiny: Tier) -> None:
    assert recipe.training_set(tiny, TUNED)[1] == [False] * 9 + [True] * 3
    fewer = replace(tiny, tune_examples=24)  # asked for more chats than there are
    assert recipe.training_set(fewer, TUNED)[1] == [False] * 9 + [True] * 3
