r"""Restoration: trust-region steps towards safety, measured by the curvature of what must stay.

Each step maximises the safety gain for a given predicted rise of the protected loss,

.. math:: \min_\delta\ g^\top\delta \quad\text{s.t.}\quad \tfrac12\,\delta^\top M\,\delta \le \tau
    \qquad\Rightarrow\qquad \delta = -\sqrt{\frac{2\tau}{g^\top M^{-1} g}}\; M^{-1} g,

and is taken only if held-out losses agree. Re-implemented from the ideas stated by Bach et al. (arXiv 2511.18039), of
which only abstract and introduction were read; objective, metric and safeguards are readings of ours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlib.batches import Batch
from curvlib.errors import CurvlibError
from curvlib.evaluate.behaviour import reference_model
from curvlib.evaluate.generate import Model
from curvlib.parameters import assign, flatten, trainable
from curvlib.progress import bar
from curvlib.restore import objectives
from curvlib.restore.metrics import Metric, build_metric, half_square
from curvlib.restore.objectives import SafetyBatches


@dataclass(frozen=True)
class Budget:
    r"""What restoration may spend.

    Attributes:
        steps: most steps taken.
        products: most curvature products for one step.
        trust: :math:`\tau` of the first step, in nats per answer token of the protected chats. A step that passes at
            once doubles it, a shortened one shrinks it to what passed.
        rise: most that any held-out protected loss may rise above where it started, in nats per token.
        halvings: how often a step that fails on held-out losses is halved before the search ends.
        damping: :math:`\lambda` as a multiple of the metric's mean eigenvalue.
    """

    steps: int = 3
    products: int = 6
    trust: float = 0.05
    rise: float = 0.1
    halvings: int = 4
    damping: float = 1.0


@dataclass(frozen=True)
class HeldOut:
    """Chats that no gradient sees: they judge each step."""

    safety: SafetyBatches
    protected: Mapping[str, Sequence[Batch]]


@dataclass(frozen=True)
class StepRecord:
    r"""One accepted step: held-out losses after it, the :math:`\tau` it used, the l2 norm of all steps so far."""

    safety: float
    protected: dict[str, float]
    trust: float
    norm: float


@dataclass(frozen=True)
class RestorationResult:
    """What happened, and the trainable parameters (P,) ``before`` and ``after``.

    ``curvlib.parameters.assign(trainable(model), result.before)`` undoes the restoration. ``steps[0]`` is the start.
    """

    steps: tuple[StepRecord, ...]
    products: int
    seconds: float
    stop_reason: str
    before: Tensor
    after: Tensor


def restore(
    model: Model,
    task_batches: Sequence[Batch],
    safety_batches: SafetyBatches,
    *,
    held_out: HeldOut,
    benign_batches: Sequence[Batch] = (),
    objective: str = "refusal",
    metric: str = "fisher",
    budget: Budget | None = None,
    seed: int = 0,
) -> RestorationResult:
    """Move the adapter of a fine-tuned ``model`` back to safe behaviour, in place.

    Args:
        model: an aligned model under a fine-tuned adapter, the only trainable parameters.
        task_batches: chats of the fine-tuning task: their curvature is protected.
        safety_batches: harmful requests, refused and complied with.
        held_out: validation chats for the line search, the budget and the stopping rule.
        benign_batches: benign and benign-edgy chats: their curvature is protected too, which keeps refusals selective.
        objective: ``refusal``, ``ascent`` or ``both``, see :mod:`curvlib.restore.objectives`.
        metric: ``fisher``, ``ggn`` or ``identity``, see :mod:`curvlib.restore.metrics`.
        budget: steps, trust region, allowed rise, damping.
        seed: of the metric's sampled labels.

    It stops when the held-out safety loss reaches that of the aligned model (the adapter switched off), when no step
    passes, or when the steps are spent. The metric is measured once, where the restoration starts. Cost of a step: one
    gradient of the safety chats, at most ``products`` + 1 products, a forward pass of the held-out chats a trial.

    Raises:
        CurvlibError: unknown objective or metric, missing chats, or a gradient that is zero or not finite.
    """
    begin, budget = time.perf_counter(), budget or Budget()
    parameters = list(trainable(model).values())
    parts = objectives.terms(objective, safety_batches)
    judge = _Judge(model, objectives.terms(objective, held_out.safety), held_out.protected)
    goal, before = judge.goal(), flatten(parameters)
    records = [judge.measure(trust=0.0, norm=0.0)]
    trust, spent, reason = budget.trust, 0, "steps spent"
    protected = [*task_batches, *benign_batches]
    measured = build_metric(metric, model, protected, damping=budget.damping, products=budget.products, seed=seed)
    for _ in bar(range(budget.steps), desc="restore"):
        direction, products = _direction(measured, objectives.gradient(model, parts, parameters))
        spent += products
        record = _search(judge, records, parameters, before, direction, trust, budget)
        if record is None:
            reason = "no step passed the held-out losses"
            break
        records.append(record)
        trust = 2 * trust if record.trust == trust else record.trust
        if record.safety <= goal:
            reason = "reached the aligned model's loss"
            break
    seconds = time.perf_counter() - begin
    return RestorationResult(tuple(records), spent, seconds, reason, before, flatten(parameters))


@dataclass(frozen=True)
class _Judge:
    """Measures held-out losses of the model as it is."""

    model: Model
    safety: Sequence[objectives.Term]
    protected: Mapping[str, Sequence[Batch]]

    def measure(self, *, trust: float, norm: float) -> StepRecord:
        losses = {name: objectives.mean_loss(self.model, batches) for name, batches in self.protected.items()}
        return StepRecord(objectives.value(self.model, self.safety), losses, trust, norm)

    def goal(self) -> float:
        """Return the aligned model's safety loss."""
        with reference_model(self.model, "adapter off") as aligned:
            return objectives.value(aligned, self.safety)


def _direction(metric: Metric, gradient: Tensor) -> tuple[Tensor, int]:
    r"""Return :math:`-M^{-1}g` scaled to :math:`\tfrac12\,\delta^\top M\delta = 1`, and the products spent."""
    size = float(gradient.norm())
    if not math.isfinite(size) or size == 0:
        raise CurvlibError(f"the safety gradient has norm {size}: check the chats and the adapter")
    step, products = metric.solve(-gradient)
    return step / math.sqrt(half_square(metric, step)), products + 1


@torch.no_grad()
def _search(
    judge: _Judge,
    records: list[StepRecord],
    parameters: list[Tensor],
    before: Tensor,
    direction: Tensor,
    trust: float,
    budget: Budget,
) -> StepRecord | None:
    """Take the longest step whose held-out losses pass; otherwise leave the parameters as they were."""
    here = flatten(parameters)
    for halving in range(budget.halvings + 1):
        radius = trust / 4**halving
        there = here + math.sqrt(radius) * direction
        assign(parameters, there)
        record = judge.measure(trust=radius, norm=float((there - before).norm()))
        rises = [record.protected[name] - start for name, start in records[0].protected.items()]
        if record.safety < records[-1].safety and all(rise <= budget.rise for rise in rises):
            return record
    assign(parameters, here)
    return None
