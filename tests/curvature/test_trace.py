"""Trace and diagonal estimates against closed forms, dense matrices and their own standard errors."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean, stdev

import pytest
import torch
from torch import Tensor

from curvlib.curvature.operator import DenseOperator
from curvlib.curvature.trace import Estimate, diagonal, hutch_plus_plus, hutchinson, layer_traces, xtrace
from curvlib.errors import CurvlibError

Estimator = Callable[..., Estimate]
ESTIMATORS: list[Estimator] = [hutchinson, hutch_plus_plus, xtrace]


def matrix(size: int, decay: float) -> Tensor:
    """Symmetric, float64, eigenvalues exp(-decay i); every third is -0.5 for decay 0."""
    generator = torch.Generator().manual_seed(1234)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    values = torch.exp(-decay * torch.arange(size, dtype=torch.float64))
    if decay == 0:
        values[::3] = -0.5
    result: Tensor = basis @ values.diag() @ basis.T
    return result


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_unbiased_with_an_honest_standard_error(estimator: Estimator, decay: float) -> None:
    a = matrix(60, decay)
    runs = [estimator(DenseOperator(a), 24, seed=seed) for seed in range(200)]
    values = [run.value for run in runs]
    assert abs(mean(values) - float(a.trace())) < 4 * stdev(values) / 200**0.5
    told = mean(run.standard_error**2 for run in runs) ** 0.5
    assert 0.6 < told / stdev(values) < 1.8
    assert {run.products for run in runs} == {24}


def test_hutchinson_has_the_variance_of_its_closed_form() -> None:
    a = matrix(30, 0.1)
    values = [hutchinson(DenseOperator(a), 4, seed=seed).value for seed in range(500)]
    expected = 2 * float(a.square().sum() - a.diagonal().square().sum()) / 4
    assert stdev(values) ** 2 == pytest.approx(expected, rel=0.25)


def test_range_methods_win_where_the_spectrum_decays() -> None:
    a = matrix(100, 0.3)
    errors = {
        estimator.__name__: mean(
            abs(estimator(DenseOperator(a), 48, seed=s).value - float(a.trace())) for s in range(20)
        )
        for estimator in ESTIMATORS
    }
    assert errors["hutch_plus_plus"] < 0.05 * errors["hutchinson"]
    assert errors["xtrace"] < 0.2 * errors["hutch_plus_plus"]


@pytest.mark.parametrize("estimator", [hutch_plus_plus, xtrace])
@pytest.mark.parametrize("rank", [0, 3])
def test_low_rank_is_exact(estimator: Estimator, rank: int) -> None:
    columns = torch.randn(40, rank, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = estimator(DenseOperator(columns @ columns.T), 24)
    assert found.value == pytest.approx(float(columns.square().sum()), abs=1e-9)
    assert found.standard_error < 1e-9


@pytest.mark.parametrize("estimator", [hutch_plus_plus, xtrace])
def test_more_products_than_rows_is_exact(estimator: Estimator) -> None:
    a = matrix(4, 0.5)
    assert estimator(DenseOperator(a), 30).value == pytest.approx(float(a.trace()), abs=1e-12)


def test_layer_traces_add_up_and_match_their_blocks() -> None:
    a = matrix(30, 0.1)
    layers = {"first": slice(0, 10), "second": slice(10, 30)}
    found = layer_traces(DenseOperator(a), layers, 2000)
    for name, where in layers.items():
        assert abs(found[name].value - float(a[where, where].trace())) < 4 * found[name].standard_error
    whole = hutchinson(DenseOperator(a), 2000)
    assert whole.value == pytest.approx(sum(layer.value for layer in found.values()))


def test_diagonal_within_its_standard_error() -> None:
    a = matrix(30, 0.1)
    found = diagonal(DenseOperator(a), 2000)
    scores = (found.values - a.diagonal()) / found.standard_error
    assert 0.6 < float(scores.std()) < 1.5
    assert float(scores.abs().max()) < 4.5
    closed = ((a.square().sum(dim=1) - a.diagonal().square()) / 2000).sqrt()
    torch.testing.assert_close(found.standard_error, closed, rtol=0.1, atol=0)
    few = torch.stack([diagonal(DenseOperator(a), 3, seed=seed).standard_error.square() for seed in range(300)])
    torch.testing.assert_close(few.mean(dim=0), closed.square() * (2000 / 3), rtol=0.3, atol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_seeded_and_free_of_global_state(estimator: Estimator) -> None:
    operator, state = DenseOperator(matrix(20, 0.1)), torch.get_rng_state()
    assert estimator(operator, 12, seed=3) == estimator(operator, 12, seed=3)
    assert estimator(operator, 12, seed=3) != estimator(operator, 12, seed=4)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("estimator", [*ESTIMATORS, diagonal])
def test_too_few_products_are_refused(estimator: Estimator) -> None:
    with pytest.raises(CurvlibError, match="need at least"):
        estimator(DenseOperator(matrix(5, 0.1)), 1)
