"""Counted bytes against closed forms and against saved-tensor hooks alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvlib import nf4
from curvlib.curvature.fisher import fisher
from curvlib.curvature.ggn import ggn
from curvlib.curvature.hessian import hessian
from curvlib.curvature.live import LiveTensors, device_peak, storage_key
from tests.cases import SavedTensors, batches, pair, quantise, random

BYTES = 4000  # of x, float32


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
