"""Solvers on systems whose solution is known, and on those they must not pretend to solve."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from curvlib.curvature.operator import DenseOperator, DiagonalOperator, FunctionOperator
from curvlib.curvature.solve import (
    LBFGSInverse,
    Solution,
    conjugate_gradient,
    lbfgs,
)
from curvlib.errors import CurvlibError
from tests.cases import random, relative_error, spd

SIZE = 30
A, B = spd(SIZE, condition=50.0), random(SIZE, seed=7)
OPERATOR, INVERSE = DenseOperator(A), torch.linalg.inv(A)
EXACT = INVERSE @ B
INDEFINITE = DenseOperator(A - 10 * torch.eye(SIZE, dtype=torch.float64))


def true_residual(solution: Solution) -> float:
    return float((B - A @ solution.solution).norm() / B.norm())


@pytest.mark.parametrize("tolerance", [1e-2, 1e-8])
@pytest.mark.parametrize("solver", [conjugate_gradient, lbfgs])
def test_known_system_to_the_requested_residual(solver: Callable[..., Solution], tolerance: float) -> None:
    calls = []

    def count(v: Tensor) -> Tensor:
        calls.append(v)
        return A @ v

    found = solver(FunctionOperator(count, SIZE, torch.float64), B, tolerance=tolerance, max_products=2000)
    assert found.converged
    assert found.products == len(calls)
    assert found.residual == found.history[-1] <= tolerance < found.history[-2]
    assert found.residual == pytest.approx(true_residual(found), rel=1e-3)
    assert relative_error(found.solution, EXACT) < 50 * tolerance  # the condition number times the residual


@pytest.mark.parametrize("solver", [conjugate_gradient, lbfgs])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_right_hand_side_that_is_not_finite_is_one_line(solver: Callable[..., Solution], number: float) -> None:
    with pytest.raises(CurvlibError, match=r"the right-hand side has norm (nan|inf), expected finite numbers"):
        solver(OPERATOR, B.index_fill(0, torch.tensor([3]), number))


@pytest.mark.parametrize("solver", [conjugate_gradient, lbfgs])
def test_a_spent_budget_is_no_convergence_and_zero_has_a_zero_solution(solver: Callable[..., Solution]) -> None:
    found = solver(OPERATOR, B, tolerance=1e-12, max_products=12)
    assert (found.products, found.converged) == (12, False)
    assert found.residual == pytest.approx(true_residual(found), rel=1e-6)
    nothing = solver(OPERATOR, torch.zeros_like(B))
    assert (nothing.products, nothing.converged, bool(nothing.solution.any())) == (0, True, False)


@pytest.mark.parametrize("solver", [conjugate_gradient, lbfgs])
def test_negative_curvature_is_reported_with_its_value(solver: Callable[..., Solution]) -> None:
    found = solver(INDEFINITE, B, tolerance=1e-10)
    assert not found.converged
    assert found.negative_curvature is not None
    assert -10 < found.negative_curvature < 0  # the spectrum starts at 1 - 10
    first = solver(DiagonalOperator(-torch.ones(3)), torch.ones(3))
    assert (first.negative_curvature, first.products, first.residual) == (-1.0, 1, 1.0)


def test_preconditioner_start_and_callback() -> None:
    scale = torch.logspace(0, 6, SIZE, dtype=torch.float64)
    rough = DenseOperator(scale[:, None] * A * scale)
    plain = conjugate_gradient(rough, B, tolerance=1e-6, max_products=200)
    inverse = DiagonalOperator(1 / rough.matrix.diagonal())
    steps: list[tuple[int, float]] = []

    def note(step: int, x: Tensor, residual: float) -> None:
        assert float((B - rough @ x).norm() / B.norm()) == pytest.approx(residual, rel=1e-3, abs=1e-6)
        steps.append((step, residual))

    better = conjugate_gradient(
        rough,
        B,
        tolerance=1e-6,
        max_products=200,
        preconditioner=inverse,
        callback=note,
    )
    assert better.converged
    assert not plain.converged
    assert steps == list(enumerate(better.history))[1:]
    as_function = conjugate_gradient(rough, B, tolerance=1e-6, max_products=200, preconditioner=inverse.matvec)
    assert torch.equal(as_function.solution, better.solution)
    perfect = conjugate_gradient(OPERATOR, B, tolerance=1e-8, preconditioner=DenseOperator(INVERSE))
    assert (perfect.products, perfect.converged) == (1, True)
    warm = conjugate_gradient(OPERATOR, B, tolerance=1e-8, x0=EXACT)
    assert (warm.products, warm.converged) == (1, True)


def test_lbfgs_with_all_pairs_walks_the_path_of_conjugate_gradients() -> None:
    for products in range(1, 8):
        cg = conjugate_gradient(OPERATOR, B, tolerance=0, max_products=products)
        full = lbfgs(OPERATOR, B, tolerance=0, max_products=products, memory=products)
        assert relative_error(full.solution, cg.solution) < 1e-9
    assert lbfgs(OPERATOR, B, tolerance=1e-8, max_products=500, memory=3).converged


def test_the_lbfgs_inverse_of_conjugate_pairs_is_the_inverse_and_of_few_meets_the_newest() -> None:
    basis = torch.linalg.eigh(A).eigenvectors.T
    whole = LBFGSInverse([(s, A @ s) for s in basis])
    assert relative_error(whole.dense(), INVERSE) < 1e-10
    few = LBFGSInverse([(s, A @ s) for s in random(4, SIZE, seed=3)])
    s, y = few.pairs[-1]
    torch.testing.assert_close(few @ y, s)
    dense = few.dense()
    torch.testing.assert_close(dense, dense.T)
    assert float(torch.linalg.eigvalsh(dense)[0]) > 0
    with pytest.raises(CurvlibError, match="no curvature pair has s·y > 0"):
        LBFGSInverse([])
