"""Fused layers against autograd: first and second derivatives, what is left alone, and what is put back."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from curvlib.batches import answer_loss
from curvlib.curvature import fused as fused_module
from curvlib.curvature import units
from curvlib.curvature.fused import fused
from curvlib.curvature.live import LiveTensors
from curvlib.parameters import flatten, trainable
from tests import cases


def derivatives(model: Any, batch: Any, v: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient, and its derivative along v."""
    parameters = list(trainable(model).values())
    grads = torch.autograd.grad(answer_loss(model, batch), parameters, create_graph=True)
    first = torch.cat([grad.reshape(-1) for grad in grads])
    return first.detach(), flatten(torch.autograd.grad(first @ v, parameters))


def test_a_language_model_has_the_same_derivatives_and_keeps_less() -> None:
    model, batch = cases.pair()[0], cases.batches()[0]
    v = cases.random(sum(p.numel() for p in trainable(model).values())).float()
    calls = []
    plain = fused_module._adapted
    with LiveTensors() as before:
        exact = derivatives(model, batch, v)
    try:
        fused_module._adapted = lambda *given: (calls.append(given), plain(*given))[1]  # type: ignore[assignment]
        with LiveTensors() as after, fused(model):
            found = derivatives(model, batch, v)
    finally:
        fused_module._adapted = plain
    assert len(calls) == sum("lora_A" in name for name in trainable(model))
    assert after.retained < before.retained
    for one, other in zip(found, exact, strict=True):
        assert cases.relative_error(one, other) < 1e-5
    assert not any("forward" in vars(module) and "lora" in type(module).__module__ for module in model.modules())


def test_watched_layers_tell_what_their_maps_read_and_receive() -> None:
    model, batch = cases.pair()[0], cases.batches()[0]
    weights = {name: weight for name, weight in trainable(model).items() if "lora_" in name}
    exact = torch.autograd.grad(answer_loss(model, batch), list(weights.values()))
    found: dict[int, Tensor] = {}

    def watch(layer: torch.nn.Linear, a: Tensor, g: Tensor) -> None:
        assert id(layer.weight) not in found
        found[id(layer.weight)] = g.flatten(0, 1).T @ a.flatten(0, 1)

    with fused(model, watch):
        loss = answer_loss(model, batch)
    none = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    assert all(grad is None for grad in none)
    for weight, grad in zip(weights.values(), exact, strict=True):
        assert cases.relative_error(found[id(weight)], grad) < 1e-5


def test_numeric_derivatives_of_an_adapted_layer_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = cases.random(4, 5)
    product = lambda x, _, transposed=False: x @ (weight if transposed else weight.T)  # noqa: E731
    monkeypatch.setattr(fused_module, "transposable_matmul", product)
    x, a, b = (cases.random(*shape, seed=shape[0]).requires_grad_() for shape in ((3, 5), (2, 5), (4, 2)))
    layer = lambda x, a, b: fused_module._Adapted.apply(x, a, b, None, 0.5)  # noqa: E731
    torch.testing.assert_close(layer(x, a, b), x @ weight.T + 0.5 * (x @ a.T) @ b.T)
    assert torch.autograd.gradcheck(layer, (x, a, b))
    assert torch.autograd.gradgradcheck(layer, (x, a, b))
    assert torch.autograd.gradgradcheck(layer, (x.detach(), a, b))


def test_numeric_derivatives_of_a_norm_agree() -> None:
    x, weight = cases.random(2, 5).requires_grad_(), cases.random(5, seed=1)
    plain = lambda x: weight * (x * (x.pow(2).mean(-1, keepdim=True) + 0.1).rsqrt())  # noqa: E731
    norm = lambda x: units._Norm.apply(x, weight, 0.1)  # noqa: E731
    torch.testing.assert_close(norm(x), plain(x))
    assert torch.autograd.gradcheck(norm, (x,))
    assert torch.autograd.gradgradcheck(norm, (x,))


def test_numeric_derivatives_of_a_gated_unit_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "CHUNK", 4)
    x, u = (cases.random(2, 5, seed=seed).requires_grad_() for seed in (0, 1))
    gated = lambda x, u: units._Gated.apply(x, u)  # noqa: E731
    torch.testing.assert_close(gated(x, u), torch.nn.functional.silu(x) * u)
    assert torch.autograd.gradcheck(gated, (x, u))
    assert torch.autograd.gradgradcheck(gated, (x, u))


@pytest.mark.parametrize("change", ["disabled", "two adapters", "16 bits", "dense"])
def test_what_has_another_form_is_left_alone(change: str) -> None:
    model: Any = cases.llama() if change == "dense" else cases.nf4_llama()
    if change == "two adapters":
        model.add_adapter("other", model.peft_config["default"])
        model.base_model.set_adapter(["default", "other"])
    if change == "16 bits":
        model.to(torch.bfloat16)
    with model.disable_adapter() if change == "disabled" else nullcontext(), fused(model):
        own = {name: vars(module).get("forward") for name, module in model.named_modules()}
        replaced = [name for name, call in own.items() if getattr(call, "func", None) is fused_module._adapted]
    assert replaced == []
