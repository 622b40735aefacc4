r"""How restoration measures a step: the metric M of the trust region :math:`\tfrac12\,\delta^\top M\delta \le \tau`.

The steepest descent direction of a loss with gradient g in the metric M is :math:`-M^{-1}g`: along it, the loss falls
most for what the protected behaviour pays. With M = I this is the plain gradient; with the Gauss-Newton matrix of
the task and of benign chats, :math:`M = G + \lambda I`, it is minus the influence of the safety set on their optimum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curvlib.batches import Batch
from curvlib.curvature.ggn import ggn
from curvlib.curvature.lowrank import sampled_fisher
from curvlib.curvature.operator import CurvatureOperator, IdentityOperator
from curvlib.curvature.solve import conjugate_gradient
from curvlib.errors import CurvlibError
from curvlib.parameters import trainable

METRICS = ("identity", "fisher", "ggn")


@dataclass(frozen=True)
class Metric:
    """A damped metric as an operator, with a solver for :math:`M x = b` that tells the products it spent."""

    operator: CurvatureOperator
    solve: Callable[[Tensor], tuple[Tensor, int]]


def build_metric(
    name: str, model: nn.Module, protected: Sequence[Batch], *, damping: float, products: int, seed: int = 0
) -> Metric:
    r"""Return the metric called ``name`` at the model's present parameters.

    Args:
        name: ``identity``; ``fisher``, from sampled gradients of the protected chats, inverted exactly; or ``ggn``, the
            exact Gauss-Newton matrix, solved by conjugate gradients with the former as preconditioner.
        model: its trainable parameters span the space of steps.
        protected: chats whose behaviour the metric protects.
        damping: :math:`\lambda` as a multiple of the sampled Fisher's mean non-zero eigenvalue; unused by ``identity``.
        products: most Gauss-Newton products of one solve.
        seed: of the sampled labels.

    Raises:
        CurvlibError: the name is unknown, or nothing is given to protect.
    """
    if name not in METRICS:
        raise CurvlibError(f"no metric is called {name!r}: choose one of {', '.join(METRICS)}")
    parameters = trainable(model)
    if name == "identity":
        first = next(iter(parameters.values()))
        size = sum(parameter.numel() for parameter in parameters.values())
        return Metric(IdentityOperator(size, first.dtype, first.device), lambda b: (b.clone(), 0))
    if not protected:
        raise CurvlibError(f"metric {name!r} got no chats to protect: give task or benign chats, or use 'identity'")
    fisher = sampled_fisher(model, protected, seed=seed)
    shift = damping * fisher.scale
    inverse = fisher.inverse(shift)
    if name == "fisher":
        return Metric(fisher.damped(shift), lambda b: (inverse.matvec(b), 0))
    operator = ggn(model, protected).damped(shift)

    def solve(b: Tensor) -> tuple[Tensor, int]:
        solution = conjugate_gradient(operator, b, tolerance=1e-2, max_products=products, preconditioner=inverse)
        return solution.solution, solution.products

    return Metric(operator, solve)


def half_square(metric: Metric, step: Tensor) -> float:
    r"""Return :math:`\tfrac12\,\delta^\top M\delta`, the rise of the protected loss that the metric predicts (nats)."""
    return 0.5 * float(torch.dot(step, metric.operator.matvec(step)))
