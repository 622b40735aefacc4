"""What judges a restoration on held-out chats, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from curvlib.batches import Batch
from curvlib.curvature.damping import Damping, price
from curvlib.evaluate.behaviour import reference_model
from curvlib.generate import Model
from curvlib.parameters import assign, flatten, trainable
from curvlib.restore import objectives
from curvlib.restore.objectives import SafetyBatches


@dataclass(frozen=True)
class HeldOut:
    """Chats that no gradient sees: ``safety`` judges each move, ``protected`` tells by role what it costs."""

    safety: SafetyBatches
    protected: Mapping[str, Sequence[Batch]]


@dataclass(frozen=True)
class Point:
    """A place on the way: held-out loss (or -s), price by role (nats per answer token), distance to the start."""

    loss: float
    price: dict[str, float]
    norm: float


@dataclass(frozen=True)
class RestorationResult:
    """What happened; ``curvlib.parameters.assign(trainable(model), result.before)`` undoes it.

    Attributes:
        path: the start, then every move that was taken, the last one cut back to the goal.
        goal: held-out loss at which it ends.
        damping: what the rule chose, and what the metric buys; None where no move was tried.
        gradients: gradients of a single chat.
        products: curvature products, each worth about two gradients of all chats that the metric is of.
        seconds: wall-clock time.
        stop_reason: why it ended, in words.
        before: trainable parameters (P,) at the start.
        after: trainable parameters (P,) at the end.
    """

    path: tuple[Point, ...]
    goal: float
    damping: Damping | None
    gradients: int
    products: int
    seconds: float
    stop_reason: str
    before: Tensor
    after: Tensor


@dataclass(frozen=True)
class Judge:
    """Measures the model as it is on held-out chats, beside where it stood when the judge was made, ``start``."""

    model: Model
    terms: Sequence[objectives.Term]
    protected: Mapping[str, Sequence[Batch]]
    start: Tensor

    @classmethod
    def of(cls, model: Model, objective: str, held_out: HeldOut) -> Judge:
        """Return the judge of an objective, standing where the model is."""
        terms = objectives.terms(objective, held_out.safety, held_out.protected, judging=True)
        return cls(model, terms, held_out.protected, flatten(trainable(model)))

    def end(self, objective: str) -> float:
        """Return the loss at the end of the way: the objective's own, or else that with the adapter off."""
        if objective in objectives.GOALS:
            return objectives.GOALS[objective]
        with reference_model(self.model, "adapter off"):
            return self.loss()

    def loss(self) -> float:
        """Return the held-out loss of the objective; cost: a forward pass of its chats."""
        return objectives.value(self.model, self.terms)

    def point(self, loss: float) -> Point:
        """Return the place with this loss; cost: two forward passes of the protected chats."""
        parameters = trainable(self.model)
        here = flatten(parameters)
        way = here - self.start
        assign(parameters, self.start)
        paid = {role: price(self.model, way, chats) if way.any() else 0.0 for role, chats in self.protected.items()}
        assign(parameters, here)
        return Point(loss, paid, float(way.norm()))
