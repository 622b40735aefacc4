"""The baseline: plain re-alignment by fine-tuning, on exactly the chats that restoration sees.

It is what a user would do instead: train the adapter on refusals, task chats and benign chats mixed, by AdamW. Rate and
number of steps are chosen on the same held-out chats by the same rule as the strength of a weighted return.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from torch import Tensor

from curvlib.batches import Batch, Example, taken_apart
from curvlib.errors import CurvlibError
from curvlib.finetune import TrainingConfig, train
from curvlib.generate import Model
from curvlib.parameters import assign, flatten, trainable
from curvlib.restore.objectives import SafetyBatches
from curvlib.restore.outcome import Budget, HeldOut, Judge, RestorationResult, best

RATES, STEPS = (2e-4, 5e-4, 1e-3), (10,)


def candidates(seed: int = 0) -> list[TrainingConfig]:
    """Return the training runs that are tried by default: three learning rates, each for ten steps."""
    return [TrainingConfig(steps=steps, learning_rate=rate, seed=seed) for rate, steps in product(RATES, STEPS)]


def balanced(refusals: list[Example], protected: list[Example]) -> list[Example]:
    """Return both together, the refusals repeated until they are about as many as the protected chats.

    One refusal among thirty-two other chats would hardly be trained on.

    >>> [len(balanced([Example((1, 2), (-100, 2))] * n, [Example((1, 3), (-100, 3))] * 8)) for n in (1, 3, 8, 20)]
    [16, 17, 16, 28]
    """
    return refusals * max(1, round(len(protected) / len(refusals))) + protected


def realign(
    model: Model,
    task_batches: Sequence[Batch],
    safety_batches: SafetyBatches,
    *,
    held_out: HeldOut,
    benign_batches: Sequence[Batch] = (),
    budget: Budget | None = None,
    training: Sequence[TrainingConfig] = (),
    goal: float | None = None,
    seed: int = 0,
) -> RestorationResult:
    """Fine-tune the adapter of ``model`` on refusals, task and benign chats together, in place.

    Refusals are as many as the other chats, see :func:`balanced`.

    Every run starts from the given adapter. Of those that raise no held-out protected loss by more than
    ``budget.rise``, the shortest is kept that reaches the goal, where restoration stops too; if none does, the one of
    least loss; if none improves, the adapter stays as it was.

    Args:
        model: an aligned model under a fine-tuned adapter, the only trainable parameters.
        task_batches: chats of the fine-tuning task.
        safety_batches: its refusals are trained on.
        held_out: validation chats.
        benign_batches: benign and benign-edgy chats.
        budget: its ``rise`` is used.
        training: the runs to choose from; :func:`candidates` by default.
        goal: held-out refusal loss that suffices; by default the aligned model's, which is the adapter switched off.
        seed: of the default runs.

    Cost: one gradient for each step and chat of its batch, in all runs; for each run a forward of the held-out chats.

    Raises:
        CurvlibError: no refusals were given.
    """
    if not safety_batches.refusals:
        raise CurvlibError("re-alignment got no refusals: give harmful prompts with their refusals")
    budget, runs = budget or Budget(), list(training) or candidates(seed)
    judge = Judge.of(model, "refusal", held_out, goal)
    mixture = balanced(taken_apart(safety_batches.refusals), taken_apart([*task_batches, *benign_batches]))
    start, points, gradients = judge.measure(), list[Tensor](), 0
    for run in runs:
        assign(trainable(model), judge.before)
        trained = train(model, mixture, run, pad_id=0, label=f"re-align {run.steps} steps at {run.learning_rate:g}")
        gradients += trained.gradient_evaluations * run.batch_size
        points.append(flatten(trainable(model)))
        judge.measure(trust=run.learning_rate, norm=float((points[-1] - judge.before).norm()))
    chosen = best(judge, judge.trials[1:], budget.rise, judge.goal())
    number = judge.trials.index(chosen) - 1 if chosen else 0
    assign(trainable(model), points[number] if chosen else judge.before)
    reason = f"{runs[number].steps} steps at {runs[number].learning_rate:g} chosen"
    reason = reason if chosen else "no run passed the held-out losses"
    return judge.result([start, chosen] if chosen else [start], reason, gradients=gradients)
