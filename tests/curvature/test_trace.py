"""Trace estimates of layers against closed forms, dense matrices and their own standard errors."""

from __future__ import annotations

from statistics import mean, stdev

import pytest
import torch
from torch import Tensor

from curvlib.curvature.operator import DenseOperator
from curvlib.curvature.trace import Estimate, layer_traces
from curvlib.errors import CurvlibError

WHOLE = {"all": slice(None)}


def matrix(size: int, decay: float) -> Tensor:
    """Symmetric, float64, eigenvalues exp(-decay i); every third is -0.5 for decay 0."""
    generator = torch.Generator().manual_seed(1234)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    values = torch.exp(-decay * torch.arange(size, dtype=torch.float64))
    if decay == 0:
        values[::3] = -0.5
    result: Tensor = basis @ values.diag() @ basis.T
    return result


def traced(a: Tensor, probes: int, seed: int = 0) -> Estimate:
    return layer_traces(DenseOperator(a), WHOLE, probes, seed=seed)["all"]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_unbiased_with_an_honest_standard_error(decay: float) -> None:
    a = matrix(60, decay)
    runs = [traced(a, 24, seed) for seed in range(200)]
    values = [run.value for run in runs]
    assert abs(mean(values) - float(a.trace())) < 4 * stdev(values) / 200**0.5
    told = mean(run.standard_error**2 for run in runs) ** 0.5
    assert 0.6 < told / stdev(values) < 1.8
    assert {run.products for run in runs} == {24}


def test_the_variance_is_that_of_the_closed_form() -> None:
    a = matrix(30, 0.1)
    values = [traced(a, 4, seed).value for seed in range(500)]
    expected = 2 * float(a.square().sum() - a.diagonal().square().sum()) / 4
    assert stdev(values) ** 2 == pytest.approx(expected, rel=0.25)


def test_layers_add_up_and_match_their_blocks() -> None:
    a = matrix(30, 0.1)
    layers = {"first": slice(0, 10), "second": slice(10, 30)}
    found = layer_traces(DenseOperator(a), layers, 2000)
    for name, where in layers.items():
        assert abs(found[name].value - float(a[where, where].trace())) < 4 * found[name].standard_error
    assert traced(a, 2000).value == pytest.approx(sum(layer.value for layer in found.values()))


def test_seeded_and_free_of_global_state() -> None:
    a, state = matrix(20, 0.1), torch.get_rng_state()
    assert traced(a, 12, 3) == traced(a, 12, 3) != traced(a, 12, 4)
    assert torch.equal(state, torch.get_rng_state())


def test_a_single_product_has_no_standard_error() -> None:
    with pytest.raises(CurvlibError, match="need at least 2"):
        traced(matrix(5, 0.1), 1)
