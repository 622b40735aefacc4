r"""The damped inverse curvature :math:`(H + \lambda I)^{-1}` of the training loss, by name.

| name | curvature | its inverse |
|---|---|---|
| identity | none | the vector itself: gradient dot products |
| fisher | sampled Fisher matrix, low rank | exact, by Woodbury |
| ekfac | layer-wise Kronecker model | exact |
| cg | exact Gauss-Newton matrix | conjugate gradients, preconditioned by the Fisher inverse |
| lbfgs | the same | L-BFGS |
| neumann | the same | the Neumann series |
| hessian | exact Hessian, indefinite away from an optimum | conjugate gradients; ends at negative curvature |

**The rule for damping:** where the training objective holds a ridge :math:`\tfrac\lambda2 \|\theta - \theta_0\|^2`, its
λ is taken. Otherwise λ is a tenth of the mean curvature that a chat sees, :math:`\operatorname{tr} F / n` for
the sampled Fisher matrix F of n chats; Grosse et al. (arXiv 2308.03296) take a tenth of EK-FAC's mean eigenvalue
in the same spirit. All methods get the same λ, so that they differ in the inverse alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curvlib.batches import Batch, Example, make_batches
from curvlib.curvature.ggn import ggn
from curvlib.curvature.hessian import hessian
from curvlib.curvature.kfac import ekfac
from curvlib.curvature.lowrank import LowRankOperator, sampled_fisher
from curvlib.curvature.solve import Solution, conjugate_gradient, lbfgs, neumann
from curvlib.errors import CurvlibError
from curvlib.influence.gradients import BATCH_SIZE, check_examples
from curvlib.parameters import trainable

METHODS = ("identity", "fisher", "ekfac", "cg", "lbfgs", "neumann", "hessian")
RULE = 0.1  # of the mean curvature that a chat sees
EKFAC_RANK = 32  # eigenvectors kept of each factor; the rest shares one eigenvalue
TOLERANCE = 1e-3  # relative residual of a solve


@dataclass(frozen=True)
class Inverse:
    """A damped inverse as a solver.

    Attributes:
        name: of the method.
        damping: λ.
        solve: b (P,) to the solution x (P,), with its residual and the products that it took.
        passes: gradients of a single chat that building it took.
    """

    name: str
    damping: float
    solve: Callable[[Tensor], Solution]
    passes: int

    def __call__(self, b: Tensor) -> Tensor:
        """Return the solution alone."""
        return self.solve(b).solution


def damping_by_rule(fisher: LowRankOperator, factor: float = RULE) -> float:
    """Return λ by the rule above for a sampled Fisher matrix with one row a chat."""
    return factor * fisher.scale


def build_inverse(
    name: str,
    model: nn.Module,
    examples: Sequence[Example],
    *,
    damping: float | None = None,
    factor: float = RULE,
    products: int = 30,
    seed: int = 0,
) -> Inverse:
    """Return the damped inverse curvature of the mean answer-token loss at the model's present parameters.

    Args:
        name: one of the table above.
        model: its trainable parameters are those of the gradients.
        examples: training chats, or a random part of them.
        damping: λ; by default it follows the rule.
        factor: the rule's factor.
        products: most products of one solve.
        seed: of sampled labels and power iteration.

    Cost: two passes a chat for ``fisher`` (which the rule and ``cg`` need as well), four for ``ekfac``.

    Raises:
        CurvlibError: unknown name, no chat, a chat beyond the context, or a damping that is not positive.
    """
    if name not in METHODS:
        raise CurvlibError(f"no inverse is called {name!r}: choose one of {', '.join(METHODS)}")
    check_examples(model, examples, "training chats")
    if name == "identity":
        return Inverse(name, 1.0, exactly(torch.clone), 0)
    chats = make_batches(examples, BATCH_SIZE, pad_id=0)
    fisher = sampled_fisher(model, chats, samples=1, seed=seed) if damping is None or name in ("fisher", "cg") else None
    shift = damping if damping is not None else damping_by_rule(_given(fisher), factor)
    if not shift > 0:
        raise CurvlibError(f"damping is {shift}, expected a positive number: the curvature of few chats is singular")
    passes = len(examples) if fisher else 0
    if name == "fisher":
        return Inverse(name, shift, exactly(_given(fisher).inverse(shift).matvec), passes)
    if name == "ekfac":
        fitted = ekfac(model, chats, rank=EKFAC_RANK, seed=seed).inverse(shift)
        return Inverse(name, shift, exactly(fitted.matvec), passes + 2 * len(examples))
    return Inverse(name, shift, _iterative(name, model, chats, fisher, shift, products, seed), passes)


def exactly(inverse: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Solution]:
    """Return an exact inverse as a solver that spends no product."""
    return lambda b: Solution(inverse(b), 0.0, 0, True, (0.0,))


def displacement(model: nn.Module, inverse: Inverse, gradient: Tensor) -> Tensor:
    r"""Return :math:`-(H + \lambda I)^{-1} g`, (P,): where the optimum goes when a set with gradient g is added.

    This is influence read as a direction: an influence is its inner product with a query's gradient, and with g that of
    the safety set it is the restoration step in the metric of the training chats.
    """
    size = sum(parameter.numel() for parameter in trainable(model).values())
    if gradient.shape != (size,):
        raise CurvlibError(f"a gradient of shape {tuple(gradient.shape)} was given, expected ({size},)")
    return -inverse(gradient)


def _iterative(
    name: str,
    model: nn.Module,
    chats: Sequence[Batch],
    fisher: LowRankOperator | None,
    shift: float,
    products: int,
    seed: int,
) -> Callable[[Tensor], Solution]:
    operator = (hessian if name == "hessian" else ggn)(model, chats).damped(shift)
    stop = {"tolerance": TOLERANCE, "max_products": products}
    if name == "neumann":
        return lambda b: neumann(operator, b, **stop, seed=seed)  # type: ignore[arg-type]  # a float and an int
    if name == "lbfgs":
        return lambda b: lbfgs(operator, b, **stop)  # type: ignore[arg-type]
    preconditioner = fisher.inverse(shift) if fisher and name == "cg" else None
    return lambda b: conjugate_gradient(operator, b, **stop, preconditioner=preconditioner)  # type: ignore[arg-type]


def _given(fisher: LowRankOperator | None) -> LowRankOperator:
    assert fisher is not None
    return fisher
