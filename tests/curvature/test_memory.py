"""What is forecast against what is then measured, and the bound that products keep."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import nn

from curvlib import nf4
from curvlib.batches import answer_loss
from curvlib.curvature.fisher import fisher
from curvlib.curvature.forward import flat_gradient
from curvlib.curvature.ggn import ggn
from curvlib.curvature.hessian import hessian
from curvlib.curvature.live import LiveTensors
from curvlib.curvature.memory import MemoryForecast, forecast_memory
from curvlib.errors import CurvlibError
from curvlib.parameters import trainable
from tests.cases import add_lora, batches, llama, nf4_llama, pair, random

KINDS: dict[str, Any] = {
    "gradient": "gradient",
    "hessian": hessian,
    "hessian in parts": partial(hessian, rows=2),
    "ggn": ggn,
    "fisher": fisher,
}
(BATCH,) = batches(6, 6)


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
