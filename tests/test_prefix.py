"""Reading what all rows begin with once gives the logits, the answers and the cost that it should."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from curvlib.batches import IGNORED, Batch, Example, answer_logits, make_batches
from curvlib.evaluate.generate import decode_batch, left_pad
from curvlib.prefix import common_beginning, read_beginning, token_positions
from tests.cases import pair

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


def test_logits_without_gradients_are_those_with_them_at_fewer_tokens() -> None:
    _, twin = pair()
    model, given = Counting(twin), batch()
    exact = answer_logits(model, given)
    with torch.no_grad():
        torch.testing.assert_close(answer_logits(model, given), exact, rtol=1e-10, atol=1e-10)
    assert model.calls == [24, 4, 12]


def test_a_prompt_keeps_the_token_that_predicts_its_answer() -> None:
    same = make_batches([Example((*HEAD, last), (*[IGNORED] * 4, last)) for last in (1, 2)], 2, pad_id=0)[0]
    _, twin = pair()
    exact = answer_logits(twin, same)
    with torch.no_grad():
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
