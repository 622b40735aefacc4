r"""The damped inverse curvature :math:`(C + \lambda I)^{-1}` of the mean answer-token loss, by name.

| name | curvature C | its inverse |
|---|---|---|
| identity | none | the vector itself: the plain gradient |
| diagonal | diagonal of the sampled Fisher matrix | exact |
| fisher | sampled Fisher matrix, low rank | exact, by Woodbury |
| ekfac | layer-wise Kronecker model | exact |
| ggn | exact Gauss-Newton matrix | conjugate gradients, preconditioned by the Fisher inverse |
| lbfgs | the same | L-BFGS |
| hessian | exact Hessian, indefinite away from an optimum | as ggn; it ends at negative curvature and tells it |

Influence solves for a query's gradient, restoration for that of refusals: with C from the chats that must stay,
:math:`-(C + \lambda I)^{-1} g` is the step that lowers the loss of gradient g most for a given rise of theirs. For the
choice of λ see :mod:`curvlib.curvature.damping`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from curvlib.batches import Batch
from curvlib.curvature.ggn import ggn
from curvlib.curvature.hessian import hessian
from curvlib.curvature.kfac import ekfac
from curvlib.curvature.kronecker import EKFAC
from curvlib.curvature.lanczos import lanczos
from curvlib.curvature.lowrank import LowRankOperator, sampled_fisher
from curvlib.curvature.operator import DiagonalOperator, Operator
from curvlib.curvature.solve import Solution, conjugate_gradient, lbfgs
from curvlib.errors import CurvlibError

METHODS = ("identity", "diagonal", "fisher", "ekfac", "ggn", "lbfgs", "hessian")
SAMPLED = ("diagonal", "fisher", "ggn")  # read the sampled Fisher matrix; the others need it for a unit of damping only
EKFAC_RANK = 32  # eigenvectors kept of each factor; the rest shares one eigenvalue


@dataclass(frozen=True)
class Inverse:
    """A damped inverse as a solver, and what building it took.

    Attributes:
        name: of the method.
        damping: λ.
        solve: b (P,) to the solution x (P,), with its residual and the products that it took.
        gradients: gradients of a single chat.
        products: curvature products.
    """

    name: str
    damping: float
    solve: Callable[[Tensor], Solution]
    gradients: int = 0
    products: int = 0

    def __call__(self, b: Tensor) -> Tensor:
        """Return the solution alone."""
        return self.solve(b).solution


@dataclass(frozen=True)
class Fit:
    """A curvature C that was fitted to some chats and is not damped yet.

    Attributes:
        name: of the method.
        operator: C; None for the identity.
        fisher: the sampled Fisher matrix of the same chats: preconditioner and unit of damping. None if not sampled.
        gradients: gradients of a single chat that the fit took.
    """

    name: str
    operator: Operator | None = None
    fisher: LowRankOperator | None = None
    gradients: int = 0

    @property
    def unit(self) -> float:
        """The mean eigenvalue of C itself, the unit of its damping; of a low-rank matrix that of the non-zero ones."""
        if isinstance(self.operator, DiagonalOperator):
            return float(self.operator.diagonal.mean())
        if isinstance(self.operator, EKFAC):
            return self.operator.damping_scale
        if self.fisher is None:
            raise CurvlibError(f"the scale of {self.name!r} is not known: give fit() the sampled Fisher matrix")
        scale = self.fisher.scale
        return scale if self.name == "fisher" else scale * len(self.fisher.rows) / self.fisher.size

    def above(self, damping: float) -> int | None:
        """Return how many eigenvalues of C exceed λ, where they are known: of the exact inverses."""
        if isinstance(self.operator, DiagonalOperator):
            return int((self.operator.diagonal > damping).sum())
        if isinstance(self.operator, LowRankOperator):
            gram = (self.operator.rows @ self.operator.rows.T).double()
            return int((torch.linalg.eigvalsh(gram) > damping).sum())
        return self.operator.above(damping) if isinstance(self.operator, EKFAC) else None

    def inverse(self, damping: float, *, products: int = 30, tolerance: float = 1e-3) -> Inverse:
        """Return the inverse of C + λ I; ``products`` and ``tolerance`` are of iterative solves.

        Raises:
            CurvlibError: λ is not positive.
        """
        if not damping > 0:
            raise CurvlibError(f"damping is {damping}, expected a positive number: few chats' curvature is singular")
        return Inverse(self.name, damping, self._solver(damping, products, tolerance), self.gradients)

    def _solver(self, damping: float, products: int, tolerance: float) -> Callable[[Tensor], Solution]:
        if self.operator is None:
            return exactly(torch.clone)
        if isinstance(self.operator, DiagonalOperator):
            return exactly(DiagonalOperator(1 / (self.operator.diagonal + damping)).matvec)
        if isinstance(self.operator, LowRankOperator | EKFAC):
            return exactly(self.operator.inverse(damping).matvec)
        stop: dict[str, Any] = {"tolerance": tolerance, "max_products": products}
        if self.name == "lbfgs":
            return partial(lbfgs, self.operator.damped(damping), **stop)
        near = self.fisher.inverse(damping) if self.fisher else None
        return partial(conjugate_gradient, self.operator.damped(damping), **stop, preconditioner=near)

    def solutions(self, b: Tensor, dampings: Sequence[float], *, products: int = 30) -> Iterator[Tensor]:
        r"""Yield :math:`(C + \lambda I)^{-1} b`, (P,), for each λ.

        Exact inverses are applied; the others share one Krylov space of b, in which every λ has the solution that
        conjugate gradients reach after as many products. Cost: at most ``products`` products for all λ together.
        """
        if self.operator is None or isinstance(self.operator, DiagonalOperator | LowRankOperator | EKFAC):
            yield from (self.inverse(damping)(b) for damping in dampings)
            return
        *_, krylov = lanczos(self.operator, products, torch.Generator().manual_seed(0), start=b)
        values, vectors = krylov.ritz()
        for damping in dampings:
            mix = vectors @ (vectors[0] / (values + damping)) * float(b.norm())
            yield krylov.basis.T @ mix.to(krylov.basis)


def fit(
    name: str,
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    weights: Sequence[float] | None = None,
    fisher: LowRankOperator | None = None,
    draws: int = 1,
    seed: int = 0,
) -> Fit:
    """Fit a curvature at the model's present parameters.

    Args:
        name: see the table above.
        model: its trainable parameters are LoRA's, or those of linear layers.
        batches: chats; every answer token counts equally.
        weights: a factor on the curvature of each batch.
        fisher: the sampled Fisher matrix of these chats and weights, if it has been made already.
        draws: sets of labels that it is sampled from otherwise, where the method reads it.
        seed: of the labels.

    Cost: one gradient for the sampled Fisher matrix and a backward pass for each further draw; two gradients for
    ``ekfac``, five of a large model; nothing for the other ones.

    Raises:
        CurvlibError: the name is unknown, or there are no chats.
    """
    if name not in METHODS:
        raise CurvlibError(f"no damped inverse is called {name!r}: choose one of {', '.join(METHODS)}")
    if name == "identity":
        return Fit(name)
    if not batches:
        raise CurvlibError(f"{name!r} got no chats to take the curvature of: give some, or use 'identity'")
    if fisher is None and name in SAMPLED:
        fisher = sampled_fisher(model, batches, weights=weights, samples=draws, seed=seed)
    passes = len(fisher.rows) if fisher else 0
    operator: Operator
    if name == "ekfac":
        operator = ekfac(model, batches, weights=weights, rank=EKFAC_RANK, seed=seed)
        return Fit(name, operator, fisher, passes + 2 * sum(map(len, batches)))
    if name in ("fisher", "diagonal"):
        assert fisher
        squares = fisher.rows.square().sum(dim=0).to(next(model.parameters()).device)
        operator = fisher if name == "fisher" else DiagonalOperator(squares)
        return Fit(name, operator, fisher, passes)
    operator = exact = (hessian if name == "hessian" else ggn)(model, batches)
    if weights is not None:
        tokens, exact.weights = exact.weight, [w * count for w, count in zip(weights, exact.weights, strict=True)]
        operator = (exact.weight / tokens) * exact  # the operator divides by the sum of its weights
    return Fit(name, operator, fisher, passes)


def exactly(inverse: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Solution]:
    """Return an exact inverse as a solver that spends no product."""
    return lambda b: Solution(inverse(b))
