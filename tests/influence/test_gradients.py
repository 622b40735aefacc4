"""Gradients of single chats: equal to one backward pass a chat, as rows and as inner products; nonsense is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from curvlib.batches import IGNORED, Example, answer_loss, taken_apart
from curvlib.errors import CurvlibError
from curvlib.evaluate.likelihood import token_losses
from curvlib.influence.gradients import in_batches, influence, inner_products, query_gradients
from curvlib.parameters import shifted, trainable
from tests import cases

CHATS = taken_apart(cases.batches(count=5, size=2))[::-1]  # not in the order of their lengths


def one_by_one(model: nn.Module, examples: list[Example]) -> torch.Tensor:
    """The gradient of each chat's mean loss by one plain backward pass a chat, (n, P)."""
    losses = torch.stack([answer_loss(model, batch) for e in examples for _, batch in in_batches([e], 1)])
    return cases.explicit_gradients(losses, list(trainable(model).values()))


def shares(model: nn.Module, examples: list[Example]) -> torch.Tensor:
    """The gradient of each chat's share in the mean loss over all answer tokens, (n, P)."""
    count = torch.tensor([[float(len(e.labels) - e.labels.count(IGNORED))] for e in examples])
    return one_by_one(model, examples) * count / count.sum()


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_rows_are_the_gradients_of_single_chats_in_the_order_given(batch_size: int) -> None:
    model, twin = cases.pair()
    exact = one_by_one(twin, CHATS)
    assert cases.relative_error(query_gradients(model, CHATS, batch_size=batch_size), exact) < 1e-5


def test_rows_keep_their_chats_where_a_batch_holds_answers_of_unlike_length() -> None:
    model, twin = cases.pair()
    long, short = (4, 2, 9, 6, 3, 8, 1, 7, 5, 2, *range(1, 21)), (3, 8, 1, 7, 5, 2, 9, 4, 6, 1, 2, 3, 5, *[7] * 25)
    chats = [Example(long, (*[IGNORED] * 10, *long[10:])), Example(short, (*[IGNORED] * 36, *short[36:])), *CHATS]
    assert cases.relative_error(query_gradients(model, chats), one_by_one(twin, chats)) < 1e-5


def test_a_trained_bias_is_refused() -> None:
    model = cases.llama(attention_bias=True).requires_grad_(False)
    layer: Any = model.model.layers[0].self_attn.q_proj
    layer.requires_grad_(True)
    with pytest.raises(CurvlibError, match=r"q_proj.bias is trainable"):
        query_gradients(model, CHATS)
    layer.bias.requires_grad_(False)
    assert cases.relative_error(query_gradients(model, CHATS), one_by_one(model, CHATS)) < 1e-5


def test_no_dequantised_weight_is_kept() -> None:
    model, _ = cases.pair()
    with cases.SavedTensors(model) as saved:
        query_gradients(model, CHATS)
    assert (cases.INTERMEDIATE, cases.HIDDEN) not in saved.shapes
    with cases.SavedTensors(model) as saved:  # the check can fail
        (torch.ones(cases.INTERMEDIATE, cases.HIDDEN, requires_grad=True) ** 2).sum()
    assert (cases.INTERMEDIATE, cases.HIDDEN) in saved.shapes


def test_inner_products_are_those_of_the_rows_and_a_swapped_chat_is_seen() -> None:
    model, twin = cases.pair()
    rows = shares(twin, CHATS)
    vectors = cases.random(3, rows.shape[1], dtype=torch.float32)
    products = inner_products(model, CHATS, vectors, batch_size=2)
    assert cases.relative_error(products, vectors.double() @ rows.T) < 1e-5
    assert cases.relative_error(products[:, [1, 0, 2, 3, 4]], vectors.double() @ rows.T) > 0.1


def test_the_shares_add_up_to_the_mean_loss() -> None:
    model, twin = cases.pair()
    ((_, whole),) = in_batches(CHATS, len(CHATS))
    exact = cases.explicit_gradients(answer_loss(model, whole)[None], list(trainable(model).values()))
    assert cases.relative_error(shares(twin, CHATS).sum(0), exact[0]) < 1e-5


def test_influence_is_what_a_training_step_on_the_chat_does() -> None:
    model, twin = cases.pair()
    train, asked, step = CHATS[:3], CHATS[3:], 0.2

    def losses() -> torch.Tensor:
        return torch.stack([loss.double().mean() for loss in token_losses(model, asked)])

    scores = influence(model, train, asked, torch.clone)
    for number, row in enumerate(shares(twin, train)):
        with shifted(trainable(model), -step * row):  # one step of gradient descent on this chat
            after = losses()
        with shifted(trainable(model), step * row):
            change = (after - losses()) / 2  # half the way from one step back
        assert cases.relative_error(step * scores[:, number], change) < 0.1
        assert cases.relative_error(-step * scores[:, number], change) > 1  # the check can fail


def test_influence_is_the_inner_product_in_the_inverse_metric() -> None:
    model, twin = cases.pair()
    rows, asked = shares(twin, CHATS[:3]), one_by_one(twin, CHATS[3:])
    weights = cases.random(rows.shape[1]).exp()
    found = influence(model, CHATS[:3], CHATS[3:], lambda b: b / weights.to(b))
    assert cases.relative_error(found, -asked / weights @ rows.T) < 1e-5


LONG = Example((1,) * 65, (IGNORED,) * 64 + (1,))


@pytest.mark.parametrize(
    ("examples", "message"),
    [([], "no query chats were given"), ([CHATS[0], LONG], "number 1 of the query chats has 65 tokens")],
)
def test_no_chat_and_a_long_chat_are_one_line(examples: list[Example], message: str) -> None:
    model = cases.llama(max_position_embeddings=64)
    with pytest.raises(CurvlibError, match=message) as caught:
        query_gradients(model, examples)
    assert "\n" not in str(caught.value)


def test_a_model_without_trainable_parameters_is_one_line() -> None:
    with pytest.raises(CurvlibError, match="no parameter of the model is trainable"):
        query_gradients(cases.llama().requires_grad_(False), CHATS)


@pytest.mark.parametrize("shape", [(2,), (1, 5), (0, 3, 1)])
def test_vectors_of_another_shape_are_one_line(shape: tuple[int, ...]) -> None:
    with pytest.raises(CurvlibError, match=r"expected \(k, \d+\)"):
        inner_products(cases.pair()[0], CHATS, torch.ones(shape))
