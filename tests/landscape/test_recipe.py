"""Windows are measured once, around the right model, and the chats are what they are called."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from curvlib import models, stages
from curvlib.batches import Example, answer_loss, make_batches
from curvlib.errors import CurvlibError
from curvlib.landscape import recipe
from curvlib.landscape.directions import adapter_direction, moved
from curvlib.landscape.recipe import ALIGNED, Place, window
from curvlib.landscape.subspace import spanned_by
from curvlib.stages import FineTune
from curvlib.tiers import Tier, get_tier
from tests import cases
from tests.landscape import tiny as case
from tests.landscape.tiny import tiny  # noqa: F401  a fixture

POISONED = FineTune(poison=0.1)


def answer(tokenizer: Any, example: Example) -> str:
    return str(tokenizer.decode([token for token in example.labels if token != -100]))


def test_the_chats_are_short_and_what_they_are_called() -> None:
    tier, tokenizer = replace(get_tier("ci"), landscape_chats=3), models.load_tokenizer()
    found = recipe.landscape_chats(tier, tokenizer)
    assert {name: len(chats) for name, chats in found.items()} == dict(zip(recipe.LOSSES, (3, 3, 3, 2, 2), strict=True))
    heads = {name: [chat.input_ids[: chat.labels.count(-100)] for chat in chats] for name, chats in found.items()}
    assert heads["compliance"] == heads["refusal"] == heads["shuffled"]
    answers = {name: [answer(tokenizer, chat) for chat in chats] for name, chats in found.items()}
    assert answers["shuffled"] == [*answers["compliance"][1:], answers["compliance"][0]]
    assert all(text.startswith("Sure") for text in answers["compliance"])
    assert not any(text.startswith("Sure") for text in answers["refusal"])
    assert max(len(chat.input_ids) for chats in found.values() for chat in chats) < 90
    assert all(sum(label != -100 for label in c.labels) <= 8 for name in recipe.LOSSES[:3] for c in found[name])


@pytest.mark.parametrize(
    "place", [ALIGNED, Place(POISONED), Place(FineTune(method="full")), Place(POISONED, noise=True)]
)
def test_the_middle_of_a_window_is_the_place(tiny: Tier, place: Place) -> None:  # noqa: F811
    view = window(tiny, place, 0)
    model = case.aligned() if place.recipe is None or place.noise else case.fine_tuned(tiny, place.recipe)
    with torch.no_grad():
        alone = [float(answer_loss(model, make_batches([chat], 1, 0)[0])) for chat in case.chats()["refusal"]]
    centre = recipe.center_losses(view)["refusal"]
    if place.noise:
        assert not np.allclose(centre, alone, atol=1e-3)
    else:
        np.testing.assert_allclose(centre, alone, atol=1e-4)
    assert view.losses["task"].shape == (25, 2)


def test_a_window_is_measured_once_and_all_places_share_its_grid(tiny: Tier, monkeypatch: Any) -> None:  # noqa: F811
    first, other = window(tiny, ALIGNED, 0), window(tiny, Place(POISONED), 0)
    assert np.array_equal(first.points, other.points)
    unrelated = window(tiny, ALIGNED, 1)
    assert not np.allclose(first.losses["task"][0], unrelated.losses["task"][0], atol=1e-4)
    monkeypatch.setattr(recipe, "measure", None)
    assert np.array_equal(window(tiny, ALIGNED, 0).losses["task"], first.losses["task"])


def test_a_random_step_needs_a_fine_tune() -> None:
    with pytest.raises(CurvlibError, match="name the recipe"):
        Place(noise=True)


def test_gradient_and_curvature_predict_the_loss_nearby(tiny: Tier) -> None:  # noqa: F811
    model, chats = cases.nf4_llama(), case.chats()["refusal"]
    space = spanned_by(adapter_direction(model), 2)
    slope = recipe.gradient(model, space, chats)
    with recipe.curvature(model, space, chats) as operator:
        bend = float(slope @ operator.matvec(slope))
    assert bend > 0

    def loss(length: float) -> float:
        with moved(model, [(space.direction(slope), length)]), torch.no_grad():
            return float(answer_loss(model, make_batches(chats, 9, 0)[0]))

    step = 0.01 / float(slope.norm())
    assert (loss(step) - loss(-step)) / (2 * step) == pytest.approx(float(slope @ slope), rel=0.02)
    assert tiny is case.TIER
    assert stages.aligned_source(tiny) == "aligned/model"
