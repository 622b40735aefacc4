"""The restoration loop on a tiny 4-bit model: it improves, it obeys the budget, it can be undone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from curvlib.batches import answer_loss
from curvlib.errors import CurvlibError
from curvlib.parameters import assign, flatten, trainable
from curvlib.restore import Budget, RestorationResult, SafetyBatches, objectives, restore
from curvlib.restore.loop import HeldOut
from curvlib.restore.metrics import METRICS, build_metric, half_square
from tests import cases

TASK, REFUSALS, COMPLIANCES = cases.batches(4, seed=1), cases.batches(4, seed=2), cases.batches(4, seed=3)
SAFETY = SafetyBatches(REFUSALS, COMPLIANCES)
HELD_OUT = HeldOut(SAFETY, {"task": TASK})


def run(model: Any, **settings: Any) -> RestorationResult:
    settings = {"held_out": HELD_OUT, "budget": Budget(steps=2, trust=0.01, damping=0.1), **settings}
    return restore(model, TASK, SAFETY, **settings)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("objective", ["refusal", "ascent", "both"])
def test_each_reading_improves_its_objective_within_the_budget(metric: str, objective: str) -> None:
    model = cases.nf4_llama()
    result = run(model, metric=metric, objective=objective)
    safety = [step.safety for step in result.steps]
    assert len(safety) > 1
    assert safety == sorted(safety, reverse=True)
    assert all(step.protected["task"] <= result.steps[0].protected["task"] + Budget().rise for step in result.steps)
    assert safety[-1] == pytest.approx(objectives.value(model, objectives.terms(objective, SAFETY)))
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


def test_the_gradient_is_that_of_the_objective() -> None:
    model = cases.nf4_llama()
    parameters, parts = list(trainable(model).values()), objectives.terms("both", SAFETY)
    found = objectives.gradient(model, parts, parameters)
    direction = cases.random(len(found), dtype=torch.float32)
    here, step = flatten(parameters), 1e-2 / float(direction.norm())
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            assign(parameters, here + sign * step * direction)
            values.append(objectives.value(model, parts))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(found @ direction), rel=2e-2)


def test_the_value_is_the_mean_over_tokens() -> None:
    model = cases.pair()[0]
    losses = [(answer_loss(model, batch).item(), batch.tokens) for batch in REFUSALS]
    expected = sum(loss * tokens for loss, tokens in losses) / sum(tokens for _, tokens in losses)
    assert objectives.mean_loss(model, REFUSALS) == pytest.approx(expected)


def test_ascent_is_bounded_batch_by_batch() -> None:
    model = cases.pair()[0]
    losses = [(answer_loss(model, batch).item(), batch.tokens) for batch in COMPLIANCES]
    assert min(losses)[0] < objectives.COMPLIANCE_BOUND < max(losses)[0]  # so that the bound is seen
    expected = -sum(min(loss, 5.0) * tokens for loss, tokens in losses) / sum(tokens for _, tokens in losses)
    assert objectives.value(model, objectives.terms("ascent", SAFETY)) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["fisher", "ggn"])
def test_the_solver_inverts_its_metric(name: str) -> None:
    metric = build_metric(name, cases.pair()[0], TASK, damping=1.0, products=200)
    b = cases.random(metric.operator.size, dtype=torch.float32)
    x, products = metric.solve(b)
    assert cases.relative_error(metric.operator.matvec(x), b) < 2e-2
    assert (products > 0) == (name == "ggn")
    assert half_square(metric, x) == pytest.approx(float(0.5 * x @ b), rel=2e-2)


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


def test_missing_chats_are_refused() -> None:
    model = cases.nf4_llama()
    with pytest.raises(CurvlibError, match="got no safety chats"):
        objectives.terms("refusal", SafetyBatches([]))
    with pytest.raises(CurvlibError, match="got no chats to protect"):
        build_metric("fisher", model, [], damping=1.0, products=3)
