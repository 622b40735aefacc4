"""Lanczos eigenpairs and densities against dense eigendecompositions in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from curvlib.curvature.lanczos import eigenpairs, lanczos, spectral_density
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


@pytest.mark.parametrize(("largest", "smallest"), [(3, 0), (0, 2), (3, 1)])
def test_both_ends_match_the_dense_eigenpairs(largest: int, smallest: int) -> None:
    a = indefinite()
    exact, vectors = torch.linalg.eigh(a)
    keep = [*range(79, 79 - largest, -1), *range(smallest - 1, -1, -1)]
    found = eigenpairs(DenseOperator(a), largest=largest, smallest=smallest, tolerance=1e-8)
    torch.testing.assert_close(found.values, exact[keep], rtol=0, atol=1e-9)
    overlap = (found.vectors * vectors[:, keep]).sum(dim=0).abs()
    torch.testing.assert_close(overlap, torch.ones(len(keep), dtype=torch.float64))
    assert found.products < 80


def test_residuals_are_the_true_ones_and_bound_the_error() -> None:
    a = indefinite()
    exact = torch.linalg.eigvalsh(a)
    found = eigenpairs(DenseOperator(a), largest=4, max_products=14)
    true = (a @ found.vectors - found.vectors * found.values).norm(dim=0)
    torch.testing.assert_close(found.residuals, true, rtol=1e-6, atol=1e-9)
    assert found.products == 14
    assert float(found.residuals.max()) > 1e-2
    nearest = (exact[:, None] - found.values).abs().min(dim=0).values
    assert bool((nearest <= found.residuals + 1e-12).all())


def test_an_invariant_span_is_left_in_a_new_direction() -> None:
    operator = DiagonalOperator(torch.tensor([2.0, 2.0, 2.0, -1.0], dtype=torch.float64))
    found = eigenpairs(operator, largest=4, max_products=9)
    torch.testing.assert_close(found.values, operator.diagonal)
    assert found.products == 4


def test_quadrature_is_exact_for_polynomials_of_its_degree() -> None:
    a, steps = indefinite(), 4
    found = spectral_density(DenseOperator(a), steps=steps, probes=3, seed=5)
    generator = torch.Generator().manual_seed(5)
    for nodes, weights in zip(found.nodes, found.weights, strict=True):
        krylov = next(lanczos(DenseOperator(a), 1, generator))
        v = krylov.basis[0]
        for degree in range(2 * steps):
            exact = float(v @ torch.linalg.matrix_power(a, degree) @ v)
            assert float((weights * nodes**degree).sum()) == pytest.approx(exact, rel=1e-9)
    assert found.products == 12


def test_density_is_within_its_standard_error_of_the_dense_one() -> None:
    a, width = indefinite(), 0.5
    exact = torch.linalg.eigvalsh(a)
    found = spectral_density(DenseOperator(a), steps=40, probes=200, width=width)
    gaps = (found.grid - exact[:, None]) / width
    smooth = torch.exp(-0.5 * gaps.square()).mean(dim=0) / (width * (2 * torch.pi) ** 0.5)
    scores = (found.density - smooth)[smooth > 1e-3] / found.standard_error[smooth > 1e-3]
    assert 0.5 < float(scores.abs().max()) < 4
    assert float(torch.trapezoid(found.density, found.grid)) == pytest.approx(1, abs=1e-3)
    negative = found.mean(lambda values: (values < -1).double())
    assert abs(negative.value - float((exact < -1).double().mean())) < 4 * negative.standard_error


def test_standard_error_is_the_spread_over_seeds() -> None:
    runs = [spectral_density(DenseOperator(indefinite()), steps=20, probes=8, width=0.5, seed=s) for s in range(60)]
    means = torch.tensor([run.mean(torch.square).value for run in runs])
    told = torch.tensor([run.mean(torch.square).standard_error for run in runs]).square().mean().sqrt()
    assert 0.75 < float(told / means.std()) < 1.33


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_a_multiple_of_the_identity_is_one_peak(scale: float) -> None:
    found = spectral_density(DiagonalOperator(torch.full((50,), scale)), steps=10, probes=2)
    assert float(found.grid[found.density.argmax()]) == pytest.approx(scale, abs=0.01)
    assert found.products == 2


def test_float32_works_and_impossible_requests_are_refused() -> None:
    operator, exact = DenseOperator(indefinite().float()), torch.linalg.eigvalsh(indefinite())
    found = eigenpairs(operator, largest=2, tolerance=1e-3)
    torch.testing.assert_close(found.values, exact[-2:].flip(0), rtol=1e-5, atol=0)
    assert found.products < 40
    with pytest.raises(CurvlibError, match="ask for 1 to 80"):
        eigenpairs(operator, largest=81)
    with pytest.raises(CurvlibError, match="2 probes"):
        spectral_density(operator, probes=1)


def test_a_product_that_is_not_finite_is_told() -> None:
    with pytest.raises(CurvlibError, match="product 1 of Lanczos is not finite"):
        eigenpairs(DiagonalOperator(torch.tensor([1.0, float("nan"), 2.0])), largest=1)
