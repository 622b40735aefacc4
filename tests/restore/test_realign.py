"""The baseline: it trains on the same chats, chooses by the same rule, and can be undone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from curvlib.batches import Example, make_batches, taken_apart
from curvlib.errors import CurvlibError
from curvlib.finetune import TrainingConfig, train
from curvlib.parameters import flatten, trainable
from curvlib.restore import Budget, HeldOut, RestorationResult, SafetyBatches
from curvlib.restore.outcome import Judge
from curvlib.restore.realign import candidates, realign
from tests import cases

TASK, BENIGN = cases.batches(4, seed=1), cases.batches(4, seed=3)
REFUSALS = cases.said_by_base(cases.pair()[0], cases.batches(4, seed=2))
HELD_OUT = HeldOut(SafetyBatches(REFUSALS), {"task": TASK, "benign": BENIGN})
RUNS = [TrainingConfig(steps=2, batch_size=4, learning_rate=rate) for rate in (1e-3, 3e-3)]


def run(model: Any, **settings: Any) -> RestorationResult:
    settings = {"held_out": HELD_OUT, "benign_batches": BENIGN, "training": RUNS, **settings}
    return realign(model, TASK, SafetyBatches(REFUSALS), **settings)


def test_it_is_plain_fine_tuning_on_the_same_chats_with_refusals_as_many_as_the_others() -> None:
    model, twin = cases.nf4_llama(), cases.nf4_llama()
    result = run(model, training=RUNS[1:])
    train(twin, taken_apart([*REFUSALS, *REFUSALS, *TASK, *BENIGN]), RUNS[1], pad_id=0)
    torch.testing.assert_close(result.after, flatten(trainable(twin)))
    torch.testing.assert_close(flatten(trainable(model)), result.after)
    assert (result.products, result.gradients) == (0, 8)


def test_the_run_is_the_best_that_stays_in_budget_and_each_starts_anew() -> None:
    free = run(cases.nf4_llama())
    assert free.steps[1] == min(free.trials[1:], key=lambda trial: trial.safety)
    assert free.steps[1].trust == 3e-3
    rises = [max(t.protected[k] - free.steps[0].protected[k] for k in t.protected) for t in free.trials[1:]]
    strict = run(cases.nf4_llama(), training=RUNS[::-1], budget=Budget(rise=sum(rises) / 2))
    assert strict.steps[1].trust == RUNS[rises.index(min(rises))].learning_rate
    assert strict.trials[2].safety == pytest.approx(free.trials[1].safety, abs=1e-5)


def test_of_the_runs_that_reach_the_aligned_models_loss_the_shortest_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Judge, "goal", lambda _: 1e9)
    found = run(cases.nf4_llama(), training=RUNS[::-1])
    assert found.steps[1] == min(found.trials[1:], key=lambda trial: trial.norm)
    assert found.steps[1].trust == 1e-3


def test_nothing_moves_when_no_run_passes() -> None:
    model = cases.nf4_llama()
    start = flatten(trainable(model))
    result = run(model, budget=Budget(rise=-1.0))
    assert result.stop_reason == "no run passed the held-out losses"
    assert torch.equal(flatten(trainable(model)), start)


def test_batches_give_their_chats_back() -> None:
    chats = [Example((5, 6, 7), (-100, 6, 7)), Example((4, 3, 2, 1), (-100, -100, 2, 1))]
    assert taken_apart(make_batches(chats, 2, pad_id=0)) == chats


def test_defaults_and_missing_refusals() -> None:
    assert len({(c.steps, c.learning_rate) for c in candidates()}) == 3
    with pytest.raises(CurvlibError, match="got no refusals"):
        realign(cases.pair()[0], TASK, SafetyBatches([]), held_out=HELD_OUT)
