"""The closed forms against torch's own derivatives in float64, and what they keep."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, silu, softmax

from curvlib.batches import answer_loss
from curvlib.curvature.closed_form import ClosedForm
from curvlib.curvature.forward import flat_gradient
from curvlib.curvature.live import LiveTensors
from curvlib.parameters import trainable
from tests import cases

TARGETS = torch.tensor([0, 3, 1, 1, 2])


def loss(x: Tensor) -> Tensor:
    return cross_entropy(silu(x) * softmax(x, dim=-1), TARGETS)


def test_derivatives_are_torchs_own() -> None:
    x = cases.random(5, 4).requires_grad_()
    v = cases.random(5, 4, seed=1)

    def second() -> tuple[Tensor, Tensor]:
        (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
        return first.detach(), torch.autograd.grad(first, x, v)[0]

    exact = second()
    with ClosedForm():
        found = second()
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert exact[1].abs().max() > 1e-3


def test_numeric_second_derivative_agrees() -> None:
    x = cases.random(5, 4).requires_grad_()
    with ClosedForm():
        assert torch.autograd.gradgradcheck(loss, (x,))


def test_other_calls_are_left_alone() -> None:
    x = cases.random(5, 4).requires_grad_()
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    with ClosedForm():
        assert torch.equal(
            cross_entropy(x, TARGETS, weight=weights), cross_entropy(x.detach(), TARGETS, weight=weights)
        )
        assert cross_entropy(x, TARGETS, reduction="none").shape == (5,)
        assert torch.isclose(cross_entropy(x, TARGETS, reduction="sum"), 5 * cross_entropy(x, TARGETS))
        skipped = torch.where(TARGETS == 1, -100, TARGETS)
        assert cross_entropy(x, skipped, ignore_index=-100).isfinite()
        assert torch.equal(softmax(x, dim=0), softmax(x.detach(), dim=0))
        assert torch.equal(softmax(input=x, dim=-1), softmax(x.detach(), dim=-1))
        assert softmax(x, dim=-1, dtype=torch.float32).dtype == torch.float32


def test_a_language_models_product_keeps_less() -> None:
    model, batch = cases.pair()[0], cases.batches()[0]
    parameters = list(trainable(model).values())
    v = cases.random(sum(p.numel() for p in parameters), dtype=torch.float32)

    def product() -> Tensor:
        first = flat_gradient_with_graph()
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(first @ v, parameters)])

    def flat_gradient_with_graph() -> Tensor:
        grads = torch.autograd.grad(answer_loss(model, batch), parameters, create_graph=True)
        return torch.cat([grad.reshape(-1) for grad in grads])

    with LiveTensors() as plain:
        exact = product()
    with LiveTensors() as closed, ClosedForm():
        found = product()
    assert cases.relative_error(found, exact) < 1e-5
    assert closed.retained < 0.9 * plain.retained
    assert flat_gradient(answer_loss(model, batch), parameters).shape == found.shape
