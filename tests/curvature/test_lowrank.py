"""The low-rank Fisher matrix against dense algebra, and its expectation against the Gauss-Newton matrix."""

from __future__ import annotations

import pytest
import torch

from curvlib.curvature.ggn import ggn
from curvlib.curvature.lowrank import LowRankOperator, sampled_fisher
from curvlib.errors import CurvlibError
from tests import cases

ROWS = cases.random(4, 9)


def test_products_and_inverse_are_those_of_the_dense_matrix() -> None:
    operator, v = LowRankOperator(ROWS), cases.random(9, seed=1)
    dense = ROWS.T @ ROWS
    assert cases.relative_error(operator.matvec(v), dense @ v) < 1e-14
    solved = torch.linalg.solve(dense + 0.3 * torch.eye(9, dtype=torch.float64), v)
    assert cases.relative_error(operator.inverse(0.3).matvec(v), solved) < 1e-12
    assert operator.scale == pytest.approx(float(torch.linalg.eigvalsh(dense)[-4:].mean()))


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan")])
def test_no_inverse_without_damping(damping: float) -> None:
    with pytest.raises(CurvlibError, match="expected a positive number"):
        LowRankOperator(ROWS).inverse(damping)


def test_sampled_fisher_estimates_the_gauss_newton_matrix() -> None:
    model, batches = cases.pair()[0], cases.batches(3)
    fisher, exact = sampled_fisher(model, batches, samples=600, seed=0), ggn(model, batches)
    v = cases.random(exact.size, dtype=torch.float32)
    form = float(v @ exact.matvec(v))
    shares = (fisher.rows @ v).square()
    error = float(shares.std() * len(shares) ** 0.5)  # of the sum over the rows
    assert abs(float(v @ fisher.matvec(v)) - form) < 4 * error
    assert error < 0.1 * form  # so that a wrong scale would be seen


def test_the_seed_decides_the_labels() -> None:
    model, batches = cases.pair()[0], cases.batches(2)
    first, again, other = (sampled_fisher(model, batches, seed=seed).rows for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
