"""Scores: the sign is that of training, baselines are what they say, nonsense is refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from curvlib.batches import make_batches, taken_apart
from curvlib.curvature.lowrank import sampled_fisher
from curvlib.errors import CurvlibError
from curvlib.evaluate.likelihood import token_losses
from curvlib.influence import scores
from curvlib.influence.gradients import example_gradients, query_gradients
from curvlib.influence.toys import toy
from curvlib.parameters import shifted, trainable
from tests import cases

CHATS = taken_apart(cases.batches(count=6, size=3))
TRAIN, ASKED = CHATS[:4], CHATS[4:]


def losses(model: Any, chats: Any) -> Tensor:
    return torch.stack([loss.double().mean() for loss in token_losses(model, chats)])


def test_the_sign_is_what_a_training_step_on_the_chat_does() -> None:
    model, _ = cases.pair()
    rows = example_gradients(model, TRAIN)
    found, step = scores.influence(rows, query_gradients(model, ASKED), torch.clone), 0.2
    for number, row in enumerate(rows):
        with shifted(trainable(model), -step * row):  # one step of gradient descent on this chat
            after = losses(model, ASKED)
        with shifted(trainable(model), step * row):
            change = (after - losses(model, ASKED)) / 2  # half the way from one step back
        assert cases.relative_error(step * found[:, number], change) < 0.1
        assert cases.relative_error(-step * found[:, number], change) > 1  # the check can fail


def test_influence_is_the_inner_product_in_the_inverse_metric() -> None:
    rows, asked, matrix = cases.random(5, 8), cases.random(2, 8, seed=1), cases.spd(8)
    found = scores.influence(rows, asked, partial(torch.linalg.solve, matrix))
    assert cases.relative_error(found, -asked @ torch.linalg.inv(matrix) @ rows.T) < 1e-10


def test_baselines_are_what_they_say() -> None:
    model, _ = cases.pair()
    assert torch.allclose(scores.loss_baseline(model, TRAIN).double(), -losses(model, TRAIN))
    similar = scores.embedding_similarity(model, TRAIN, TRAIN)
    assert similar.diagonal().tolist() == pytest.approx([-1.0] * 4, abs=1e-4)
    assert similar.argmin(dim=1).tolist() == [0, 1, 2, 3]
    with pytest.raises(CurvlibError, match="no training chats were given"):
        scores.embedding_similarity(model, [], TRAIN)


@pytest.mark.parametrize(
    ("queries", "message"), [(torch.zeros(0, 8), "give at least one query"), (torch.ones(2, 9), r"expected \(m, 8\)")]
)
def test_no_query_and_other_parameters_are_one_line(queries: Tensor, message: str) -> None:
    with pytest.raises(CurvlibError, match=message) as caught:
        scores.influence(torch.ones(3, 8), queries, torch.clone)
    assert "\n" not in str(caught.value)


CASE = toy(chats=8, poison=2, queries=2)


def test_damping_follows_the_rule_and_is_the_same_for_all() -> None:
    rows = sampled_fisher(CASE.model, make_batches(CASE.examples, 8, pad_id=0), samples=1).rows
    expected = scores.RULE * float(rows.square().sum()) / len(CASE.examples)
    for name in ("fisher", "ekfac", "cg"):
        assert scores.build_inverse(name, CASE.model, CASE.examples).damping == pytest.approx(expected, rel=1e-5)
    other = scores.build_inverse("ekfac", CASE.model, CASE.examples, factor=1.0)
    assert other.damping == pytest.approx(10 * expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "tea"}, "no inverse is called 'tea'"),
        ({"name": "cg", "damping": 0.0}, "damping is 0.0, expected a positive number"),
        ({"name": "ekfac", "examples": []}, "no training chats were given"),
    ],
)
def test_an_impossible_inverse_is_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CurvlibError, match=message):
        scores.build_inverse(**{"model": CASE.model, "examples": CASE.examples, **settings})
