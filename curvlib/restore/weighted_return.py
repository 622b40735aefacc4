r"""The curvature-weighted way back from a fine-tuned adapter to its aligned base; nothing is trained on refusals.

With the factor A of every adapter fixed, :math:`\Delta W = s\,BA` is linear in B, so that B is a linear coordinate of
the way from the fine-tuned model, :math:`\theta_f = B`, to the base, :math:`\theta = 0`. The point on it that minimises

.. math:: \tfrac12(\theta-\theta_f)^\top M_t\,(\theta-\theta_f) + \tfrac c2\,\theta^\top M_s\,\theta
    \qquad\Rightarrow\qquad \theta = (M_t + c M_s)^{-1} M_t\,\theta_f

keeps what the task needs and returns what safety needs. Its two terms are the second-order models of
:math:`\mathrm{KL}(p_f \| p_\theta)` on the task, measured at :math:`\theta_f`, and of
:math:`\mathrm{KL}(p_0 \| p_\theta)` on harmful and benign requests, measured at the base: there both divergences are
least. :math:`M = F + \lambda I`, each with its own λ. With M = I it scales the adapter by 1/(1 + c); with diagonal F it
is the merging of Matena and Raffel (arXiv 2111.09832). What is solved for is the way,
:math:`\theta - \theta_f = -(M_t + c M_s)^{-1} c M_s\,\theta_f`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from curvlib.batches import Batch
from curvlib.curvature.ggn import ggn
from curvlib.curvature.inverse import EKFAC_RANK
from curvlib.curvature.kfac import ekfac
from curvlib.curvature.lowrank import LowRankInverse, LowRankOperator, sampled_fisher
from curvlib.curvature.operator import CurvatureOperator, FunctionOperator, Operator
from curvlib.curvature.solve import Solution, conjugate_gradient
from curvlib.errors import CurvlibError
from curvlib.generate import Model
from curvlib.parameters import assign, flatten, shifted, trainable
from curvlib.progress import bar
from curvlib.restore.metrics import DRAWS, TOLERANCE
from curvlib.restore.objectives import SafetyBatches
from curvlib.restore.outcome import Budget, HeldOut, Judge, RestorationResult, best

METRICS = ("identity", "fisher", "ggn", "ekfac")
STRENGTHS = tuple(10 ** (power / 2) for power in range(-1, 5))  # c from 0.3 to 100, two in each decade


def weighted_return(
    model: Model,
    task_batches: Sequence[Batch],
    safety_batches: SafetyBatches,
    *,
    held_out: HeldOut,
    benign_batches: Sequence[Batch] = (),
    metric: str = "fisher",
    budget: Budget | None = None,
    seed: int = 0,
    strengths: Sequence[float] = STRENGTHS,
) -> RestorationResult:
    """Move the adapter of a fine-tuned ``model`` part of the way back to its aligned base, in place.

    The strength c is chosen on the held-out chats: of all ``strengths``, the one of least refusal loss among those that
    raise no protected loss by more than ``budget.rise``; the first that does ends the search. If none improves, the
    adapter stays as it was.

    Args:
        model: an aligned model under a LoRA adapter; only its factors B move.
        task_batches: chats of the fine-tuning task: what stays.
        safety_batches: harmful requests with refusals, which say where the base is compared; they are no targets.
        held_out: validation chats.
        benign_batches: benign and benign-edgy chats, on which the base's behaviour comes back too.
        metric: ``fisher`` (sampled, low rank, solved exactly), ``ggn`` or ``ekfac`` (by conjugate gradients with the
            former as preconditioner), or ``identity``, which scales the adapter.
        budget: its ``rise``, ``damping`` and ``products`` are used.
        seed: of the sampled labels.
        strengths: candidates for c, ascending.

    Cost: the curvature of both sets once; for each c one solve and a forward pass of the held-out chats.

    Raises:
        CurvlibError: unknown metric, no LoRA adapter, missing chats, or an adapter that is zero.
    """
    if metric not in METRICS:
        raise CurvlibError(f"a return has no metric {metric!r}: choose one of {', '.join(METRICS)}")
    if not (safety_batches.refusals and task_batches):
        raise CurvlibError("a return needs chats of the task and refused harmful requests: give both")
    budget, judge = budget or Budget(), Judge.of(model, "refusal", held_out)
    steps = [judge.measure()]
    with only_b(model) as parameters:
        way = way_back(
            model, task_batches, [*safety_batches.refusals, *benign_batches], metric, budget.damping, seed=seed
        )
        products, moves = 0, dict[float, Tensor]()
        for strength in bar(strengths, desc="return"):
            found = way.solve(strength, budget.products)
            products, moves[strength] = products + found.products, found.solution
            with shifted(parameters, found.solution):
                record = judge.measure(trust=strength, norm=float(found.solution.norm()))
            if not judge.passes(record, budget.rise):  # a stronger return pays more still
                break
        chosen = best(judge, judge.trials[1:], budget.rise)
        if chosen:
            steps.append(chosen)
            assign(parameters, way.tuned + moves[chosen.trust])
    reason = f"strength {chosen.trust:.3g} chosen" if chosen else "no strength passed the held-out losses"
    spent = products if metric == "ggn" else 0  # EK-FAC's products pass through no model
    return judge.result(steps, reason, products=spent, gradients=way.gradients)


@contextmanager
def only_b(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Leave only LoRA's factors B trainable inside the ``with`` block, and yield them by name.

    Raises:
        CurvlibError: something besides LoRA's A and B is trainable, or no B is: B = 0 would not be the base.
    """
    every = trainable(model)
    factors = {name: parameter for name, parameter in every.items() if ".lora_B." in name}
    foreign = [name for name in every if ".lora_A." not in name and name not in factors]
    if foreign or not factors:
        reason = f"{foreign[0]} is trainable" if foreign else "no lora_B is trainable"
        raise CurvlibError(f"a return needs a plain LoRA adapter alone, but {reason}: give such an adapter")
    try:
        for name, parameter in every.items():
            parameter.requires_grad_(name in factors)
        yield factors
    finally:
        for parameter in every.values():
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class Valley:
    r"""A quadratic bowl :math:`F + \lambda I`; the rows U of a sampled, low-rank F precondition any other one."""

    curvature: CurvatureOperator
    damping: float
    rows: Tensor

    def matvec(self, v: Tensor) -> Tensor:
        """Return the damped product with v (P,)."""
        return self.curvature.matvec(v) + self.damping * v


@dataclass(frozen=True)
class WayBack:
    r"""Both valleys, the fine-tuned point :math:`\theta_f` (P,) and the pull :math:`M_s\theta_f` of safety on it."""

    task: Valley
    safety: Valley
    tuned: Tensor
    pull: Tensor
    gradients: int = 0

    @classmethod
    def between(cls, task: Valley, safety: Valley, tuned: Tensor, gradients: int = 0) -> WayBack:
        """Return the way from the bottom of the task's valley, ``tuned``, to that of safety's, zero."""
        return cls(task, safety, tuned, safety.matvec(tuned), gradients)

    def solve(self, strength: float, products: int) -> Solution:
        r"""Return :math:`\theta - \theta_f` for c = ``strength``; low-rank curvatures take no product."""
        stacked = torch.cat([self.task.rows, strength**0.5 * self.safety.rows])
        damping = self.task.damping + strength * self.safety.damping
        inverse, b = LowRankInverse(stacked, damping), -strength * self.pull
        task, safety = self.task.curvature, self.safety.curvature
        if isinstance(task, LowRankOperator) and isinstance(safety, LowRankOperator):
            return Solution(inverse.matvec(b), 0.0, 0, True, (0.0,))
        both = FunctionOperator(
            lambda v: task.matvec(v) + strength * safety.matvec(v) + damping * v, len(b), b.dtype, b.device
        )
        return conjugate_gradient(both, b, tolerance=TOLERANCE, max_products=products, preconditioner=inverse)


def way_back(
    model: nn.Module, task: Sequence[Batch], back: Sequence[Batch], metric: str, damping: float, *, seed: int
) -> WayBack:
    """Measure both curvatures over the trainable parameters: of ``task`` where they are, of ``back`` at zero.

    ``damping`` counts in mean non-zero eigenvalues of each set's sampled Fisher matrix.
    """
    parameters = trainable(model)
    tuned = flatten(parameters)
    if not tuned.any():
        raise CurvlibError("the adapter is zero, so the model is its base already: give a fine-tuned adapter")
    stay = _valley(model, task, metric, damping, seed)
    with shifted(parameters, -tuned):
        safe = _valley(model, back, metric, damping, seed)
    if metric == "ggn":
        safe = replace(safe, curvature=_at_zero(safe.curvature, parameters))
    passes = {"identity": 0, "fisher": 1, "ggn": 1, "ekfac": 1 + 2 // DRAWS}[
        metric
    ]  # EK-FAC differentiates all chats twice more
    return WayBack.between(stay, safe, tuned, passes * (len(stay.rows) + len(safe.rows)))


def _valley(model: nn.Module, batches: Sequence[Batch], metric: str, damping: float, seed: int) -> Valley:
    if metric == "identity":
        none = flatten(trainable(model))[None][:0]
        return Valley(LowRankOperator(none), 1.0, none)
    fisher = sampled_fisher(model, batches, samples=DRAWS, seed=seed)
    curvature: CurvatureOperator = fisher
    if metric == "ggn":
        curvature = ggn(model, batches)
    elif metric == "ekfac":
        curvature = ekfac(model, batches, rank=EKFAC_RANK, seed=seed)
    return Valley(curvature, damping * fisher.scale, fisher.rows)


def _at_zero(operator: CurvatureOperator, parameters: dict[str, Tensor]) -> Operator:
    """Return the operator with the parameters at zero during each product."""

    def product(v: Tensor) -> Tensor:
        with shifted(parameters, -flatten(parameters)):
            return operator.matvec(v)

    return FunctionOperator(product, operator.size, operator.dtype, operator.device)
