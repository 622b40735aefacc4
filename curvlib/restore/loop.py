r"""Restoration: trust-region steps towards safety, measured by the curvature of what must stay.

Each step maximises the safety gain for a given predicted rise of the protected loss,

.. math:: \min_\delta\ g^\top\delta \quad\text{s.t.}\quad \tfrac12\,\delta^\top M\,\delta \le \tau
    \qquad\Rightarrow\qquad \delta = -\sqrt{\frac{2\tau}{g^\top M^{-1} g}}\; M^{-1} g,

and is taken only if held-out losses agree. Optionally the step is first made orthogonal to the gradient
:math:`g_t` of the protected loss in that metric, so that this loss does not rise to first order:

.. math:: \delta \leftarrow \delta - M^{-1}g_t\, \frac{g_t^\top\delta}{g_t^\top M^{-1} g_t} .

Re-implemented from the ideas stated by Bach et al. (arXiv 2511.18039), of which only abstract and introduction were
read; objective, metric and safeguards are readings of ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from curvlib.batches import Batch
from curvlib.curvature.inverse import Inverse
from curvlib.errors import CurvlibError
from curvlib.generate import Model
from curvlib.nf4 import kept_weights
from curvlib.parameters import assign, flatten, trainable
from curvlib.progress import bar
from curvlib.restore import objectives
from curvlib.restore.metrics import build_metric
from curvlib.restore.objectives import SafetyBatches, Term
from curvlib.restore.outcome import Budget, HeldOut, Judge, RestorationResult, StepRecord, chats
from curvlib.restore.weighted_return import weighted_return

POOR, GOOD = 0.25, 0.75  # ratios of actual to predicted gain between which a trust region keeps its size


def restore(
    model: Model,
    task_batches: Sequence[Batch],
    safety_batches: SafetyBatches,
    *,
    held_out: HeldOut,
    benign_batches: Sequence[Batch] = (),
    objective: str = "refusal",
    metric: str | Inverse = "fisher",
    budget: Budget | None = None,
    goal: float | None = None,
    seed: int = 0,
) -> RestorationResult:
    """Move the adapter of a fine-tuned ``model`` back to safe behaviour, in place.

    Args:
        model: an aligned model under a fine-tuned adapter, the only trainable parameters.
        task_batches: chats of the fine-tuning task: their curvature is protected.
        safety_batches: harmful requests, refused and complied with.
        held_out: validation chats for the line search, the budget and the stopping rule.
        benign_batches: benign and benign-edgy chats: their curvature is protected too, which keeps refusals selective.
        objective: ``refusal``, ``ascent``, ``both``, ``composite``, ``margin`` or ``distill``, see
            :mod:`curvlib.restore.objectives`; or ``return``, see :mod:`curvlib.restore.weighted_return`.
        metric: a name, see :mod:`curvlib.restore.metrics`, or a damped inverse, such as a saved EK-FAC's or that of
            :func:`curvlib.curvature.damping.damped_by_rule`, which needs neither task nor benign chats here.
        budget: steps, trust region, allowed rise, damping.
        goal: held-out safety loss at which it stops; by default the objective's own, or else the aligned model's, which
            is the adapter switched off.
            A ``return`` takes no steps and has none.
        seed: of the metric's sampled labels.

    It stops when the held-out safety loss reaches the goal, when no step passes (as where the protected losses have
    used up their allowed rise), or when the steps are spent. The
    metric is measured once, where the restoration starts. Cost of a step: one gradient of the safety chats (and one of
    the protected chats if steps are to be orthogonal to it), at most ``products`` products a solve, a forward pass of
    the held-out chats a trial.

    Raises:
        CurvlibError: unknown objective or metric, missing chats, or a gradient that is zero or not finite.
    """
    budget, benign = budget or Budget(), benign_batches
    if objective == "return":
        if not isinstance(metric, str):
            raise CurvlibError("a return measures its own curvature: give one of its metrics by name")
        return weighted_return(
            model,
            task_batches,
            safety_batches,
            held_out=held_out,
            benign_batches=benign,
            metric=metric,
            budget=budget,
            seed=seed,
        )
    parts, protected = objectives.terms(objective, safety_batches, task_batches, benign), [*task_batches, *benign]
    judge = Judge.of(model, objective, held_out, goal)
    search = _Search(judge, parts, protected, list(trainable(model).values()), budget)

    def measured(along: Tensor) -> Inverse:
        if isinstance(metric, Inverse):
            return metric
        return build_metric(
            metric,
            model,
            protected,
            damping=budget.damping,
            products=budget.products,
            seed=seed,
            compliances=safety_batches.compliances,
            along=along,
        )

    return search.result(measured)


@dataclass
class _Search:
    """The state of a restoration: where it is, what it accepted, what it spent."""

    judge: Judge
    parts: Sequence[Term]
    protected: Sequence[Batch]
    parameters: list[Tensor]
    budget: Budget
    steps: list[StepRecord] = field(default_factory=list)
    products: int = 0
    gradients: int = 0
    told: str = ""

    def result(self, measured: Callable[[Tensor], Inverse]) -> RestorationResult:
        """Search, and return the restoration."""
        with kept_weights(self.judge.model):
            reason = self.run(measured)
        return self.judge.result(self.steps, reason, products=self.products, gradients=self.gradients)

    def run(self, measured: Callable[[Tensor], Inverse]) -> str:
        """Take steps until one of the stopping rules holds, and return which; the metric is measured at the start."""
        goal, trust, metric = self.judge.goal(), self.budget.trust, None
        self.steps.append(self.judge.measure())
        for _ in bar(range(self.budget.steps), desc="restore"):
            gradient = self.gradient(self.parts)
            if len(self.steps) > 1 and not gradient.any():
                return "the objective is at its bound" + self.told
            if metric is None:
                metric = measured(gradient)
                self.products, self.gradients = metric.products, self.gradients + metric.gradients
            direction = self.direction(metric, gradient)
            if direction is None:
                return "the metric allows no step" + self.told
            record = self.line(direction, trust)
            if record is None:
                return "no step passed the held-out losses" + self.told
            predicted = -math.sqrt(record.trust) * float(gradient @ direction)
            ratio = (self.steps[-1].safety - record.safety) / predicted
            trust = next_trust(trust, record.trust, ratio if self.budget.ratio else None)
            self.steps.append(record)
            if record.safety <= goal:
                name = "goal" if self.judge.given_goal is not None else "aligned model's loss"
                return f"reached the {name}{self.told}"
        return "steps spent" + self.told

    def gradient(self, parts: Sequence[Term]) -> Tensor:
        """Return the flat gradient (P,) of a sum of terms."""
        self.gradients += sum(chats(term.batches) for term in parts)
        return objectives.gradient(self.judge.model, parts, self.parameters)

    def direction(self, metric: Inverse, gradient: Tensor) -> Tensor | None:
        r"""Return the step of :math:`\tfrac12\,\delta^\top M\delta = 1`, or None where the metric allows none."""
        size = float(gradient.norm())
        if not math.isfinite(size) or size == 0:
            raise CurvlibError(f"the safety gradient has norm {size}: check the chats and the adapter")
        step = self.solve(metric, -gradient)
        if self.budget.orthogonal:
            away = self.gradient([Term(self.protected)])
            step = orthogonal_to(away, step, self.solve(metric, away))
        square = -float(gradient @ step)  # δᵀMδ of both steps, since Mδ = -g - k g_t with g_tᵀδ = 0
        return step * math.sqrt(2 / square) if square > 0 else None

    def solve(self, metric: Inverse, b: Tensor) -> Tensor:
        """Return M⁻¹b; count the products and keep what is to be told of negative curvature."""
        found = metric.solve(b)
        self.products += found.products
        if found.negative_curvature is not None:
            self.told = f"; the metric met curvature {found.negative_curvature:.1e}: raise the damping"
        return found.solution

    @torch.no_grad()
    def line(self, direction: Tensor, trust: float) -> StepRecord | None:
        """Take the longest step whose held-out losses pass; otherwise leave the parameters as they were."""
        here = flatten(self.parameters)
        for halving in range(self.budget.halvings + 1):
            radius = trust / 4**halving
            there = here + math.sqrt(radius) * direction
            assign(self.parameters, there)
            record = self.judge.measure(trust=radius, norm=float((there - self.judge.before).norm()))
            if record.safety < self.steps[-1].safety and self.judge.passes(record, self.budget.rise):
                return record
        assign(self.parameters, here)
        return None


def orthogonal_to(gradient: Tensor, step: Tensor, solved: Tensor) -> Tensor:
    r"""Return :math:`\delta - M^{-1}g_t\,(g_t^\top\delta)/(g_t^\top M^{-1}g_t)`, the step made orthogonal.

    Args:
        gradient: :math:`g_t` (P,).
        step: :math:`\delta` (P,).
        solved: :math:`M^{-1}g_t` (P,).

    >>> orthogonal_to(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0]), torch.tensor([0.5, 0.5]))
    tensor([0., 1.])
    """
    along = float(gradient @ solved)
    return step - solved * (float(gradient @ step) / along) if along > 0 else step


def next_trust(tried: float, passed: float, ratio: float | None) -> float:
    """Return the trust of the next step.

    Args:
        tried: trust of the search's first trial.
        passed: trust of the step that was taken.
        ratio: actual over predicted fall of the safety loss. Above 3/4 the radius, a square root of the trust, doubles;
            below 1/4 it is halved. If None, a step that passed at once doubles the trust.

    >>> next_trust(1.0, 1.0, 0.9), next_trust(1.0, 0.25, 0.5), next_trust(1.0, 1.0, 0.1), next_trust(1.0, 1.0, None)
    (4.0, 0.25, 0.25, 2.0)
    """
    if ratio is None:
        return 2 * tried if passed == tried else passed
    return passed * (4 if ratio > GOOD else 1 / 4 if ratio < POOR else 1)
