"""Distances against dense weights, one run against shorter ones, curves against closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from curvlib.batches import taken_apart
from curvlib.errors import CurvlibError
from curvlib.evaluate.attacks.relearning import Relearning, area, crossing, relearn
from curvlib.parameters import flatten, trainable
from tests import cases

CHATS = taken_apart(cases.batches(8))


def dense(model: Any) -> torch.Tensor:
    """All effective weights in one vector."""
    layers = [layer for layer in model.modules() if hasattr(layer, "get_delta_weight")]
    return torch.cat([layer.get_delta_weight("default").detach().double().flatten() for layer in layers])


def attack(model: Any, **options: Any) -> Relearning:
    return relearn(model, CHATS, lambda: [float(flatten(trainable(model)).double().sum())], pad_id=0, **options)


def test_distances_are_those_of_the_dense_weights() -> None:
    model = cases.nf4_llama()
    before, apart = dense(model), flatten(trainable(model))
    run = attack(model, reads=(0, 1, 3), rate=1e-2)
    assert run.distances[0] == 0 < run.distances[1] < run.distances[2]
    assert run.distances[-1] == pytest.approx(float((dense(model) - before).norm()), rel=1e-5)
    assert run.distances[-1] != pytest.approx(float((flatten(trainable(model)) - apart).norm()), rel=0.05)


def test_a_read_out_is_where_a_shorter_run_ends() -> None:
    whole, short = attack(cases.nf4_llama(), reads=(0, 1, 2, 4)), attack(cases.nf4_llama(), reads=(0, 2))
    assert whole.log_odds.shape == (4, 1)
    assert np.array_equal(whole.log_odds[[0, 2]], short.log_odds)
    assert whole.distances[2] == short.distances[1]
    other = attack(cases.nf4_llama(), reads=(0, 2), rate=1e-3)  # the fault: another rate
    assert not np.array_equal(other.log_odds[1], short.log_odds[1])


def test_steps_of_fixed_length_are_that_long() -> None:
    model = cases.nf4_llama()
    start = flatten(trainable(model))
    attack(model, reads=(0, 1), rate=0.25, fixed_length=True)
    assert float((flatten(trainable(model)) - start).norm()) == pytest.approx(0.25, rel=1e-4)


def test_read_outs_that_do_not_rise_are_one_line() -> None:
    for reads in ((1, 2), (0, 4, 2)):
        with pytest.raises(CurvlibError, match="rising numbers"):
            attack(cases.nf4_llama(), reads=reads)


def test_the_area_and_the_half_of_a_straight_fall_are_its_closed_forms() -> None:
    steps = np.array([0, 1, 2, 4, 8])
    assert area(steps, 1 - steps / 8) == pytest.approx(0.5)
    assert crossing(steps, 1 - steps / 8) == (pytest.approx(4.0), True)
    falling = np.maximum(0, 1 - steps / 2)  # over at step 2, so an eighth is left of the time
    assert area(steps, falling) == pytest.approx(1 / 8)
    assert area(steps[:3], falling[:3]) == pytest.approx(1 / 2)  # censored earlier, another number
    assert crossing(steps, np.ones(5)) == (8.0, False)
    assert crossing(steps, np.zeros(5)) == (0.0, True)
