"""Gauss–Newton products: closed forms, explicit Jacobians, the 4-bit model against its twin, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from curvlib.batches import answer_logits, answer_loss
from curvlib.curvature import ggn as module
from curvlib.curvature.ggn import GGNOperator, SquaredErrorGGN, ggn, softmax_hessian_product
from curvlib.curvature.hessian import HessianOperator
from curvlib.parameters import flatten, trainable, unflatten
from tests.cases import MLP, SavedTensors, batches, classification, explicit_gradients, pair, random, relative_error
from tests.curvature.test_hessian import WEIGHTS

X, Y = classification()


def softmax_hessians(logits: Tensor) -> Tensor:
    """(N, V, V): diag(p) - p pᵀ of each row, as matrices."""
    p = logits.detach().softmax(1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None]


def test_softmax_hessian_in_rows_of_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    z, t = random(5, 4), random(5, 4, seed=1)
    exact = (softmax_hessians(z) @ t[:, :, None])[:, :, 0] / 5
    for chunk in (1, 9, 1000):  # logits a chunk: one row, two rows, all
        monkeypatch.setattr(module, "CHUNK", chunk)
        torch.testing.assert_close(softmax_hessian_product(z, t), exact)


def test_softmax_hessian_in_float32_of_sure_rows_over_a_vocabulary() -> None:
    z, t = random(3, 50_000), random(3, 50_000, seed=1) + 30
    z[[0, 1], [7, 9]] += torch.tensor([20.0, 12.0], dtype=z.dtype)  # probabilities 0.9998 and 0.66
    exact = softmax_hessian_product(z, t)
    assert relative_error(softmax_hessian_product(z.float(), t.float()).double(), exact) < 3e-6


def test_softmax_regression_is_its_own_hessian() -> None:
    w = random(3, 3, seed=1).requires_grad_()
    found = GGNOperator(lambda rows: rows @ w.T, [w], [X]).dense()
    exact = HessianOperator(lambda rows: cross_entropy(rows @ w.T, Y), [w], [X]).dense()
    assert relative_error(found, exact) < 1e-10


def test_network_against_explicit_jacobians() -> None:
    model = MLP()
    parameters = list(model.parameters())
    jacobian = explicit_gradients(model(X), parameters).view(len(X), 3, -1)
    exact = torch.einsum("nap,nab,nbq->pq", jacobian, softmax_hessians(model(X)), jacobian) / len(X)
    found = GGNOperator(model, parameters, [X[:5], X[5:]], weights=[5, 2]).dense()
    assert relative_error(found, exact) < 1e-10
    assert float(torch.linalg.eigvalsh(found)[0]) > -1e-12


def test_linear_least_squares_is_its_own_hessian() -> None:
    w, target = random(3, 3, seed=1).requires_grad_(), random(7, 3, seed=2)
    found = SquaredErrorGGN(lambda rows: rows @ w.T, [w], [X]).dense()
    exact = HessianOperator(lambda rows: mse_loss(rows @ w.T, target), [w], [X]).dense()
    assert relative_error(found, exact) < 1e-10


def test_squared_error_of_a_network_against_explicit_jacobians() -> None:
    model = MLP()
    parameters = list(model.parameters())
    jacobian = explicit_gradients(model(X), parameters)
    exact = 2 / len(jacobian) * jacobian.T @ jacobian
    found = SquaredErrorGGN(model, parameters, [X[:5], X[5:]], weights=[5, 2]).dense()
    assert relative_error(found, exact) < 1e-10
    bent = HessianOperator(lambda rows: mse_loss(model(rows), torch.zeros(7, 3, dtype=X.dtype)), parameters, [X])
    assert relative_error(found, bent.dense()) > 1e-2  # away from a perfect fit the Hessian is another matrix


def plain_product(twin: Any, v: Tensor) -> Tensor:
    """Double-vjp for J v and softmax Hessians as matrices: neither forward mode nor the closed form."""
    parameters, parts = list(trainable(twin).values()), batches()
    total = torch.zeros_like(v)
    for part in parts:
        logits = answer_logits(twin, part)
        w = torch.zeros_like(logits, requires_grad=True)
        pulled = torch.autograd.grad(logits, parameters, w, create_graph=True)
        along = torch.stack([(g * p).sum() for g, p in zip(pulled, unflatten(v, parameters), strict=True)]).sum()
        (j_v,) = torch.autograd.grad(along, w, retain_graph=True)
        u = (softmax_hessians(logits) @ j_v[:, :, None])[:, :, 0]
        total += flatten(torch.autograd.grad(logits, parameters, u))
    return total / sum(part.tokens for part in parts)


@pytest.mark.parametrize("training", [True, False])
def test_4bit_model_matches_its_float64_twin_also_after_an_evaluation(training: bool, device: str) -> None:
    model, twin = pair(device)
    v = random(ggn(model, batches(), check=False).size, seed=3).float().to(device)
    model.train(training)
    with torch.no_grad():
        answer_loss(model, batches()[0])
    before = flatten(trainable(model))
    found = ggn(model, batches()).matvec(v)
    assert relative_error(found, plain_product(twin, v.double())) < 1e-6
    assert torch.equal(flatten(trainable(model)), before)
    model.train(False)


def test_no_dequantised_weight_is_kept_and_memory_is_first_order() -> None:
    model, (batch,) = pair()[0], batches(6, 6)
    operator = ggn(model, [batch], check=False)
    with SavedTensors(model) as saved:
        operator.matvec(random(operator.size).float())
    with SavedTensors(model) as first_order:
        torch.autograd.grad(answer_loss(model, batch), list(trainable(model).values()))
    assert not saved.shapes & WEIGHTS
    assert 0 < saved.peak <= 1.05 * first_order.peak


def test_an_error_inside_leaves_no_tangent_behind() -> None:
    w = random(3, 3, seed=1).requires_grad_()

    def fail(_: Tensor) -> Tensor:
        raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            GGNOperator(fail, [w], [X], check=False).matvec(random(9))
    torch.testing.assert_close(w.detach(), random(3, 3, seed=1), rtol=0, atol=0)
    GGNOperator(lambda rows: rows @ w.T, [w], [X])
