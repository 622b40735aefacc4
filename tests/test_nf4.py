"""The 4-bit map against its dequantised float64 twin, for derivatives of every kind, in every mode."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate.hooks import SequentialHook, add_hook_to_module  # type: ignore[import-untyped]  # no annotations
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from bitsandbytes.nn.modules import _convert_weight_packed_for_cpu
from torch import Tensor, nn
from torch.func import grad, jvp, vjp, vmap

from curvlib import nf4
from curvlib.errors import CurvlibError
from tests.cases import SavedTensors, quantise, random, relative_error


def layer(device: str = "cpu", *, bias: bool = True) -> Any:
    parent = nn.Sequential(nn.Linear(64, 192, bias=bias))
    with torch.no_grad():
        for number, parameter in enumerate(parent.parameters()):
            parameter.copy_(0.1 * random(*parameter.shape, seed=number))
    quantise(parent)
    nf4.install(parent)
    return parent[0].to(device)


def both(linear: Any) -> tuple[Any, Any]:
    """A scalar function of x through the layer, and the same through its float64 dense weight."""
    weight, bias = nf4.dequantise(linear).double(), linear.bias.double()
    end = random(192, seed=9).to(weight.device)

    def quantised(x: Tensor) -> Tensor:
        return (nn.functional.silu(linear(x)) * end.float()).sum()

    def dense(x: Tensor) -> Tensor:
        return (nn.functional.silu(x @ weight.T + bias) * end).sum()

    return quantised, dense


def derivatives(f: Any, x: Tensor, v: Tensor) -> dict[str, Tensor]:
    along: Any = jvp
    back: Any = vjp
    return {
        "value": f(x),
        "grad": grad(f)(x),
        "jvp": along(f, (x,), (v,))[1],
        "vjp": back(f, x)[1](torch.ones_like(f(x)))[0],
        "grad of grad": grad(lambda x: (grad(f)(x) * v).sum())(x),
        "grad of jvp": grad(lambda x: along(f, (x,), (v,))[1])(x),
        "vmap of grad": vmap(grad(f))(x),
        "vmap of grad, last dimension": vmap(grad(f), in_dims=1)(x.T),
    }


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch 2.13's own, at the first jvp
@pytest.mark.parametrize("training", [True, False])
def test_derivatives_of_every_kind_match_the_dense_twin(device: str, training: bool) -> None:
    linear = layer(device).train(training)
    x, v = (random(5, 64, seed=seed).to(device) for seed in (1, 2))
    quantised, dense = both(linear)
    found, exact = derivatives(quantised, x.float(), v.float()), derivatives(dense, x, v)
    assert {name: error for name in found if (error := relative_error(found[name], exact[name])) > 1e-6} == {}


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_that_of_bitsandbytes(shape: tuple[int, ...], dtype: torch.dtype, bias: bool) -> None:
    linear, x = layer(bias=bias), random(*shape, dtype=dtype)
    ours, theirs = linear(x), Linear4bit.forward(linear, x)
    assert ours.dtype == theirs.dtype == dtype
    torch.testing.assert_close(ours, theirs)


def test_no_weight_is_saved_while_bitsandbytes_saves_it() -> None:
    for installed in (True, False):
        linear = layer()
        x = random(5, 64).float().requires_grad_()
        quantised, _ = both(linear)
        if not installed:
            linear.forward = Linear4bit.forward.__get__(linear)
        with SavedTensors(linear) as saved:
            (first,) = torch.autograd.grad(quantised(x), x, create_graph=True)
            torch.autograd.grad(first.square().sum(), x)
        assert bool(saved.shapes & {(192, 64), (64, 192)}) is not installed


def test_evaluation_does_not_repack_the_weight() -> None:
    """On CPUs with AVX512-BF16, Linear4bit repacks its weight in eval(), and gradients vanish silently."""
    linear = layer().eval()
    linear.support_avx512bf16_for_cpu = True
    before = linear.weight.data.clone()
    with torch.no_grad():
        linear(random(5, 64).float())
    assert torch.equal(linear.weight.data, before)
    x = random(5, 64).float().requires_grad_()
    quantised, dense = both(linear)
    exact = torch.autograd.grad(dense(wide := x.detach().double().requires_grad_()), wide)[0]
    assert relative_error(torch.autograd.grad(quantised(x), x)[0], exact) < 1e-6


def test_a_weight_repacked_before_is_put_back() -> None:
    linear = layer()
    before = nf4.dequantise(linear)
    linear.weight.data, linear.weight.quant_state = _convert_weight_packed_for_cpu(
        linear.weight.data, linear.weight.quant_state
    )
    assert linear.weight.quant_state.packing_format_for_cpu
    nf4.install(linear)
    torch.testing.assert_close(nf4.dequantise(linear), before, rtol=0.01, atol=0.001)  # packing rounds scales to bf16


def test_install_is_reversible_repeatable_and_survives_a_copy() -> None:
    model: Any = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 192))
    quantise(model)
    names = list(model.state_dict())
    with nf4.install(model) as handle:
        nf4.install(model)
        assert all(nf4.is_installed(child) for child in model)
        twin = copy.deepcopy(model)
        twin[0].weight.data.zero_()
        assert twin[0].forward.__self__ is twin[0]
        assert list(model.state_dict()) == names
    assert not any(nf4.is_installed(child) for child in model)
    assert model[0].forward.__func__ is Linear4bit.forward
    handle.remove()
    assert nf4.install(nn.Linear(2, 2)).layers == []


@pytest.mark.parametrize("able", [True, False])
def test_bfloat16_products_round_within_the_block_only_where_the_cpu_can(
    able: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear, x = layer(), random(3, 64).float().requires_grad_()
    exact = linear(x)
    exact_grad = torch.autograd.grad(exact.sum(), x)[0]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able})

    with nf4.bfloat16_products(nn.Sequential(linear)):
        rounded = linear(x)
        rounded_grad = torch.autograd.grad(rounded.sum(), x)[0]

    low, high = (1e-4, 2e-2) if able else (-1, 1e-12)
    assert rounded.dtype == torch.float32
    assert low < relative_error(rounded, exact) < high
    assert low < relative_error(rounded_grad, exact_grad) < high
    assert torch.equal(linear(x), exact)


def dequantisations(linear: Any, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[int, tuple[Tensor, ...]]:
    """How often a product and its gradient dequantise, and both."""
    calls, plain = [], nf4.dequantise
    with monkeypatch.context() as patch:
        patch.setattr(nf4, "dequantise", lambda layer: (calls.append(layer), plain(layer))[1])
        product = linear(x)
        (back,) = torch.autograd.grad((product**2).sum(), x)
    return len(calls), (product, back)


def test_kept_weights_are_dequantised_once_and_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x = layer(), random(3, 64).float().requires_grad_()
    model, before = nn.Sequential(linear), set(vars(linear))
    twice, exact = dequantisations(linear, x, monkeypatch)

    with nf4.kept_weights(model):
        with nf4.kept_weights(model):
            pass  # the inner block takes nothing from the outer one
        never, kept = dequantisations(linear, x, monkeypatch)

    assert (twice, never) == (2, 0)
    assert all(torch.equal(*pair) for pair in zip(kept, exact, strict=True))
    assert set(vars(linear)) == before
    assert "0.weight" in model.state_dict()


def test_large_weights_are_not_kept_and_a_failure_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x = layer(), random(3, 64).float().requires_grad_()
    with pytest.raises(ZeroDivisionError), nf4.kept_weights(nn.Sequential(linear)):
        _ = 1 / 0
    assert dequantisations(linear, x, monkeypatch)[0] == 2
    monkeypatch.setattr(nf4, "KEPT_BYTES", 4 * 64 * 192 - 1)
    with nf4.kept_weights(nn.Sequential(linear)):
        assert dequantisations(linear, x, monkeypatch)[0] == 2


def test_hooks_of_accelerate_stay_in_place() -> None:
    parent = nn.Sequential(nn.Linear(64, 64))
    quantise(parent)
    linear: Any = parent[0]
    hook = SequentialHook()  # does nothing, but takes the place of forward, as on a model spread over devices
    add_hook_to_module(linear, hook)
    outer = linear.forward
    with nf4.install(parent), SavedTensors(linear) as saved:
        x = random(5, 64).float().requires_grad_()
        linear(x).sum().backward()
        assert nf4.is_installed(linear)
    assert saved.shapes == set()
    assert linear.forward is outer
    assert not nf4.is_installed(linear)


def test_what_cannot_be_differentiated_is_refused() -> None:
    with pytest.raises(CurvlibError, match="layer '0' is 8-bit"):
        nf4.install(nn.Sequential(Linear8bitLt(64, 64)))
    make: Any = Linear4bit
    with pytest.raises(CurvlibError, match="not quantised yet"):
        nf4.install(nn.Sequential(make(64, 64)))
