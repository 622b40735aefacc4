"""Forward-mode derivatives against explicit Jacobians, and what they cost at frozen layers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from curvlib.curvature.forward import (
    FrozenLinear,
    jacobian_vector_product,
    tangent_of,
    tangents,
    vector_jacobian_product,
)
from tests.cases import MLP, classification, explicit_gradients, random, relative_error

X, _ = classification()


class Matmuls(TorchDispatchMode):
    """Count matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() in ("aten::mm", "aten::addmm", "aten::bmm")
        return func(*args, **(kwargs or {}))


def network(frozen: bool) -> tuple[nn.Module, list[Tensor]]:
    """The small classifier; its last layer with or without training."""
    model = MLP()
    model.layers[2].requires_grad_(not frozen)
    return model, [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("x", [X, X.view(7, 1, 3).expand(7, 2, 3)], ids=["matrix", "sequence"])
def test_both_products_match_the_explicit_jacobian(frozen: bool, x: Tensor) -> None:
    model, parameters = network(frozen)
    jacobian = explicit_gradients(model(x), parameters)
    v, u = random(jacobian.shape[1]), random(*model(x).shape, seed=1)
    value, along = jacobian_vector_product(lambda: model(x), parameters, v)
    torch.testing.assert_close(value, model(x).detach())
    assert relative_error(along.flatten(), jacobian @ v) < 1e-12
    assert relative_error(vector_jacobian_product(lambda: model(x), parameters, u), u.flatten() @ jacobian) < 1e-12


@pytest.mark.parametrize(
    ("frozen", "mode", "products"), [(True, FrozenLinear, 2), (True, nullcontext, 3), (False, FrozenLinear, 3)]
)
def test_a_frozen_layer_costs_two_products(
    frozen: bool, mode: type[AbstractContextManager[Any]], products: int
) -> None:
    model, parameters = network(frozen)
    size = sum(parameter.numel() for parameter in parameters)
    first = model.layers[0](X)
    with torch.no_grad(), tangents(parameters, random(size)), mode():
        hidden = torch.tanh(model.layers[0](X))
        with Matmuls() as counted:
            out = model.layers[2](hidden)
        assert tangent_of(out).any()
    assert counted.count == products
    torch.testing.assert_close(model.layers[0](X), first)


def test_a_value_of_no_parameter_has_no_tangent() -> None:
    model, parameters = network(frozen=True)
    value, along = jacobian_vector_product(lambda: model.layers[2](torch.ones(2, 4).double()), parameters, random(16))
    assert not along.any()
    assert value.shape == along.shape


def test_a_weight_made_of_a_trained_one_keeps_its_tangent() -> None:
    base, delta, x, v = random(3, 4), random(3, 4, seed=1).requires_grad_(), random(2, 4, seed=2), random(12, seed=3)
    value, along = jacobian_vector_product(lambda: torch.nn.functional.linear(x, base + delta), [delta], v)
    torch.testing.assert_close(value, x @ (base + delta).detach().T)
    torch.testing.assert_close(along, x @ v.view(3, 4).T)
    _, both = jacobian_vector_product(lambda: torch.nn.functional.linear(x @ delta.T @ delta, base + delta), [delta], v)
    step = 1e-6 * v.view(3, 4)
    ends = [x @ (delta + s * step).T @ (delta + s * step) @ (base + delta + s * step).T for s in (1, -1)]
    torch.testing.assert_close(both, (ends[0] - ends[1]).detach() / 2e-6, rtol=1e-6, atol=1e-6)
