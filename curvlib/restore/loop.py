r"""Restoration: natural moves towards safety, each of the same linear gain, to a goal on held-out chats.

With g the gradient of the objective, C the curvature of protected chats and γ nats of gain, a move is

.. math:: \delta = -\gamma\,\frac{v}{g^\top v}, \qquad v = (C + \lambda I)^{-1} g,

the one of that linear gain which costs least, :math:`\tfrac12 \delta^\top (C + \lambda I)\,\delta`. C and λ are taken
once, where it starts, λ by the held-out rule of :mod:`curvlib.curvature.damping`; lesson 05 writes the same loop. Made
from the ideas stated by Bach et al. (arXiv 2511.18039), of which only abstract and introduction were read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

from torch import Tensor

from curvlib.batches import Batch
from curvlib.curvature.damping import Damping, damped_by_rule, protected_halves
from curvlib.curvature.inverse import Inverse
from curvlib.errors import CurvlibError
from curvlib.generate import Model
from curvlib.nf4 import kept_weights
from curvlib.parameters import assign, flatten, trainable
from curvlib.restore import objectives
from curvlib.restore.objectives import GOALS, SafetyBatches, Term
from curvlib.restore.outcome import HeldOut, Judge, Point, RestorationResult

MOVES, HALVINGS = 5, 4  # moves of a whole way, if the loss were linear; how often one is halved
PRODUCTS = 30  # most for the damping, and for a solve
CLOSE = 0.005  # share of the way beside the goal that counts as reached


def restore(
    model: Model,
    safety: SafetyBatches,
    protected: Mapping[str, Sequence[Batch]],
    held_out: HeldOut,
    *,
    objective: str = "refusal",
    metric: str = "ekfac",
    way: float = 0.7,
    gain: float | None = None,
    limit: float | None = None,
    moves: int = 12,
    seed: int = 0,
) -> RestorationResult:
    """Move the adapter of a fine-tuned ``model`` back to safe behaviour, in place.

    Args:
        model: an aligned model under a fine-tuned adapter, the only trainable parameters.
        safety: harmful requests with their answers.
        protected: role -> chats whose behaviour must stay, such as ``task`` and ``benign``; roles count alike.
        held_out: other chats, which judge each move and tell its price; with a margin, refusals are judged by log-odds.
        objective: see :mod:`curvlib.restore.objectives`, whose ``GOALS`` are goals of their own.
        metric: one of :data:`curvlib.curvature.inverse.METHODS`; ``identity`` is the plain gradient.
        way: the goal, as a share of the way from the model's held-out loss to that with its adapter off.
        gain: nats of linear gain that a move asks for; by default a fifth of the way to the end on ``safety``.
        limit: most nats per answer token that any held-out role may pay; by default there is none.
        moves: most moves; the goal mostly takes four or five.
        seed: of sampled labels.

    A move that does not lower the held-out loss, or passes the limit, is halved up to four times; if that does not help
    the restoration ends. The last move is cut back to the goal by false position. Cost: two or three gradients of the
    protected chats once; for a move a gradient, a solve, a forward pass a trial for the loss and two for the price.

    Raises:
        CurvlibError: unknown objective or metric, missing chats, or a gradient that is not finite.
    """
    began, judge = perf_counter(), Judge.of(model, objective, held_out)
    wanted = Judge(model, objectives.terms(objective, safety, protected), protected, judge.start)
    path, end, reason = [judge.point(judge.loss())], judge.end(objective), "moves spent"
    whole = path[0].loss - end
    goal = end if objective in GOALS else path[0].loss - way * whole
    gain = gain or (wanted.loss() - wanted.end(objective)) / MOVES
    step = _Natural(model, wanted.terms, protected, metric, seed)
    if not math.isfinite(goal):
        raise CurvlibError(
            f"the held-out loss is {path[0].loss} and its goal {goal}, expected numbers: check the model"
        )
    with kept_weights(model):
        while path[-1].loss > goal and len(path) <= moves:
            here, unit = flatten(trainable(model)), step.unit()
            point = None if unit is None else _line(judge, path[-1].loss, unit, gain, limit)
            if point is None:
                short = "nothing to learn from is short of the margin"
                reason = short if unit is None else "no move passed the held-out chats"
                break
            path.append(point)
        if path[-1].loss <= goal:
            reason = "the goal is behind the model already"
            if len(path) > 1:
                reason = "reached the goal"
                path[-1] = _cut(judge, path[-2].loss, path[-1].loss, here, goal, CLOSE * whole)
    spent, after = (step.damping, step.gradients, step.products), flatten(trainable(model))
    return RestorationResult(tuple(path), goal, *spent, perf_counter() - began, reason, judge.start, after)


@dataclass
class _Natural:
    """The natural direction where the model stands; the metric is that of where it first stood."""

    model: Model
    terms: Sequence[Term]
    protected: Mapping[str, Sequence[Batch]]
    metric: str
    seed: int
    damping: Damping | None = None
    inverse: Inverse | None = None
    gradients: int = 0
    products: int = 0

    def unit(self) -> Tensor | None:
        """Return v / gᵀv, (P,): the direction whose linear gain is one nat; None where g is zero, as past a margin."""
        g = objectives.gradient(self.model, self.terms, list(trainable(self.model).values()))
        self.gradients += sum(len(batch) for term in self.terms for batch in term.batches)
        if not g.any():
            return None
        if self.inverse is None:
            halves = protected_halves(self.model, self.protected, seed=self.seed)
            options = {"products": PRODUCTS, "seed": self.seed}
            self.inverse, self.damping = damped_by_rule(self.metric, self.model, halves, g, **options)
            self.products += PRODUCTS * (self.damping.above is None and self.metric != "identity")
            first, second = (len(half.fisher.rows) for half in halves)
            self.gradients += second + max(first, self.inverse.gradients)
        solution = self.inverse.solve(g)
        self.products += solution.products
        return solution.solution / float(g @ solution.solution)


def _line(judge: Judge, before: float, unit: Tensor, gain: float, limit: float | None) -> Point | None:
    """Go against ``unit``, halving until the held-out loss falls within the limit; None leaves the model as it was."""
    here = flatten(trainable(judge.model))
    for halving in range(HALVINGS + 1):
        assign(trainable(judge.model), here - gain / 2**halving * unit)
        if (loss := judge.loss()) < before:
            point = judge.point(loss)
            if limit is None or max(point.price.values(), default=0.0) <= limit:
                return point
    assign(trainable(judge.model), here)
    return None


def _cut(judge: Judge, above: float, below: float, left: Tensor, goal: float, close: float) -> Point:
    """Cut the last move, from ``left``, back to the goal by false position: at most four times."""
    parameters, now = trainable(judge.model), below
    right = flatten(parameters)
    for _ in range(4):
        middle = left + (above - goal) / (above - below) * (right - left)
        assign(parameters, middle)
        now = judge.loss()
        if abs(now - goal) < close:
            break
        above, left, below, right = (now, middle, below, right) if now > goal else (above, left, now, middle)
    return judge.point(now)
