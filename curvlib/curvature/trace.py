r"""Traces and diagonals of a symmetric operator from its products with random vectors.

All rest on :math:`\mathbb E[z^\top A z] = \operatorname{tr} A` for :math:`\mathbb E[z z^\top] = I`. Hutchinson averages
such quadratic forms; Hutch++ and XTrace first take out the large eigenvalues, and pay off where the spectrum decays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlib.curvature.operator import CurvatureOperator
from curvlib.errors import CurvlibError


@dataclass(frozen=True)
class Estimate:
    """A number, its standard error in the same unit, and the products with the operator that it cost."""

    value: float
    standard_error: float
    products: int


@dataclass(frozen=True)
class DiagonalEstimate:
    """Diagonal entries (size,), the standard error of each (size,), and the products that they cost."""

    values: Tensor
    standard_error: Tensor
    products: int


def normal_probes(operator: CurvatureOperator, count: int, generator: torch.Generator) -> Tensor:
    """Return standard normal columns (size, count), drawn on the CPU so that every device sees the same ones."""
    probes = torch.randn(count, operator.size, generator=generator, dtype=torch.float64)
    return probes.T.to(operator.device, operator.dtype)


def sign_probe(operator: CurvatureOperator, generator: torch.Generator) -> Tensor:
    """Return a vector (size,) of independent signs (Rademacher), drawn on the CPU."""
    bits = torch.randint(0, 2, (operator.size,), generator=generator)
    return (2 * bits - 1).to(operator.device, operator.dtype)


def products(operator: CurvatureOperator, columns: Tensor) -> Tensor:
    """Return the products with each column of a matrix (size, k)."""
    return torch.stack([operator.matvec(column) for column in columns.unbind(dim=1)], dim=1)


def hutchinson(operator: CurvatureOperator, probes: int, *, seed: int = 0) -> Estimate:
    r"""Estimate the trace as the mean of :math:`z^\top A z` over vectors z of random signs.

    Its variance is :math:`2\,(\|A\|_F^2 - \sum_i A_{ii}^2) / \text{probes}`, so a diagonal A costs one probe. Cost:
    ``probes`` products. Source: Hutchinson 1990; Girard 1989.

    >>> from curvlib.curvature.operator import DiagonalOperator
    >>> hutchinson(DiagonalOperator(torch.tensor([1.0, 2.0, 3.0])), probes=2)
    Estimate(value=6.0, standard_error=0.0, products=2)
    """
    whole = {"all": slice(None)}
    return layer_traces(operator, whole, probes, seed=seed)["all"]


def layer_traces(
    operator: CurvatureOperator, layers: Mapping[str, slice], probes: int, *, seed: int = 0
) -> dict[str, Estimate]:
    r"""Estimate the trace of each diagonal block, :math:`\mathbb E[z_L^\top (A z)_L]`, all from the same products.

    ``layers`` maps names to slices of the flat vector, as :func:`curvlib.parameters.layer_slices` returns them. Each
    estimate names the products spent on all layers together: ``probes``.
    """
    generator = _generator(probes, 2, seed)
    samples: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(probes):
        z = sign_probe(operator, generator)
        image = operator.matvec(z)
        for name, where in layers.items():
            samples[name].append(float(z[where] @ image[where]))
    return {name: _mean(values, probes) for name, values in samples.items()}


def diagonal(operator: CurvatureOperator, probes: int, *, seed: int = 0) -> DiagonalEstimate:
    r"""Estimate the diagonal as the mean of :math:`z \odot A z` over vectors z of random signs.

    The variance of entry i is :math:`\sum_{j \ne i} A_{ij}^2 / \text{probes}`. Cost: ``probes`` products. Source:
    Bekas, Kokiopoulou and Saad 2007.
    """
    generator = _generator(probes, 2, seed)
    mean = torch.zeros(operator.size, dtype=operator.dtype, device=operator.device)
    spread = torch.zeros_like(mean)
    for count in range(1, probes + 1):  # Welford's update: stable, and holds two vectors only
        z = sign_probe(operator, generator)
        step = z * operator.matvec(z) - mean
        mean += step / count
        spread += step.square() * ((count - 1) / count)
    return DiagonalEstimate(mean, (spread / (probes - 1) / probes).sqrt(), probes)


def hutch_plus_plus(operator: CurvatureOperator, budget: int, *, seed: int = 0) -> Estimate:
    r"""Estimate the trace in three equal shares of products: a range Q, its exact part, Hutchinson on the rest.

    .. math:: \operatorname{tr}(Q^\top A Q) + \tfrac1k \sum_i z_i^\top (I - QQ^\top) A (I - QQ^\top) z_i, \quad
              Q = \operatorname{orth}(A S), \ k = \lfloor\text{budget}/3\rfloor

    For positive semi-definite A the error falls as 1/budget, against Hutchinson's square root. Cost: 3k products, three
    (size, k) matrices. Source: Meyer et al., arXiv 2010.09649.
    """
    generator = _generator(budget, 6, seed)
    k = min(budget // 3, operator.size)
    q = torch.linalg.qr(products(operator, normal_probes(operator, k, generator))).Q
    exact = float((q * products(operator, q)).sum())
    samples = []
    for _ in range(budget // 3):
        z = sign_probe(operator, generator)
        z = z - q @ (q.T @ z)
        samples.append(exact + float(z @ operator.matvec(z)))
    return _mean(samples, 2 * k + budget // 3)


def xtrace(operator: CurvatureOperator, budget: int, *, seed: int = 0) -> Estimate:
    r"""Estimate the trace with every test vector used twice: for the others' range, and as probe of what is left.

    With :math:`Y = A\Omega = QR` and :math:`Q_i` the basis of all columns of Y but the i-th, the estimate is the mean
    over i of :math:`\operatorname{tr}(Q_i^\top A Q_i) + c_i\,\mu_i^\top A \mu_i` with
    :math:`\mu_i = (I - Q_i Q_i^\top)\omega_i`, where :math:`c_i` scales :math:`\mu_i` to a squared length equal to
    the dimension of its space. All of it comes from matrices of shape (k, k). The standard error treats the k terms as
    independent, which they are not quite.

    Cost: 2k products, :math:`k = \lfloor\text{budget}/2\rfloor`, three (size, k) matrices. Source: Epperly, Tropp and
    Webber, arXiv 2301.07825.
    """
    generator = _generator(budget, 4, seed)
    k = min(budget // 2, operator.size)
    omega = normal_probes(operator, k, generator)
    q, r = torch.linalg.qr(products(operator, omega))
    h, w = q.T @ products(operator, q), q.T @ omega
    # Column i of s: the unit vector for which Q s is orthogonal to all columns of Y but the i-th. The jitter, of the
    # size of rounding, keeps R invertible where A has a rank below k.
    jitter = torch.finfo(r.dtype).eps * (float(r.norm()) or 1.0) * torch.eye(k, dtype=r.dtype, device=r.device)
    s = torch.linalg.solve_triangular((r + jitter).T, torch.eye(k, dtype=r.dtype, device=r.device), upper=False)
    s = s / s.norm(dim=0)
    x = w - s * (s * w).sum(dim=0)  # Q_i Q_i^T omega_i = Q x_i
    length = omega.square().sum(dim=0) - x.square().sum(dim=0)
    form = ((w - 2 * x) * r).sum(dim=0) + (x * (h @ x)).sum(dim=0)  # mu_i^T A mu_i, as A omega_i = Q r_i
    samples = h.trace() - (s * (h @ s)).sum(dim=0) + (operator.size - k + 1) / length * form
    return _mean(samples.tolist(), 2 * k)


def _generator(spent: int, least: int, seed: int) -> torch.Generator:
    if spent < least:
        raise CurvlibError(
            f"{spent} products were given, but the estimate and its standard error need at least {least}"
        )
    return torch.Generator().manual_seed(seed)


def _mean(samples: list[float], spent: int) -> Estimate:
    values = torch.tensor(samples, dtype=torch.float64)
    return Estimate(float(values.mean()), float(values.std() / len(samples) ** 0.5), spent)
