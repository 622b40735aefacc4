"""Reading what all rows begin with once gives the logits, the answers and the cost that it should."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from curvlib.batches import IGNORED, Batch, Example, answer_logits, answer_targets, make_batches
from curvlib.curvature.forward import flat_gradient
from curvlib.curvature.ggn import ggn_vector_product
from curvlib.curvature.hessian import hessian_vector_product
from curvlib.generate import decode_batch, left_pad
from curvlib.parameters import trainable
from curvlib.prefix import common_beginning, read_beginning, token_positions
from tests.cases import pair, random, relative_error

HEAD = (5, 6, 7, 8)
TAILS = ((9, 10), (11, 12, 13, 14), (9, 10, 15))
ROWS = [[*HEAD, *tail] for tail in TAILS]


def batch() -> Batch:
    chats = [Example(tuple(row), (*[IGNORED] * (len(row) - 1), row[-1])) for row in ROWS]
    return make_batches(chats, 3, pad_id=0)[0]


class Counting(torch.nn.Module):
    """A model that writes down how many tokens each call runs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config, self.calls = model, model.config, list[int]()

    def get_base_model(self) -> Any:
        return self.model.get_base_model()

    def forward(self, **given: Any) -> Any:
        self.calls.append(given["input_ids"].numel())
        return self.model(**given)


@pytest.mark.parametrize(("most", "found"), [(9, 4), (3, 3), (0, 0), (-1, 0)])
def test_the_common_beginning_stops_where_rows_differ_or_may_not_be_taken(most: int, found: int) -> None:
    ids, mask = left_pad(ROWS, 0, torch.device("cpu"))
    assert common_beginning(ids, mask, min(most, 6)) == found
    assert token_positions(mask)[0].tolist() == [0, 0, 0, 1, 2, 3, 4, 5]


def test_logits_are_the_same_at_fewer_tokens() -> None:
    _, twin = pair()
    model, given = Counting(twin), batch()
    exact = answer_logits(model, given, once=False)
    torch.testing.assert_close(answer_logits(model, given), exact, rtol=1e-10, atol=1e-10)
    assert model.calls == [24, 4, 12]


def test_derivatives_flow_through_the_beginning() -> None:
    _, twin = pair()
    parameters, given = list(trainable(twin).values()), batch()
    v = random(sum(parameter.numel() for parameter in parameters))

    def loss(once: bool) -> Tensor:
        return cross_entropy(answer_logits(twin, given, once=once), answer_targets(given))

    for derivative in (
        lambda once: flat_gradient(loss(once), parameters),
        lambda once: hessian_vector_product(lambda: loss(once), parameters, v),
        lambda once: ggn_vector_product(lambda: answer_logits(twin, given, once=once), parameters, v),
    ):
        assert relative_error(derivative(True), derivative(False)) < 1e-10


def test_a_prompt_keeps_the_token_that_predicts_its_answer() -> None:
    same = make_batches([Example((*HEAD, last), (*[IGNORED] * 4, last)) for last in (1, 2)], 2, pad_id=0)[0]
    _, twin = pair()
    exact = answer_logits(twin, same, once=False)
    torch.testing.assert_close(answer_logits(twin, same), exact, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_answers_are_those_of_each_prompt_alone() -> None:
    _, twin = pair()
    alone = [decode_batch(twin, *left_pad([row], 0, torch.device("cpu")), [1], 6)[0] for row in ROWS]
    assert decode_batch(twin, *left_pad(ROWS, 0, torch.device("cpu")), [1], 6) == alone


@torch.no_grad()
def test_a_wrong_position_would_be_seen() -> None:
    _, twin = pair()
    ids, mask = left_pad(ROWS, 0, torch.device("cpu"))

    def last(shift: int) -> Tensor:
        given = read_beginning(twin, ids, mask, 5)
        given["position_ids"] = given["position_ids"] + shift
        logits: Tensor = twin(**given).logits[:, -1]
        return logits

    assert (last(0) - last(1)).abs().max() > 1e-4
