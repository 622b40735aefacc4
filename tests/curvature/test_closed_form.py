"""Closed forms against torch's own derivatives, what they keep, what is left alone, and what is put back."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, silu, softmax

from curvlib.batches import answer_loss
from curvlib.curvature.closed_form import ClosedForm, functions, fused, layers
from curvlib.curvature.memory import LiveTensors
from curvlib.parameters import flatten, trainable
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


def test_a_loss_on_logits_keeps_less() -> None:
    x, targets = cases.random(300, 40).requires_grad_(), torch.arange(300) % 40

    def product() -> None:
        value = cross_entropy(softmax(x, dim=-1), targets)
        (first,) = torch.autograd.grad(value, x, create_graph=True)
        torch.autograd.grad(first, x, torch.ones_like(x))

    with LiveTensors() as plain:
        product()
    with LiveTensors() as closed, ClosedForm():
        product()
    assert closed.retained < 0.9 * plain.retained


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
    plain = layers._adapted
    with LiveTensors() as before:
        exact = derivatives(model, batch, v)
    try:
        layers._adapted = lambda *given: (calls.append(given), plain(*given))[1]  # type: ignore[assignment]
        with LiveTensors() as after, ClosedForm(), fused(model):
            found = derivatives(model, batch, v)
    finally:
        layers._adapted = plain
    assert len(calls) == sum("lora_A" in name for name in trainable(model))
    assert after.retained < 0.85 * before.retained
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
    monkeypatch.setattr(layers, "transposable_matmul", product)
    x, a, b = (cases.random(*shape, seed=shape[0]).requires_grad_() for shape in ((3, 5), (2, 5), (4, 2)))
    layer = layers.Adapted(SimpleNamespace(compute_dtype=None), 0.5, inward=True)  # type: ignore[arg-type]
    torch.testing.assert_close(layer(x, a, b), x @ weight.T + 0.5 * (x @ a.T) @ b.T)
    assert torch.autograd.gradcheck(layer, (x, a, b))
    assert torch.autograd.gradgradcheck(layer, (x, a, b))
    first = layers.Adapted(SimpleNamespace(compute_dtype=None), 0.5, inward=False)  # type: ignore[arg-type]
    assert torch.autograd.gradgradcheck(first, (x.detach(), a, b))


def test_numeric_derivatives_of_a_norm_agree() -> None:
    x, weight = cases.random(2, 5).requires_grad_(), cases.random(5, seed=1)
    plain = lambda x: weight * (x * (x.pow(2).mean(-1, keepdim=True) + 0.1).rsqrt())  # noqa: E731
    norm = lambda x: functions.Norm()(x, weight, 0.1)  # noqa: E731
    torch.testing.assert_close(norm(x), plain(x))
    assert torch.autograd.gradcheck(norm, (x,))
    assert torch.autograd.gradgradcheck(norm, (x,))


def test_numeric_derivatives_of_a_gated_unit_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "CHUNK", 4)
    x, u = (cases.random(2, 5, seed=seed).requires_grad_() for seed in (0, 1))
    gated = functions.Gated()
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
        replaced = [name for name, call in own.items() if getattr(call, "func", None) is layers._adapted]
    assert replaced == []
