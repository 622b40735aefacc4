r"""The L-BFGS inverse: an operator made of a few measured curvature pairs.

A pair (s, y) says that the curvature maps the step s to :math:`y = A s`. The inverse that is closest to a multiple of
the identity and maps each y back to its s is applied by the two-loop recursion, in 4 m inner products for m pairs and
without any product with A. Source: Nocedal 1980, "Updating quasi-Newton matrices with limited storage"; Nocedal and
Wright 2006, algorithm 7.4; damping: Powell 1978.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from curvlib.curvature.operator import CurvatureOperator, Operator, check_vector
from curvlib.curvature.solve.solution import Solution
from curvlib.errors import CurvlibError

Pair = tuple[Tensor, Tensor]
POWELL = 0.2  # Powell's constant: a damped pair keeps a fifth of the curvature's magnitude
SKIP = 1e-8  # cosine between s and y below which a pair says nothing that float32 can hold


class LBFGSInverse(Operator):
    """An approximate inverse, symmetric positive definite, from pairs with s·y > 0; the newest pair is the last."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        if not pairs:
            raise CurvlibError("no curvature pair has s·y > 0: damp the curvature, or set powell=True")
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


def lbfgs_inverse(pairs: Iterable[Pair], *, powell: bool = True) -> LBFGSInverse:
    """Return the L-BFGS inverse of the pairs, oldest first.

    Args:
        pairs: steps and what the curvature makes of them, both (size,), see :func:`curvature_pairs`.
        powell: damp pairs of too little or negative curvature, so that each one counts (True), or skip those with
            s·y ≤ 0 (False).

    Raises:
        CurvlibError: no pair is left.
    """
    kept = [powell_damped(s, y) for s, y in pairs] if powell else list(pairs)
    return LBFGSInverse([(s, y) for s, y in kept if float(s @ y) > SKIP * float(s.norm() * y.norm())])


def powell_damped(s: Tensor, y: Tensor) -> Pair:
    r"""Return the pair with y moved towards s until :math:`s^\top y \ge 0.2\,\sigma`, :math:`\sigma = \|s\|\,\|y\|`.

    Powell moves y towards :math:`B s` for the present approximation B; here :math:`B = (\|y\|/\|s\|)\,I`, the size of
    the curvature along s, which is defined for negative curvature too.
    """
    sigma, curvature = float(s.norm() * y.norm()), float(s @ y)
    if sigma == 0 or curvature >= POWELL * sigma:
        return s, y
    theta = (1 - POWELL) * sigma / (sigma - curvature)
    return s, theta * y + (1 - theta) * (y.norm() / s.norm()) * s


def curvature_pairs(product: Callable[[Tensor], Tensor], steps: Iterable[Tensor]) -> list[Pair]:
    """Return (s, product(s)) for each step; ``product`` is an operator's matvec or :func:`gradient_differences`."""
    return [(step, product(step)) for step in steps]


def gradient_differences(gradient: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    r"""Return :math:`s \mapsto \nabla L(\theta + s) - \nabla L(\theta)`, the pair's y that L-BFGS uses in training.

    Args:
        gradient: a shift (size,) of the parameters to the gradient there. It must use the same batch in every call:
            between different batches the difference is mostly noise.

    Cost: one gradient at once, one a call. Unlike a product it averages the curvature over the whole step.
    """
    start: list[Tensor] = []

    def difference(step: Tensor) -> Tensor:
        if not start:
            start.append(gradient(torch.zeros_like(step)))
        return gradient(step) - start[0]

    return difference


def lbfgs(
    operator: CurvatureOperator,
    b: Tensor,
    *,
    tolerance: float = 1e-3,
    max_products: int = 100,
    memory: int = 10,
) -> Solution:
    r"""Solve :math:`A x = b` by L-BFGS on :math:`\tfrac12 x^\top A x - b^\top x` with exact line searches.

    Each step spends one product, which gives both the step's length and its pair. With all pairs kept the iterates are
    those of conjugate gradients; a short memory forgets conjugacy. It ends at the first direction of curvature ≤ 0.

    Args:
        operator: A, symmetric positive definite.
        b: right-hand side, (size,).
        tolerance: relative residual to reach.
        max_products: products to spend at most.
        memory: pairs kept.
    """
    check_vector(operator, b)
    scale = float(b.norm())
    if scale == 0:
        return Solution(torch.zeros_like(b), 0.0, 0, True, (0.0,))
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
