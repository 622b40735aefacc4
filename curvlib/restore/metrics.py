r"""How restoration measures a step: the metric M of the trust region :math:`\tfrac12\,\delta^\top M\delta \le \tau`.

The steepest descent direction of a loss with gradient g in the metric M is :math:`-M^{-1}g`: along it, the loss falls
most for what the protected behaviour pays. The metrics are the damped curvatures of :mod:`curvlib.curvature.inverse`,
and two that see a curvature along a few steps only, by an L-BFGS inverse with Powell's damping: ``lbfgs`` the Hessian
of the protected loss, ``composite`` that of :math:`-L_\text{comply} + \mu L_\text{protected}`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvlib.batches import Batch
from curvlib.curvature.hessian import hessian
from curvlib.curvature.inverse import Inverse, damped_inverse, exactly
from curvlib.curvature.lowrank import sampled_fisher
from curvlib.curvature.operator import Operator
from curvlib.curvature.solve import lbfgs_inverse
from curvlib.errors import CurvlibError
from curvlib.generate import Model
from curvlib.restore.objectives import TASK_WEIGHT

METRICS = ("identity", "diagonal", "fisher", "ggn", "hessian", "ekfac", "lbfgs", "composite")
DRAWS = 2  # sampled labels a chat: the Fisher matrix then has two rows for each
TOLERANCE = 1e-2  # relative residual of a solve: a direction needs no more


def build_metric(
    name: str,
    model: Model,
    protected: Sequence[Batch],
    *,
    damping: float,
    products: int,
    seed: int = 0,
    compliances: Sequence[Batch] = (),
    along: Tensor | None = None,
    steps: Sequence[Tensor] = (),
) -> Inverse:
    r"""Return the damped metric M called ``name`` at the model's present parameters, as a solver of :math:`M x = b`.

    Args:
        name: one of :data:`METRICS`.
        model: its trainable parameters span the space of steps.
        protected: chats whose behaviour the metric protects.
        damping: :math:`\lambda` as a multiple of the sampled Fisher's mean non-zero eigenvalue, the same λ in every
            metric; unused by ``identity``.
        products: most products of one solve, or curvature pairs of L-BFGS.
        seed: of the sampled labels and of random steps.
        compliances: harmful requests that are agreed to, for ``composite``.
        along: the safety gradient (P,), along which L-BFGS measures its newest pair; a random step if None.
        steps: displacements (P,) for its other pairs, oldest first, such as those of a trajectory; random by default.

    Raises:
        CurvlibError: the name is unknown, or chats are missing.
    """
    if name not in METRICS:
        raise CurvlibError(f"no metric is called {name!r}: choose one of {', '.join(METRICS)}")
    if name not in ("lbfgs", "composite"):
        return damped_inverse(
            name,
            model,
            protected,
            factor=damping,
            draws=DRAWS,
            products=products,
            tolerance=TOLERANCE,
            seed=seed,
        )
    if not protected or (name == "composite" and not compliances):
        raise CurvlibError(f"metric {name!r} lacks chats: give chats to protect, for 'composite' compliances too")
    fisher = sampled_fisher(model, protected, samples=DRAWS, seed=seed)
    shift, operator = damping * fisher.scale, _plus_hessian(name, model, protected, compliances)
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(fisher.size, generator=generator).to(fisher.rows) for _ in range(products)]
    newest = [] if along is None else [along]  # the most trusted pair
    chosen = [*(steps or drawn[: products - len(newest)]), *newest][-products:]
    units = [step / step.norm() for step in chosen]
    inverse = lbfgs_inverse((unit, operator.matvec(unit) + shift * unit) for unit in units)
    return Inverse(name, shift, exactly(inverse.matvec), len(fisher.rows), len(units))


def _plus_hessian(name: str, model: Model, protected: Sequence[Batch], compliances: Sequence[Batch]) -> Operator:
    whole = hessian(model, protected)
    return TASK_WEIGHT * whole - hessian(model, compliances) if name == "composite" else whole
