"""Lanczos against dense eigendecompositions in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from curvlib.curvature.lanczos import lanczos
from curvlib.curvature.operator import DenseOperator, DiagonalOperator
from curvlib.errors import CurvlibError


def indefinite(size: int = 80) -> Tensor:
    """Symmetric, float64, a few outliers at both ends of a bulk around zero."""
    generator = torch.Generator().manual_seed(
        1234
    )  # another seed than the probes': they would be the matrix's own rows
    noise = torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5
    outliers = torch.zeros(size, dtype=torch.float64)
    outliers[:4] = torch.tensor([20.0, 10.0, 5.0, -8.0])
    matrix: Tensor = (noise + noise.T) / 2 + outliers.diag()
    return matrix


def test_the_recurrence_holds_and_the_basis_stays_orthonormal() -> None:
    a = indefinite()
    *_, krylov = lanczos(DenseOperator(a), 60, torch.Generator().manual_seed(0))
    v = krylov.basis
    torch.testing.assert_close(v @ v.T, torch.eye(60, dtype=torch.float64), rtol=0, atol=1e-12)
    inner = torch.tensor(krylov.beta[:-1], dtype=torch.float64)
    tridiagonal = torch.tensor(krylov.alpha, dtype=torch.float64).diag() + inner.diag(1) + inner.diag(-1)
    torch.testing.assert_close(v @ a @ v.T, tridiagonal, rtol=0, atol=1e-11)


def test_the_ends_of_the_spectrum_come_first() -> None:
    *_, krylov = lanczos(DenseOperator(indefinite()), 40, torch.Generator().manual_seed(0))
    values, mix = krylov.ritz()
    exact = torch.linalg.eigvalsh(indefinite())
    torch.testing.assert_close(values[[0, -2, -1]], exact[[0, -2, -1]], rtol=0, atol=1e-9)
    residuals = (krylov.beta[-1] * mix[-1]).abs()  # bounds of the distance to an exact eigenvalue
    nearest = (exact[:, None] - values).abs().min(dim=0).values
    assert bool((nearest <= residuals + 1e-12).all())
    assert float(residuals.max()) > 1e-2


def test_the_first_entries_are_a_gauss_rule_exact_for_polynomials_of_its_degree() -> None:
    a, steps, v = indefinite(), 4, torch.ones(80, dtype=torch.float64) / 80**0.5
    *_, krylov = lanczos(DenseOperator(a), steps, torch.Generator(), start=v)
    nodes, vectors = krylov.ritz()
    for degree in range(2 * steps):
        exact = float(v @ torch.linalg.matrix_power(a, degree) @ v)
        assert float(vectors[0].square() @ nodes**degree) == pytest.approx(exact, rel=1e-9)


def test_an_invariant_span_is_left_in_a_new_direction() -> None:
    operator = DiagonalOperator(torch.tensor([2.0, 2.0, 2.0, -1.0], dtype=torch.float64))
    *_, krylov = lanczos(operator, 9, torch.Generator().manual_seed(0))
    torch.testing.assert_close(krylov.ritz()[0], operator.diagonal.flip(0))
    assert 0.0 in krylov.beta


def test_a_product_that_is_not_finite_is_told() -> None:
    operator = DiagonalOperator(torch.tensor([1.0, float("nan"), 2.0]))
    with pytest.raises(CurvlibError, match="product 1 of Lanczos is not finite"):
        next(lanczos(operator, 1, torch.Generator()))
