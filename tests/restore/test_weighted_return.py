"""The way back against its dense solution, at its two ends, and on a tiny 4-bit model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from curvlib.batches import answer_logits
from curvlib.curvature.ggn import ggn
from curvlib.curvature.lowrank import LowRankOperator, sampled_fisher
from curvlib.curvature.operator import DenseOperator
from curvlib.errors import CurvlibError
from curvlib.parameters import assign, flatten, trainable
from curvlib.restore import Budget, HeldOut, RestorationResult, SafetyBatches, restore
from curvlib.restore.metrics import DRAWS
from curvlib.restore.weighted_return import METRICS, Valley, WayBack, only_b, way_back, weighted_return
from tests import cases

TASK, BENIGN = cases.batches(4, seed=1), cases.batches(4, seed=3)
REFUSALS = cases.said_by_base(cases.pair()[0], cases.batches(4, seed=2))
HELD_OUT = HeldOut(SafetyBatches(REFUSALS), {"task": TASK, "benign": BENIGN})
STRENGTHS = (0.1, 1.0, 10.0)


def run(model: Any, **settings: Any) -> RestorationResult:
    settings = {"held_out": HELD_OUT, "benign_batches": BENIGN, "strengths": STRENGTHS, **settings}
    return weighted_return(model, TASK, SafetyBatches(REFUSALS), **settings)


def b_only(model: Any) -> torch.Tensor:
    return flatten(parameter for name, parameter in trainable(model).items() if "lora_B" in name)


@pytest.mark.parametrize("strength", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("low_rank", [True, False])
def test_it_is_the_dense_minimum(strength: float, low_rank: bool) -> None:
    size, tuned = 12, cases.random(12, seed=7)
    rows = [cases.random(3, size, seed=seed) for seed in (1, 2)]
    dense = [u.T @ u if low_rank else cases.spd(size, seed=5 + len(u)) for u in rows]
    operators = [LowRankOperator(u) if low_rank else DenseOperator(m) for u, m in zip(rows, dense, strict=True)]
    valleys = [Valley(a, damping, u) for a, damping, u in zip(operators, (0.3, 0.7), rows, strict=True)]
    found = WayBack.between(*valleys, tuned).solve(strength, products=100)
    task, safety = (m + damping * torch.eye(size).double() for m, damping in zip(dense, (0.3, 0.7), strict=True))
    exact = torch.linalg.solve(task + strength * safety, task @ tuned)
    assert cases.relative_error(tuned + found.solution, exact) < (1e-10 if low_rank else 0.05)
    assert (found.products == 0) == low_rank
    point = exact.clone().requires_grad_()  # the stated objective is at rest there
    away = point - tuned
    (0.5 * away @ task @ away + 0.5 * strength * point @ safety @ point).backward()
    assert point.grad is not None
    assert point.grad.norm() < 1e-9


def test_the_identity_scales_the_adapter() -> None:
    model = cases.nf4_llama()
    tuned = b_only(model)
    result = run(model, metric="identity", budget=Budget(rise=1e9))
    chosen = result.steps[1].trust
    torch.testing.assert_close(b_only(model), tuned / (1 + chosen))
    assert (result.products, result.gradients) == (0, 0)


@pytest.mark.parametrize(
    ("metric", "tolerance"), [("identity", 1e-5), ("fisher", 1e-4), ("ggn", 0.03), ("ekfac", 0.03)]
)
def test_its_ends_are_the_fine_tuned_model_and_the_base(metric: str, tolerance: float) -> None:
    model = cases.nf4_llama()
    with only_b(model) as parameters:
        way = way_back(model, TASK, REFUSALS, metric, 1.0, seed=0)
        assert way.solve(1e-6, 20).solution.norm() < 1e-3 * way.tuned.norm()
        assign(parameters, way.tuned + way.solve(1e6, 20).solution)
    with torch.no_grad():
        returned = answer_logits(model, TASK[0])
        with model.disable_adapter():
            assert cases.relative_error(returned, answer_logits(model, TASK[0])) < tolerance


def test_safety_is_measured_at_the_base_and_the_task_where_it_was_learnt() -> None:
    model = cases.nf4_llama()
    with only_b(model) as parameters:
        way = way_back(model, TASK, REFUSALS, "ggn", 0.1, seed=0)
        tuned, v = way.tuned, cases.random(way.tuned.numel(), dtype=torch.float32)
        torch.testing.assert_close(way.task.curvature.matvec(v), ggn(model, TASK).matvec(v))
        found = way.safety.curvature.matvec(v)
        assert torch.equal(flatten(parameters), tuned)
        assert cases.relative_error(found, ggn(model, REFUSALS).matvec(v)) > 1e-2
        low_rank = way_back(model, TASK, REFUSALS, "fisher", 0.1, seed=0)
        torch.testing.assert_close(low_rank.task.rows, sampled_fisher(model, TASK, samples=DRAWS, seed=0).rows)
        assign(parameters, torch.zeros_like(tuned))
        expected = sampled_fisher(model, REFUSALS, samples=DRAWS, seed=0).rows
        torch.testing.assert_close(low_rank.safety.rows, expected)
        torch.testing.assert_close(found, ggn(model, REFUSALS).matvec(v))


@pytest.mark.parametrize("metric", METRICS)
def test_the_strength_is_the_best_that_stays_in_budget(metric: str) -> None:
    model, rise = cases.nf4_llama(), 0.01
    result = restore(
        model,
        TASK,
        SafetyBatches(REFUSALS),
        held_out=HELD_OUT,
        benign_batches=BENIGN,
        objective="return",
        metric=metric,
        budget=Budget(rise=rise, products=1),
    )
    start, *rest = result.trials
    good = [t for t in rest if all(t.protected[k] <= start.protected[k] + rise for k in start.protected)]
    best = min(good, key=lambda trial: trial.safety)
    assert result.steps == ((start, best) if best.safety < start.safety else (start,))
    assert (result.products > 0) == (metric == "ggn")
    assert torch.equal(flatten(trainable(model)), result.after)
    assert len(rest) == 6


def test_nothing_moves_when_no_strength_passes_and_a_stays_anyway() -> None:
    model = cases.nf4_llama()
    start = flatten(trainable(model))
    result = run(model, budget=Budget(rise=-1.0))
    assert result.stop_reason == "no strength passed the held-out losses"
    assert torch.equal(flatten(trainable(model)), start)
    run(model, budget=Budget(rise=1e9))
    for name, before, after in zip(trainable(model), *both(model, start), strict=True):
        assert torch.equal(before, after) == ("lora_A" in name)


def both(model: Any, start: torch.Tensor) -> tuple[Any, Any]:
    parameters = trainable(model)
    return start.split([p.numel() for p in parameters.values()]), [flatten([p]) for p in parameters.values()]


def test_what_is_no_lora_adapter_is_refused() -> None:
    model = cases.nf4_llama()
    with pytest.raises(CurvlibError, match="a return has no metric 'lbfgs': choose one of identity"):
        run(model, metric="lbfgs")
    with pytest.raises(CurvlibError, match="needs chats of the task and refused"):
        weighted_return(model, [], SafetyBatches(REFUSALS), held_out=HELD_OUT)
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(CurvlibError, match=r"norm.weight is trainable: give such an adapter"):
        run(model)
    with only_b(zero := cases.nf4_llama()) as parameters:
        assign(parameters, torch.zeros_like(flatten(parameters)))
    with pytest.raises(CurvlibError, match="adapter is zero"):
        run(zero)
