"""Counted bytes against closed forms and saved-tensor hooks; forecasts against what is then measured."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvlib import nf4
from curvlib.batches import answer_loss
from curvlib.curvature.fisher import fisher
from curvlib.curvature.forward import flat_gradient
from curvlib.curvature.ggn import ggn
from curvlib.curvature.hessian import hessian
from curvlib.curvature.memory import LiveTensors, MemoryForecast, device_peak, forecast_memory, storage_key
from curvlib.errors import CurvlibError
from curvlib.parameters import trainable
from tests.cases import SavedTensors, add_lora, batches, llama, nf4_llama, pair, quantise, random

KINDS: dict[str, Any] = {
    "gradient": "gradient",
    "hessian": hessian,
    "hessian in parts": partial(hessian, rows=2),
    "ggn": ggn,
    "fisher": fisher,
}
(BATCH,) = batches(6, 6)
BYTES = 4000  # of a thousand float32 numbers


@cache
def told(kind: str) -> MemoryForecast:
    """The forecast for the 4-bit model."""
    return forecast_memory(pair()[0], KINDS[kind], BATCH)


def measured(model: nn.Module, kind: Any) -> LiveTensors:
    """The product or gradient itself, its vector made before."""
    if isinstance(kind, str):
        targets = list(trainable(model).values())
        work: Callable[[], object] = lambda: flat_gradient(answer_loss(model, BATCH), targets)  # noqa: E731  for mypy
    else:
        operator = kind(model, [BATCH], check=False)
        work = partial(operator.matvec, random(operator.size).to(operator.dtype))
    with LiveTensors() as live:
        work()
    return live


def numbers(counted: MemoryForecast | LiveTensors) -> tuple[int, int, int]:
    return counted.peak, counted.retained, counted.retained_weights


@pytest.mark.parametrize("kind", KINDS)
def test_forecast_of_the_4bit_model_is_what_is_measured(kind: str) -> None:
    model = pair()[0]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    assert numbers(told(kind)) == numbers(measured(model, KINDS[kind]))
    assert told(kind).retained_weights == 0
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_forecast_of_a_dense_model_is_what_is_measured(kind: str) -> None:
    model = llama().double()
    assert numbers(forecast_memory(model, KINDS[kind], BATCH)) == numbers(measured(model, KINDS[kind]))


def test_weights_and_vector_are_counted_by_hand() -> None:
    model = pair()[0]
    layers = [layer.weight.numel() for layer in nf4.four_bit_layers(model).values()]
    # two weights a byte; one byte for the scale of 64; float32 for each 256 scales, their offset, 16 + 256 levels
    packed = sum(size + 2 * size // 64 + 4 * (1 + 1 + 16 + 256) for size in layers)
    dense = sum(p.nbytes for p in model.parameters() if p.dtype == torch.float32)
    assert told("ggn").weights == packed + dense + sum(b.nbytes for b in model.buffers())
    assert told("ggn").vector == 4 * sum(p.numel() for p in trainable(model).values())
    assert told("gradient").vector == 0
    assert told("ggn").total == told("ggn").weights + told("ggn").vector + told("ggn").peak
    assert str(MemoryForecast(2**20, 2**20, 3 * 2**20, 2**21, 0)).startswith("5 MiB in all: weights 1, vector 1.0")


def test_a_made_operator_tells_the_same_and_half_the_batch_about_half() -> None:
    made = forecast_memory(pair()[0], ggn(pair()[0], batches(), check=False), BATCH)
    assert made.retained == told("ggn").retained
    assert told("ggn").peak - told("ggn").vector <= made.peak <= told("ggn").peak  # no sum over batches
    assert forecast_memory(pair()[0], ggn, BATCH.rows(0, 3)).peak < 0.7 * told("ggn").peak


def test_plain_double_backward_keeps_every_weight_that_gradients_pass() -> None:
    plain = nf4_llama(installed=False).train()
    stopped = {f"layers.0.self_attn.{name}_proj" for name in "qkv"}  # no gradient goes on into the embedding
    kept = sum(
        4 * layer.in_features * layer.out_features
        for name, layer in nf4.four_bit_layers(plain).items()
        if not any(part in name for part in stopped)
    )
    assert forecast_memory(plain, hessian, BATCH).retained_weights == kept
    assert measured(plain, hessian).retained_weights == kept
    with pytest.raises(CurvlibError, match="repacks itself in eval"):
        forecast_memory(plain.eval(), hessian, BATCH)


@pytest.mark.parametrize("kind", ["hessian in parts", "ggn", "fisher"])
def test_a_product_needs_one_gradients_memory_and_its_vectors(kind: str) -> None:
    first, product = told("gradient"), told(kind)
    assert product.retained <= 1.05 * first.retained
    assert product.peak <= 1.05 * first.peak + 2 * product.vector  # the product of a part, and the sum over parts
    assert told("hessian").retained > 1.5 * first.retained  # the fault: all chats at once


def test_shapes_that_depend_on_values_are_refused() -> None:
    model = add_lora(llama())
    head: Any = model.get_base_model().lm_head
    head.register_forward_hook(lambda _, args, output: output[:, : int(args[0].sum() > 0) + 99])
    with pytest.raises(CurvlibError, match="depend on its values"):
        forecast_memory(model, ggn, BATCH)


def test_bytes_live_while_a_reference_does_and_views_are_free() -> None:
    x = torch.ones(1000)
    with LiveTensors() as live:
        y = x + 1
        y.view(10, 100).T.add_(1)
        x.mul_(1)
        del y
        z = x + 1
        del z
    assert (live.peak, live.retained) == (BYTES, 0)
    with LiveTensors() as leaking:
        kept = [x + 1 for _ in range(3)]  # the fault: nothing is dropped
    assert leaking.peak == 3 * BYTES
    assert len(kept) == 3


def test_zeros_that_hold_no_memory_are_not_counted() -> None:
    with LiveTensors() as live:
        torch._efficientzerotensor(1000)
    assert live.peak == 0


def test_graphs_are_counted_while_they_live() -> None:
    x = torch.ones(1000, requires_grad=True)
    with LiveTensors() as live:
        for _ in range(3):
            x.exp().sum().backward()  # exp keeps its result
    assert live.retained == BYTES
    with LiveTensors() as live:
        graphs = [x.exp().sum() for _ in range(3)]
    assert live.retained == 3 * BYTES
    assert len(graphs) == 3
    with LiveTensors() as live:
        x.exp().exp().sum()
    assert live.retained == 2 * BYTES


@pytest.mark.parametrize("make", [hessian, ggn, fisher])
def test_graphs_are_those_that_saved_tensor_hooks_see(make: Callable[..., Any]) -> None:
    model, (batch,) = pair()[0], batches(6, 6)
    operator = make(model, [batch], check=False)
    v = random(operator.size).float()
    with SavedTensors(model) as saved:
        operator.matvec(v)
    with LiveTensors() as live:
        operator.matvec(v)
    assert live.retained == saved.peak
    assert live.peak > live.retained
    assert live.retained_weights == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dequantised_weight_is_known_in_another_format_too(dtype: torch.dtype) -> None:
    parent = nn.Sequential(nn.Linear(64, 192))
    quantise(parent)
    x = torch.ones(5, 64, dtype=dtype, requires_grad=True)

    def retained(multiply: Callable[[Tensor], Tensor]) -> int:
        with LiveTensors() as live:
            y = multiply(x)
            del y
        return live.retained_weights

    plain = parent[0]
    assert retained(lambda x: x @ nf4.dequantise(plain).to(dtype).T) == 64 * 192 * dtype.itemsize
    assert retained(lambda x: nf4.transposable_matmul(x, plain)) == 0
    assert retained(lambda x: x @ torch.ones(64, 192, dtype=dtype)) == 0


def test_a_key_stands_for_the_bytes() -> None:
    x = torch.ones(4)
    assert storage_key(x) == storage_key(x.view(2, 2)) == storage_key(x[1:])
    assert storage_key(x) != storage_key(x.clone())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_device_counts_the_same_up_to_its_rounding() -> None:
    x = torch.ones(1 << 20, device="cuda")
    with LiveTensors() as live:
        x.exp().exp()
    assert device_peak(lambda: x.exp().exp()) == pytest.approx(live.peak, rel=0.01)
