"""Hessian products: closed forms in float64, the 4-bit model against its twin, memory, and refusals."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from curvlib.batches import answer_loss
from curvlib.curvature.hessian import HessianOperator, hessian, hessian_vector_product
from curvlib.errors import CurvlibError
from curvlib.parameters import flatten, trainable, unflatten
from tests.cases import (
    HIDDEN,
    INTERMEDIATE,
    MLP,
    SavedTensors,
    add_lora,
    batches,
    classification,
    explicit_gradients,
    llama,
    nf4_llama,
    pair,
    random,
    relative_error,
    spd,
)

X, Y = classification()
WEIGHTS = {(HIDDEN, HIDDEN), (HIDDEN // 2, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)}


def test_quadratic() -> None:
    a, x, y = spd(7), random(3).requires_grad_(), random(4).requires_grad_()
    z = torch.cat([x, y])

    def loss() -> Tensor:
        z = torch.cat([x, y])
        return 0.5 * z @ a @ z + z.sum()

    v = random(7, seed=2)
    assert relative_error(hessian_vector_product(loss, [x, y], v), a @ v) < 1e-14
    assert not bool(hessian_vector_product(z.sum, [x, y], v).any())  # a linear loss


def test_logistic_regression() -> None:
    w, t = random(3, seed=1).requires_grad_(), (Y > 0).double()
    p = torch.sigmoid(X @ w).detach()
    exact = X.T @ ((p * (1 - p))[:, None] * X) / len(X)

    def loss(rows: slice) -> Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(X[rows] @ w, t[rows])

    found = HessianOperator(loss, [w], [slice(0, 5), slice(5, 7)], weights=[5, 2])
    assert relative_error(found.dense(), exact) < 1e-10


def test_softmax_regression() -> None:
    w = random(3, 3, seed=1).requires_grad_()
    p = (X @ w.T).softmax(1).detach()
    exact = sum(torch.kron(q.diag() - q.outer(q), x.outer(x)) for q, x in zip(p, X, strict=True)) / len(X)
    found = HessianOperator(lambda rows: cross_entropy(rows @ w.T, Y), [w], [X]).dense()
    assert relative_error(found, torch.as_tensor(exact)) < 1e-10


def test_network_against_one_backward_pass_for_each_entry_of_the_gradient() -> None:
    model = MLP()
    parameters = list(model.parameters())
    loss = cross_entropy(model(X), Y)
    grads = torch.autograd.grad(loss, parameters, create_graph=True)
    exact = explicit_gradients(torch.cat([grad.reshape(-1) for grad in grads]), parameters)
    found = HessianOperator(lambda rows: cross_entropy(model(rows), Y), parameters, [X]).dense()
    assert relative_error(found, exact) < 1e-10


def plain_product(twin: Any, v: Tensor) -> Tensor:
    """Double backward through all batches at once, written out for float64."""
    parameters, parts = list(trainable(twin).values()), batches()
    loss = sum(answer_loss(twin, part) * part.tokens for part in parts) / sum(part.tokens for part in parts)
    grads = torch.autograd.grad(torch.as_tensor(loss), parameters, create_graph=True)
    along = torch.stack([(g * p).sum() for g, p in zip(grads, unflatten(v, parameters), strict=True)]).sum()
    return torch.cat([piece.reshape(-1) for piece in torch.autograd.grad(along, parameters)])


@pytest.mark.parametrize("training", [True, False])
def test_4bit_model_matches_its_float64_twin_also_after_an_evaluation(training: bool, device: str) -> None:
    model, twin = pair(device)
    v = random(hessian(model, batches(), check=False).size, seed=3).float().to(device)
    model.train(training)
    with torch.no_grad():
        answer_loss(model, batches()[0])
    assert relative_error(hessian(model, batches()).matvec(v), plain_product(twin, v.double())) < 1e-6
    model.train(False)


def test_batching_does_not_matter_and_a_layers_hessian_is_its_block() -> None:
    _, twin = pair()
    whole = hessian(twin, batches(size=6))
    v = random(whole.size, seed=3)
    exact = whole.matvec(v)
    assert relative_error(hessian(twin, batches(size=2)).matvec(v), exact) < 1e-10
    assert relative_error(hessian(twin, batches(size=6), rows=4).matvec(v), exact) < 1e-10
    parameters = trainable(twin)
    where = flatten({name: torch.full_like(p, "layers.1" in name) for name, p in parameters.items()}).bool()
    layer = {name: p for name, p in parameters.items() if "layers.1" in name}
    inside = torch.zeros_like(v)
    inside[where] = v[where]
    block = hessian(twin, batches(size=6), layer).matvec(v[where])
    assert relative_error(block, whole.matvec(inside)[where]) < 1e-10


def test_no_dequantised_weight_is_kept_and_rows_bound_the_memory() -> None:
    model, (batch,) = pair()[0], batches(6, 6)
    peaks = {}
    for rows in (None, 2):
        with SavedTensors(model) as saved:
            operator = hessian(model, [batch], rows=rows, check=False)
            operator.matvec(random(operator.size).float())
        assert not saved.shapes & WEIGHTS
        peaks[rows] = saved.peak
    with SavedTensors(model) as first_order:
        torch.autograd.grad(answer_loss(model, batch), list(trainable(model).values()))
    assert peaks[2] < 1.05 * first_order.peak < peaks[None] < 3 * first_order.peak
    plain = nf4_llama(installed=False)  # the fault: bitsandbytes' own product
    with SavedTensors(plain) as saved:
        hessian(plain, [batch], check=False).matvec(random(operator.size).float())
    assert saved.shapes & WEIGHTS


def test_unsound_models_are_refused() -> None:
    parts = batches()
    with pytest.raises(CurvlibError, match="attention is 'sdpa'"):
        hessian(add_lora(llama(attn_implementation="sdpa")), parts)
    with pytest.raises(CurvlibError, match=r"is 4-bit but not differentiable twice: call curvlib.nf4.install"):
        hessian(nf4_llama(installed=False), parts)
    dropout = add_lora(llama(attention_dropout=0.1))
    hessian(dropout, parts)
    with pytest.raises(CurvlibError, match="applies dropout"):
        hessian(dropout.train(), parts)
    with pytest.raises(CurvlibError, match=r"q_proj' is DoRA"):
        hessian(add_lora(llama(), use_dora=True), parts)
    noisy = add_lora(llama(), dropout=0.2)
    with pytest.raises(CurvlibError, match=r"lora_dropout.* applies dropout"):
        hessian(noisy.train(), parts)


def test_checkpointing_is_exact_without_and_refused_with_reentrance() -> None:
    model = add_lora(llama())
    exact = hessian(model, batches())
    v = random(exact.size).float()
    expected = exact.matvec(v)
    for reentrant in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers 5.23 renamed the method
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()
        if reentrant:
            with pytest.raises(CurvlibError, match="uses reentrant checkpointing"):
                hessian(model, batches())
        else:
            assert relative_error(hessian(model, batches()).matvec(v), expected) < 1e-5
