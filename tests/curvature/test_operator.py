"""Operator arithmetic against dense matrices, and what the shared batch logic accepts and refuses."""

from __future__ import annotations

from functools import partial
from math import isnan

import pytest
import torch
from torch import Tensor

from curvlib.curvature.batched import BatchedOperator
from curvlib.curvature.hessian import HessianOperator
from curvlib.curvature.operator import (
    CurvatureOperator,
    DenseOperator,
    DiagonalOperator,
    FunctionOperator,
    IdentityOperator,
    Operator,
    asymmetry,
)
from curvlib.errors import CurvlibError
from tests.cases import random, spd

A, B, D, V = spd(6, seed=1), spd(6, seed=2), random(6, seed=3), random(6, seed=4)
MATRIX, OTHER = DenseOperator(A), DenseOperator(B)
IDENTITY = torch.eye(6, dtype=torch.float64)


@pytest.mark.parametrize(
    ("operator", "matrix"),
    [
        (MATRIX + OTHER, A + B),
        (MATRIX - OTHER, A - B),
        (2.5 * MATRIX, 2.5 * A),
        (MATRIX * 2.5, 2.5 * A),
        (MATRIX.damped(0.3), A + 0.3 * IDENTITY),
        (0.5 * (MATRIX + 2 * OTHER).damped(1.0), 0.5 * A + B + 0.5 * IDENTITY),
        (DiagonalOperator(D), D.diag()),
        (IdentityOperator(6, torch.float64), IDENTITY),
        (FunctionOperator(A.matmul, 6, torch.float64), A),
    ],
)
def test_arithmetic_is_that_of_the_matrices(operator: Operator, matrix: Tensor) -> None:
    torch.testing.assert_close(operator.dense(), matrix, rtol=1e-14, atol=1e-14)
    v = random(operator.size, seed=4)
    torch.testing.assert_close(operator @ v, matrix @ v)
    assert isinstance(operator, CurvatureOperator)
    assert (operator.dtype, operator.device) == (torch.float64, torch.device("cpu"))


def test_what_does_not_fit_is_refused() -> None:
    for operator in (MATRIX, DiagonalOperator(D), FunctionOperator(A.matmul, 6, torch.float64)):
        with pytest.raises(CurvlibError, match=r"expected \(6,\)"):
            operator.matvec(V[:5])
    with pytest.raises(CurvlibError, match="sizes 6 and 5"):
        MATRIX + IdentityOperator(5)
    with pytest.raises(CurvlibError, match="expected a square one"):
        DenseOperator(A[:5])


def test_asymmetry_tells_a_symmetric_matrix_from_any_other() -> None:
    assert asymmetry(MATRIX) < 1e-14
    assert asymmetry(DenseOperator(A + 0.3 * random(6, 6, seed=5))) > 1e-2
    assert asymmetry(DenseOperator(torch.zeros(3, 3))) == 0
    assert isnan(asymmetry(DenseOperator(A * torch.nan)))


THETA = V.clone().requires_grad_()


def quadratic(matrix: Tensor) -> Tensor:
    return 0.5 * THETA @ matrix @ THETA


def test_batches_are_averaged_by_weight() -> None:
    equal = HessianOperator(quadratic, [THETA], [A, B])
    torch.testing.assert_close(equal.dense(), (A + B) / 2, rtol=0, atol=1e-12)
    weighted = HessianOperator(quadratic, {"theta": THETA}, [A, B], weights=[1, 3])
    torch.testing.assert_close(weighted.dense(), A / 4 + 3 * B / 4, rtol=0, atol=1e-12)
    assert torch.equal(weighted @ V, weighted @ V)
    assert weighted.weight == 4


@pytest.mark.parametrize(("batches", "weights"), [([], None), ([A], [1, 2]), ([A], [0])])
def test_batches_without_weight_are_refused(batches: list[Tensor], weights: list[float] | None) -> None:
    with pytest.raises(CurvlibError, match="at least one batch, one weight each and a positive sum"):
        HessianOperator(quadratic, [THETA], batches, weights)


def test_a_parameter_without_gradient_is_refused() -> None:
    unused = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(CurvlibError, match=r"1 of 2 parameters get no gradient \(first: spare\)"):
        HessianOperator(quadratic, {"theta": THETA, "spare": unused}, [A])
    frozen = HessianOperator(quadratic, [THETA, unused], [A], check=False)
    torch.testing.assert_close(frozen.dense(), torch.block_diag(A, torch.zeros(2, 2)), rtol=0, atol=1e-12)
    with pytest.raises(CurvlibError, match="1 of 1 parameters get no gradient"):
        HessianOperator(lambda _: torch.zeros(()), [THETA], [A])


class Planted(BatchedOperator[Tensor]):
    """Multiplies by the batch, symmetric or not."""

    def batch_product(self, batch: Tensor, v: Tensor) -> Tensor:
        return batch @ v


def test_an_asymmetric_or_undefined_product_is_refused() -> None:
    make = partial(Planted, lambda _: THETA.sum(), [THETA])
    make([A])
    for wrong in (A + 30 * random(6, 6, seed=5), A * torch.nan):
        with pytest.raises(CurvlibError, match="the product is not symmetric"):
            make([wrong])
        make([wrong], check=False)
