r"""Preconditioned conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvlib.curvature.operator import CurvatureOperator, check_vector
from curvlib.curvature.solve.solution import Preconditioner, Solution, as_function


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
    check_vector(operator, b)
    scale = float(b.norm())
    if scale == 0:
        return Solution(torch.zeros_like(b), 0.0, 0, True, (0.0,))
    precondition = as_function(preconditioner)
    x = torch.zeros_like(b) if x0 is None else x0.clone()
    r = b.clone() if x0 is None else b - operator.matvec(x)
    products = int(x0 is not None)
    z = precondition(r)
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
        x = x + step * d
        r = r - step * a_d
        history.append(float(r.norm()) / scale)
        if callback is not None:
            callback(len(history) - 1, x, history[-1])
        z = precondition(r)
        rz, previous = float(r @ z), rz
        d = z + (rz / previous) * d
    return Solution(x, history[-1], products, history[-1] <= tolerance, tuple(history), curvature)
