r"""The Neumann series, and LiSSA, its stochastic form.

.. math:: A^{-1} b = \frac1\sigma \sum_{k \ge 0} \left(I - \frac{A}{\sigma}\right)^k b ,

which converges for a positive definite A if :math:`\sigma > \lambda_{\max}/2`. Each term costs one product; the error
falls by :math:`1 - \lambda_{\min}/\sigma` a term, against conjugate gradients' square root of that. Source: Agarwal et
al. 2017, arXiv 1602.03943 (LiSSA); Koh and Liang 2017, arXiv 1703.04730.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvlib.curvature.operator import CurvatureOperator, check_vector
from curvlib.curvature.solve.solution import Solution
from curvlib.errors import CurvlibError

MARGIN = 1.2  # power iteration approaches the largest eigenvalue from below
DIVERGED = 1e3  # a residual this many times its start will not come back


def largest_eigenvalue(operator: CurvatureOperator, *, products: int = 10, seed: int = 0) -> float:
    r"""Return an estimate of the largest :math:`|\lambda|` by power iteration from a random vector; a lower bound."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(operator.size, generator=generator).to(operator.device, operator.dtype)
    norm = float(v.norm())
    for _ in range(products):
        v = operator.matvec(v / norm)
        norm = float(v.norm())
        if norm == 0:
            break
    return norm


def neumann(
    operator: CurvatureOperator,
    b: Tensor,
    *,
    tolerance: float = 1e-3,
    max_products: int = 1000,
    scale: float | None = None,
    seed: int = 0,
) -> Solution:
    r"""Solve :math:`A x = b` by the Neumann series, with the true residual after each term.

    Args:
        operator: A, symmetric positive definite.
        b: right-hand side, (size,).
        tolerance: relative residual to reach.
        max_products: products to spend at most, the scale's among them.
        scale: :math:`\sigma`; by default 1.2 times ten steps of power iteration.
        seed: of the power iteration.

    A residual that grows a thousandfold ends the series, as it does for an indefinite A; ``converged`` is then False.
    """
    check_vector(operator, b)
    norm = float(b.norm())
    if norm == 0:
        return Solution(torch.zeros_like(b), 0.0, 0, True, (0.0,))
    products = 0 if scale is not None else min(10, max_products)
    sigma = scale or MARGIN * largest_eigenvalue(operator, products=products, seed=seed)
    x, r, history = torch.zeros_like(b), b.clone(), [1.0]
    while tolerance < history[-1] < DIVERGED and products < max_products:
        x = x + r / sigma
        r = b - operator.matvec(x)
        products += 1
        history.append(float(r.norm()) / norm)
    return Solution(x, history[-1], products, history[-1] <= tolerance, tuple(history))


def lissa(
    operators: Sequence[CurvatureOperator],
    b: Tensor,
    *,
    steps: int,
    repeats: int = 1,
    scale: float | None = None,
    seed: int = 0,
) -> Tensor:
    r"""Return LiSSA's estimate of :math:`A^{-1} b`, (size,), for the mean A of the given operators.

    Each of ``steps`` terms uses one operator drawn at random, such as that of one batch; ``repeats`` runs are averaged.
    Without a full product there is no residual to report: what it lacks is bias from few steps and noise from few
    repeats.

    Args:
        operators: one a batch, damped, each with :math:`\lambda_{\max} < 2\sigma`.
        b: right-hand side, (size,).
        steps: terms of the series; the bias falls as :math:`(1 - \lambda_{\min}/\sigma)^{\text{steps}}`.
        repeats: independent runs.
        scale: :math:`\sigma`; by default 1.2 times the largest of the operators' power iterations.
        seed: of the draws.

    Raises:
        CurvlibError: the series diverged.
    """
    sigma = scale or MARGIN * max(largest_eigenvalue(operator, seed=seed) for operator in operators)
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros_like(b)
    for _ in range(repeats):
        x = b / sigma
        for number in torch.randint(len(operators), (steps,), generator=generator).tolist():
            x = x + (b - operators[number].matvec(x)) / sigma
        total += x / repeats
    if not torch.isfinite(total).all():
        raise CurvlibError(f"LiSSA diverged at scale {sigma:.3g}: raise scale, or damp the operators")
    return total
