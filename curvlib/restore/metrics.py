r"""How restoration measures a step: the metric M of the trust region :math:`\tfrac12\,\delta^\top M\delta \le \tau`.

The steepest descent direction of a loss with gradient g in the metric M is :math:`-M^{-1}g`: along it, the loss falls
most for what the protected behaviour pays. With M = I this is the plain gradient; with the Gauss-Newton matrix of
the task and of benign chats, :math:`M = G + \lambda I`, it is minus the influence of the safety set on their optimum.

| name | M, before λI is added | its inverse |
|---|---|---|
| identity | none: M = I | itself |
| fisher | Fisher matrix of sampled labels, low rank | exact, by Woodbury |
| ggn | exact Gauss-Newton matrix | conjugate gradients, preconditioned by the former |
| hessian | exact Hessian, indefinite | the same; ends at a direction of negative curvature and tells it |
| ekfac | layer-wise Kronecker model | exact |
| lbfgs | Hessian of the protected loss, seen along a few steps | L-BFGS with Powell's damping |
| composite | Hessian of −L_comply + μ L_protected, seen along a few steps | the same |

A metric may also be saved when an adapter is trained and serve without any of its data: :class:`SavedMetric`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curvlib.batches import Batch
from curvlib.curvature.ggn import ggn
from curvlib.curvature.hessian import hessian
from curvlib.curvature.kfac import ekfac
from curvlib.curvature.kronecker import EKFAC
from curvlib.curvature.lowrank import LowRankOperator, sampled_fisher
from curvlib.curvature.operator import CurvatureOperator, Operator
from curvlib.curvature.solve import Solution, conjugate_gradient, lbfgs_inverse
from curvlib.errors import CurvlibError
from curvlib.restore.objectives import TASK_WEIGHT

DRAWS = 2  # sampled labels a chat: the Fisher matrix then has two rows for each
EKFAC_RANK = 32  # eigenvectors kept of each factor; the rest shares one eigenvalue
TOLERANCE = 1e-2  # relative residual of a solve: a direction needs no more


@dataclass(frozen=True)
class Metric:
    r"""A damped metric as a solver for :math:`M x = b`, and what building it took.

    For the exact inverses, and for conjugate gradients from zero at any step, :math:`x^\top M x = b^\top x`.
    """

    solve: Callable[[Tensor], Solution]
    gradients: int = 0
    products: int = 0


@dataclass(frozen=True)
class SavedMetric:
    r"""An EK-FAC model that was fitted where the restoration starts, to ``rows`` gradients; no chats are needed.

    :math:`\lambda` counts in traces over ``rows``, the mean non-zero eigenvalue of a sampled Fisher of as many rows.
    """

    model: EKFAC
    rows: int

    def damped(self, damping: float) -> Metric:
        r"""Return the metric with :math:`\lambda` in that unit; its inverse is exact."""
        unit = self.model.damping_scale * self.model.size / self.rows
        return Metric(exactly(self.model.inverse(damping * unit).matvec))


@dataclass(frozen=True)
class Setting:
    """Everything that a metric may be built from; see :func:`build_metric`."""

    model: nn.Module
    protected: Sequence[Batch]
    compliances: Sequence[Batch]
    along: Tensor | None
    fisher: LowRankOperator
    shift: float
    products: int
    seed: int

    @property
    def rows(self) -> int:
        """Gradients that the sampled Fisher matrix took."""
        return len(self.fisher.rows)


def build_metric(
    name: str,
    model: nn.Module,
    protected: Sequence[Batch],
    *,
    damping: float,
    products: int,
    seed: int = 0,
    compliances: Sequence[Batch] = (),
    along: Tensor | None = None,
) -> Metric:
    r"""Return the metric called ``name`` at the model's present parameters.

    Args:
        name: see the table above.
        model: its trainable parameters span the space of steps.
        protected: chats whose behaviour the metric protects.
        damping: :math:`\lambda` as a multiple of the sampled Fisher's mean non-zero eigenvalue, the same λ in every
            metric; unused by ``identity``.
        products: most products of one solve, or curvature pairs of L-BFGS.
        seed: of the sampled labels and of L-BFGS's random steps.
        compliances: harmful requests that are agreed to, for ``composite``.
        along: the safety gradient (P,), along which L-BFGS measures its newest pair; a random step if None.

    Raises:
        CurvlibError: the name is unknown, or nothing is given to protect.
    """
    if name not in METRICS:
        raise CurvlibError(f"no metric is called {name!r}: choose one of {', '.join(METRICS)}")
    if name == "identity":
        return Metric(exactly(lambda b: b.clone()))
    if not protected:
        raise CurvlibError(f"metric {name!r} got no chats to protect: give task or benign chats, or use 'identity'")
    fisher = sampled_fisher(model, protected, samples=DRAWS, seed=seed)
    shift = damping * fisher.scale
    return _BUILDERS[name](Setting(model, protected, compliances, along, fisher, shift, products, seed))


def exactly(inverse: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Solution]:
    """Return an exact inverse as a solver that spends no product."""
    return lambda b: Solution(inverse(b), 0.0, 0, True, (0.0,))


def by_conjugate_gradients(
    operator: CurvatureOperator, preconditioner: CurvatureOperator | None, products: int
) -> Callable[[Tensor], Solution]:
    """Return a solver by preconditioned conjugate gradients from zero, of at most ``products`` products."""

    def solve(b: Tensor) -> Solution:
        return conjugate_gradient(
            operator, b, tolerance=TOLERANCE, max_products=products, preconditioner=preconditioner
        )

    return solve


def _fisher(given: Setting) -> Metric:
    return Metric(exactly(given.fisher.inverse(given.shift).matvec), given.rows)


def _ggn(given: Setting) -> Metric:
    return _solved(given, ggn(given.model, given.protected))


def _hessian(given: Setting) -> Metric:
    return _solved(given, hessian(given.model, given.protected))


def _solved(given: Setting, operator: Operator) -> Metric:
    preconditioner = given.fisher.inverse(given.shift)
    return Metric(by_conjugate_gradients(operator.damped(given.shift), preconditioner, given.products), given.rows)


def _ekfac(given: Setting) -> Metric:
    model = ekfac(given.model, given.protected, rank=EKFAC_RANK, seed=given.seed)
    return Metric(exactly(model.inverse(given.shift).matvec), 3 * given.rows)  # two passes of its own; one for the unit


def _lbfgs(given: Setting) -> Metric:
    return _from_pairs(given, hessian(given.model, given.protected))


def _composite(given: Setting) -> Metric:
    if not given.compliances:
        raise CurvlibError("metric 'composite' got no compliances: give harmful prompts with answers that agree")
    gain = hessian(given.model, given.compliances)
    return _from_pairs(given, TASK_WEIGHT * hessian(given.model, given.protected) - gain)


def _from_pairs(given: Setting, operator: Operator) -> Metric:
    """Measure pairs along unit steps, random ones first and the safety gradient last, the newest and most trusted."""
    generator = torch.Generator().manual_seed(given.seed)
    steps = [torch.randn(operator.size, generator=generator).to(given.fisher.rows) for _ in range(given.products)]
    if given.along is not None:
        steps[-1] = given.along
    damped, units = operator.damped(given.shift), [step / step.norm() for step in steps]
    pairs = [(step, damped.matvec(step)) for step in units]
    return Metric(exactly(lbfgs_inverse(pairs).matvec), given.rows, given.products)


_BUILDERS: dict[str, Callable[[Setting], Metric]] = {
    "fisher": _fisher,
    "ggn": _ggn,
    "hessian": _hessian,
    "ekfac": _ekfac,
    "lbfgs": _lbfgs,
    "composite": _composite,
}
METRICS = ("identity", *_BUILDERS)
