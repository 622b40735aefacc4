"""What every solver returns, and what it may be given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from curvlib.curvature.operator import CurvatureOperator

Preconditioner = CurvatureOperator | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Solution:
    r"""What a solver found and what it cost.

    Attributes:
        solution: x, (size,).
        residual: :math:`\|b - A x\| / \|b\|`.
        products: operator products spent.
        converged: whether the residual reached the tolerance.
        history: the relative residual before the first step and after each one.
        negative_curvature: :math:`d^\top A d / d^\top d` of the direction that ended CG because it was not positive,
            None if there was none.
    """

    solution: Tensor
    residual: float
    products: int
    converged: bool
    history: tuple[float, ...]
    negative_curvature: float | None = None


def as_function(preconditioner: Preconditioner | None) -> Callable[[Tensor], Tensor]:
    """Return the preconditioner as a function of a vector; the identity for None."""
    if preconditioner is None:
        return lambda vector: vector
    return preconditioner.matvec if isinstance(preconditioner, CurvatureOperator) else preconditioner
