r"""Lanczos: eigenvalues of a symmetric operator from its products with a few vectors.

From a unit vector :math:`v_1` each product adds one direction: :math:`A v_m` minus its part in the span of all earlier
ones is :math:`\beta_m v_{m+1}`. In the basis V of these vectors A is tridiagonal,

.. math:: A V = V T + \beta_m v_{m+1} e_m^\top, \qquad T_{jj} = v_j^\top A v_j = \alpha_j, \quad T_{j,j+1} = \beta_j ,

and the eigenvalues of the small T approach those of A, the outermost first. In exact arithmetic three vectors would do;
rounding loses orthogonality and yields false copies of converged eigenvalues, hence all vectors are kept and projected
out (full reorthogonalisation). Memory: one vector of the operator's size for each step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlib.curvature.operator import CurvatureOperator
from curvlib.errors import CurvlibError


@dataclass(frozen=True)
class Krylov:
    """The state after m steps: ``basis`` (m, size), ``alpha`` (m,), ``beta`` (m,); the last beta leads outside."""

    basis: Tensor
    alpha: tuple[float, ...]
    beta: tuple[float, ...]

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Return T's eigenvalues, ascending (m,), and its eigenvectors as columns (m, m), float64 on the CPU."""
        inner = torch.tensor(self.beta[:-1], dtype=torch.float64)
        matrix = torch.diag(torch.tensor(self.alpha, dtype=torch.float64)) + inner.diag(1) + inner.diag(-1)
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors


def lanczos(
    operator: CurvatureOperator, steps: int, generator: torch.Generator, start: Tensor | None = None
) -> Iterator[Krylov]:
    """Yield the state after each of at most ``steps`` steps from ``start`` (random by default); one product a step.

    Where the basis cannot be extended (its span is mapped into itself) the last ``beta`` is 0, and the next step begins
    in a new random direction.

    Raises:
        CurvlibError: a product is not finite.
    """
    steps = min(steps, operator.size)
    basis = torch.empty(steps, operator.size, dtype=operator.dtype, device=operator.device)
    alpha: list[float] = []
    beta: list[float] = []
    largest, tiny = 0.0, 100 * torch.finfo(operator.dtype).eps
    w = normal_probe(operator, generator) if start is None else start
    for m in range(steps):
        basis[m] = w / w.norm()
        image = operator.matvec(basis[m])
        alpha.append(float(basis[m] @ image))
        if not math.isfinite(alpha[-1]):
            raise CurvlibError(f"product {m + 1} of Lanczos is not finite: look for NaN in the model or the batches")
        largest = max(largest, float(image.norm()))
        w = _outside(basis[: m + 1], image)
        beta.append(float(w.norm()))
        if beta[-1] <= tiny * largest:
            beta[-1] = 0.0
            w = _outside(basis[: m + 1], normal_probe(operator, generator))
        yield Krylov(basis[: m + 1], tuple(alpha), tuple(beta))


def normal_probe(operator: CurvatureOperator, generator: torch.Generator) -> Tensor:
    """Return a standard normal vector (size,), drawn on the CPU so that every device sees the same one."""
    return torch.randn(operator.size, generator=generator, dtype=torch.float64).to(operator.device, operator.dtype)


def _outside(basis: Tensor, w: Tensor) -> Tensor:
    """Remove from w its part in the span of the basis rows; the second pass removes the first one's rounding."""
    for _ in range(2):
        w = w - basis.T @ (basis @ w)
    return w
