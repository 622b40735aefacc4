"""What a restoration may spend, how it is judged on held-out chats, and what it returns."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from curvlib.batches import Batch
from curvlib.evaluate.behaviour import reference_model
from curvlib.generate import Model
from curvlib.parameters import flatten, trainable
from curvlib.restore import objectives
from curvlib.restore.objectives import SafetyBatches


@dataclass(frozen=True)
class Budget:
    r"""What restoration may spend.

    Attributes:
        steps: most steps taken.
        products: most curvature products for one solve.
        trust: :math:`\tau` of the first step, in nats per answer token of the protected chats. A step that passes at
            once doubles it, a shortened one shrinks it to what passed.
        rise: most that any held-out protected loss may rise above where it started, in nats per token.
        halvings: how often a step that fails on held-out losses is halved before the search ends.
        damping: :math:`\lambda` as a multiple of the sampled Fisher's mean eigenvalue.
        orthogonal: make steps orthogonal to the gradient of the protected loss, in the metric.
        ratio: adapt the trust by the ratio of actual to predicted fall of the safety loss, see
            :func:`curvlib.restore.loop.next_trust`.
    """

    steps: int = 3
    products: int = 6
    trust: float = 0.05
    rise: float = 0.1
    halvings: int = 4
    damping: float = 1.0
    orthogonal: bool = False
    ratio: bool = False


@dataclass(frozen=True)
class HeldOut:
    """Chats that no gradient sees: they judge each step. ``protected`` holds the roles ``task`` and ``benign``."""

    safety: SafetyBatches
    protected: Mapping[str, Sequence[Batch]]


@dataclass(frozen=True)
class StepRecord:
    r"""One measured point: its held-out losses and the l2 norm of the way there from the start.

    ``trust`` is the setting that led there: :math:`\tau` of a step, c of a weighted return, the learning rate of a
    re-alignment; 0 at the start.
    """

    safety: float
    protected: dict[str, float]
    trust: float
    norm: float


@dataclass(frozen=True)
class RestorationResult:
    """What happened, and the trainable parameters (P,) ``before`` and ``after``.

    ``curvlib.parameters.assign(trainable(model), result.before)`` undoes the restoration.

    Attributes:
        steps: the start, then every accepted step.
        trials: every point that was measured on the held-out chats, accepted or not, the start first.
        products: curvature products spent, each worth about two gradients of all protected chats.
        gradients: gradients spent otherwise, one for each time that one chat was differentiated.
        seconds: wall-clock time.
        stop_reason: why it ended, in words.
        before: parameters at the start.
        after: parameters at the end.
    """

    steps: tuple[StepRecord, ...]
    trials: tuple[StepRecord, ...]
    products: int
    gradients: int
    seconds: float
    stop_reason: str
    before: Tensor
    after: Tensor


@dataclass(frozen=True)
class Judge:
    """Measures held-out losses of the model as it is, and keeps every record; make it where the restoration begins."""

    model: Model
    safety: Sequence[objectives.Term]
    protected: Mapping[str, Sequence[Batch]]
    before: Tensor
    trials: list[StepRecord] = field(default_factory=list)
    begun: float = field(default_factory=time.perf_counter)
    given_goal: float | None = None

    @classmethod
    def of(cls, model: Model, objective: str, held_out: HeldOut, goal: float | None = None) -> Judge:
        """Return the judge of an objective on the held-out chats; a goal that is given replaces the objective's own."""
        parts = held_out_terms(objective, held_out)
        goal = objectives.GOALS.get(objective) if goal is None else goal
        return cls(model, parts, held_out.protected, flatten(trainable(model)), given_goal=goal)

    def measure(self, *, trust: float = 0.0, norm: float = 0.0) -> StepRecord:
        """Return the held-out losses of the model as it is; cost: a forward pass of all held-out chats."""
        losses = {name: objectives.mean_loss(self.model, batches) for name, batches in self.protected.items()}
        record = StepRecord(objectives.value(self.model, self.safety), losses, trust, norm)
        self.trials.append(record)
        return record

    def goal(self) -> float:
        """Return the goal that was given, or else the aligned model's safety loss: that with the adapter off."""
        if self.given_goal is not None:
            return self.given_goal
        with reference_model(self.model, "adapter off") as aligned:
            return objectives.value(aligned, self.safety)

    def passes(self, record: StepRecord, rise: float) -> bool:
        """Tell whether no protected loss lies more than ``rise`` above the first record's."""
        start = self.trials[0].protected
        return all(loss - start[name] <= rise for name, loss in record.protected.items())

    def result(
        self, steps: Sequence[StepRecord], stop_reason: str, *, products: int = 0, gradients: int = 0
    ) -> RestorationResult:
        """Return the restoration that ends here, with the model as it is."""
        return RestorationResult(
            steps=tuple(steps),
            trials=tuple(self.trials),
            products=products,
            gradients=gradients,
            seconds=time.perf_counter() - self.begun,
            stop_reason=stop_reason,
            before=self.before,
            after=flatten(trainable(self.model)),
        )


def held_out_terms(objective: str, held_out: HeldOut) -> list[objectives.Term]:
    """Return the terms of an objective over the held-out chats."""
    task, benign = (held_out.protected.get(role, ()) for role in ("task", "benign"))
    return objectives.terms(objective, held_out.safety, task, benign)


def best(judge: Judge, records: Iterable[StepRecord], rise: float, goal: float = -math.inf) -> StepRecord | None:
    """Return the best of the records that pass and improve on the start; None if none does.

    It is the shortest way to a safety loss of at most ``goal``, or else the record of least safety loss: the rule by
    which strengths, learning rates and numbers of steps are chosen on validation chats.
    """
    good = [r for r in records if r.safety < judge.trials[0].safety and judge.passes(r, rise)]
    there = [record for record in good if record.safety <= goal]
    return min(there, key=lambda r: r.norm) if there else min(good, key=lambda r: r.safety, default=None)


def chats(batches: Iterable[Batch]) -> int:
    """Return the number of chats in all batches."""
    return sum(len(batch) for batch in batches)
