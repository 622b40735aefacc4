"""The restoration loop on a tiny 4-bit model: it improves, it obeys the budget, it can be undone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from curvlib.curvature.lowrank import sampled_fisher
from curvlib.errors import CurvlibError
from curvlib.parameters import assign, flatten, trainable
from curvlib.restore import Budget, HeldOut, RestorationResult, SafetyBatches, objectives, restore
from curvlib.restore.loop import orthogonal_to
from curvlib.restore.metrics import DRAWS, METRICS
from tests import cases

TASK, COMPLIANCES, BENIGN = (cases.batches(4, seed=seed) for seed in (1, 3, 4))
REFUSALS = cases.said_by_base(cases.pair()[0], cases.batches(4, seed=2))
SAFETY = SafetyBatches(REFUSALS, COMPLIANCES)
HELD_OUT = HeldOut(SAFETY, {"task": TASK, "benign": BENIGN})


def run(model: Any, **settings: Any) -> RestorationResult:
    settings = {"held_out": HELD_OUT, "budget": Budget(steps=2, trust=0.01, damping=0.1), **settings}
    return restore(model, TASK, SAFETY, **settings)


@pytest.mark.parametrize(
    ("objective", "metric"),
    [("refusal", metric) for metric in METRICS]
    + [("ascent", "fisher"), ("both", "fisher"), ("distill", "fisher"), ("composite", "composite")],
)
def test_each_reading_improves_its_objective_within_the_budget(objective: str, metric: str) -> None:
    model = cases.nf4_llama()
    result = run(model, metric=metric, objective=objective, benign_batches=BENIGN)
    safety = [step.safety for step in result.steps]
    assert len(safety) > 1
    assert safety == sorted(safety, reverse=True)
    assert all(step.protected["task"] <= result.steps[0].protected["task"] + Budget().rise for step in result.steps)
    assert safety[-1] == pytest.approx(objectives.value(model, objectives.terms(objective, SAFETY, TASK, BENIGN)))
    assert torch.equal(flatten(trainable(model)), result.after)


def test_it_can_be_undone_bit_by_bit() -> None:
    model = cases.nf4_llama()
    start = flatten(trainable(model))
    result = run(model)
    assert not torch.equal(result.after, start)
    with torch.no_grad():
        assign(trainable(model), result.before)
    assert torch.equal(flatten(trainable(model)), start)


def test_the_same_seed_gives_the_same_adapter() -> None:
    first, again = (run(cases.nf4_llama(), seed=5).after for _ in range(2))
    torch.testing.assert_close(first, again, atol=1e-6, rtol=0)


def test_nothing_moves_when_no_step_passes() -> None:
    model = cases.nf4_llama()
    start = flatten(trainable(model))
    result = run(model, budget=Budget(steps=2, rise=-1.0))
    assert "no step passed" in result.stop_reason
    assert torch.equal(flatten(trainable(model)), start)


def test_a_step_in_the_fisher_metric_is_the_dense_one() -> None:
    model, budget = cases.nf4_llama(), Budget(steps=1, trust=0.01, damping=0.1)
    fisher = sampled_fisher(model, TASK, samples=DRAWS, seed=0)
    matrix = fisher.rows.double().T @ fisher.rows.double()
    matrix += budget.damping * fisher.scale * torch.eye(fisher.size)
    parts = objectives.terms("refusal", SAFETY)
    gradient = objectives.gradient(model, parts, list(trainable(model).values())).double()
    natural = torch.linalg.solve(matrix, gradient)
    result = run(model, budget=budget)
    expected = -natural * (2 * result.steps[1].trust / (gradient @ natural)).sqrt()
    assert cases.relative_error(result.after - result.before, expected) < 1e-3


def test_an_orthogonal_step_keeps_the_protected_loss_to_first_order() -> None:
    model = cases.nf4_llama()
    slope = objectives.gradient(model, [objectives.Term(TASK)], list(trainable(model).values()))
    cosines = []
    for orthogonal in (True, False):
        result = run(cases.nf4_llama(), budget=Budget(steps=1, trust=0.01, damping=0.1, orthogonal=orthogonal))
        step = result.after - result.before
        cosines.append(abs(float(step @ slope) / float(step.norm() * slope.norm())))
    assert cosines[0] < 1e-4 < 1e-2 < cosines[1]


def test_an_orthogonal_step_is_the_constrained_minimum() -> None:
    matrix, g, slope = cases.spd(6), cases.random(6, seed=1), cases.random(6, seed=2)
    step = orthogonal_to(slope, -torch.linalg.solve(matrix, g), torch.linalg.solve(matrix, slope))
    system = torch.cat([torch.cat([matrix, slope[:, None]], 1), torch.cat([slope, slope.new_zeros(1)])[None]])
    exact = torch.linalg.solve(system, torch.cat([-g, g.new_zeros(1)]))[:6]  # min gᵀδ + ½δᵀMδ with slopeᵀδ = 0
    torch.testing.assert_close(step, exact)


def test_the_ratio_of_actual_to_predicted_gain_steers_the_trust() -> None:
    budget = Budget(steps=3, trust=1e-6, damping=0.1)
    for ratio, factor in ((True, 4), (False, 2)):  # so short a step gains what the gradient predicts
        result = run(cases.nf4_llama(), budget=replace(budget, ratio=ratio))
        assert [step.trust for step in result.steps[1:]] == pytest.approx([1e-6 * factor**k for k in range(3)])


def test_an_indefinite_metric_is_told() -> None:
    result = run(cases.nf4_llama(), metric="hessian", budget=Budget(steps=1, trust=0.01, damping=1e-4, products=12))
    assert "the metric met curvature -" in result.stop_reason


def test_it_counts_what_it_spends() -> None:
    model, chats = cases.nf4_llama(), 4
    result = run(model, metric="ggn", benign_batches=TASK, budget=Budget(steps=1, trust=0.01, products=2))
    assert result.products == 2
    assert result.gradients == chats + 2 * chats * DRAWS  # refusals; task and benign chats for the preconditioner
    assert len(result.trials) >= len(result.steps) == 2
    assert {id(step) for step in result.steps} <= {id(trial) for trial in result.trials}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "hope"}, "no objective is called 'hope'"),
        ({"metric": "euclid"}, "no metric is called 'euclid'"),
    ],
)
def test_unknown_names_are_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(CurvlibError, match=message):
        run(cases.nf4_llama(), **settings)
