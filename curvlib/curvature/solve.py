r"""Solve :math:`A x = b` with a curvature operator A: conjugate gradients, L-BFGS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from curvlib.curvature.operator import CurvatureOperator, Operator, check_vector
from curvlib.errors import CurvlibError

Preconditioner = CurvatureOperator | Callable[[Tensor], Tensor]
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Solution:
    r"""A solution and what it cost.

    Attributes:
        solution: x, (size,).
        residual: :math:`\|b - A x\| / \|b\|`.
        products: operator products spent.
        converged: whether the residual reached the tolerance.
        history: the relative residual before the first step and after each one.
        negative_curvature: :math:`d^\top A d / d^\top d` of the direction that ended the solve because it was not
            positive, None if there was none.
    """

    solution: Tensor
    residual: float = 0.0
    products: int = 0
    converged: bool = True
    history: tuple[float, ...] = (0.0,)
    negative_curvature: float | None = None


def conjugate_gradient(
    operator: CurvatureOperator,
    b: Tensor,
    *,
    tolerance: float = 1e-3,
    max_products: int = 100,
    preconditioner: Preconditioner | None = None,
    x0: Tensor | None = None,
    callback: Callable[[int, Tensor, float], None] | None = None,
) -> Solution:
    r"""Solve :math:`A x = b` by preconditioned conjugate gradients; A must be symmetric positive definite.

    Stops at a relative residual of ``tolerance``, after ``max_products`` products, or at the first direction d with
    :math:`d^\top A d \le 0`; it then returns the x reached so far and reports that curvature. The reported residual is
    the recursive one, which drifts from the true one by about the rounding error of the products.

    Args:
        operator: A.
        b: right-hand side, (size,).
        tolerance: relative residual to reach.
        max_products: products to spend at most; x0 costs one.
        preconditioner: an operator or function close to the inverse of A, symmetric positive definite.
        x0: start, zero by default.
        callback: called as ``callback(step, x, residual)`` after each step.

    Cost: one product a step and five vectors. Source: Hestenes and Stiefel 1952.

    >>> from curvlib.curvature.operator import DenseOperator
    >>> a = DenseOperator(torch.tensor([[4.0, 1.0], [1.0, 3.0]]))
    >>> conjugate_gradient(a, torch.tensor([5.0, 4.0])).solution.round(decimals=4)
    tensor([1., 1.])
    """
    scale = _norm(operator, b)
    if scale == 0:
        return Solution(torch.zeros_like(b))
    precondition = preconditioner.matvec if isinstance(preconditioner, CurvatureOperator) else preconditioner
    x = torch.zeros_like(b) if x0 is None else x0.clone()
    r = b.clone() if x0 is None else b - operator.matvec(x)
    products = int(x0 is not None)
    z = precondition(r) if precondition else r
    d, rz = z, float(r @ z)
    history, curvature = [float(r.norm()) / scale], None
    while history[-1] > tolerance and products < max_products:
        a_d = operator.matvec(d)
        products += 1
        d_a_d = float(d @ a_d)
        if not d_a_d > 0:
            curvature = d_a_d / float(d @ d)
            break
        step = rz / d_a_d
        x, r = x + step * d, r - step * a_d
        history.append(float(r.norm()) / scale)
        if callback is not None:
            callback(len(history) - 1, x, history[-1])
        z = precondition(r) if precondition else r
        rz, previous = float(r @ z), rz
        d = z + (rz / previous) * d
    return Solution(x, history[-1], products, history[-1] <= tolerance, tuple(history), curvature)


def _norm(operator: CurvatureOperator, b: Tensor) -> float:
    """Return the length of a right-hand side; raise CurvlibError where it does not fit, or has none."""
    check_vector(operator, b)
    norm = float(b.norm())
    if not isfinite(norm):
        raise CurvlibError(f"the right-hand side has norm {norm}, expected finite numbers: check what it is made of")
    return norm


class LBFGSInverse(Operator):
    r"""An approximate inverse, symmetric positive definite, from pairs (s, y) with s·y > 0; the newest is the last.

    A pair says that the curvature maps the step s to :math:`y = A s`. The inverse that is closest to a multiple of the
    identity and maps each y back to its s is applied by the two-loop recursion, in 4 m inner products for m pairs and
    without any product with A. Source: Nocedal 1980, "Updating quasi-Newton matrices with limited storage"; Nocedal and
    Wright 2006, algorithm 7.4.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        if not pairs:
            raise CurvlibError("no curvature pair has s·y > 0: damp the curvature")
        self.pairs = list(pairs)
        s, y = pairs[-1]
        self.scale = float(s @ y) / float(y @ y)
        self.size, self.dtype, self.device = s.numel(), s.dtype, s.device

    def matvec(self, v: Tensor) -> Tensor:
        """Return the approximate A⁻¹v by the two-loop recursion."""
        check_vector(self, v)
        q, factors = v.clone(), []
        for s, y in reversed(self.pairs):
            factors.append(float(s @ q) / float(s @ y))
            q -= factors[-1] * y
        q *= self.scale
        for (s, y), factor in zip(self.pairs, reversed(factors), strict=True):
            q += (factor - float(y @ q) / float(s @ y)) * s
        return q


def lbfgs(
    operator: CurvatureOperator, b: Tensor, *, tolerance: float = 1e-3, max_products: int = 100, memory: int = 10
) -> Solution:
    r"""Solve :math:`A x = b` by L-BFGS on :math:`\tfrac12 x^\top A x - b^\top x` with exact line searches.

    Each step spends one product, which gives both the step's length and its pair; the last ``memory`` pairs are used.
    With all pairs the iterates are those of conjugate gradients; a short memory forgets conjugacy. It ends at the first
    direction of curvature ≤ 0. The arguments are those of :func:`conjugate_gradient`.
    """
    scale = _norm(operator, b)
    if scale == 0:
        return Solution(torch.zeros_like(b))
    x, r, pairs = torch.zeros_like(b), b.clone(), list[Pair]()
    history, products, curvature = [1.0], 0, None
    while history[-1] > tolerance and products < max_products:
        d = LBFGSInverse(pairs).matvec(r) if pairs else r
        a_d = operator.matvec(d)
        products += 1
        d_a_d = float(d @ a_d)
        if not d_a_d > 0:
            curvature = d_a_d / float(d @ d)
            break
        step = float(d @ r) / d_a_d
        x, r = x + step * d, r - step * a_d
        pairs = [*pairs, (step * d, step * a_d)][-memory:]
        history.append(float(r.norm()) / scale)
    return Solution(x, history[-1], products, history[-1] <= tolerance, tuple(history), curvature)
