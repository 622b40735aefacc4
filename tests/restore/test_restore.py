"""The loop on a tiny 4-bit model: it is the lesson's, it ends at its goal, it obeys its limit, it can be undone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from curvlib.batches import make_batches, open_ended, taken_apart
from curvlib.curvature.damping import damped_by_rule, price, protected_halves
from curvlib.errors import CurvlibError
from curvlib.parameters import assign, flatten, trainable
from curvlib.restore import HeldOut, RestorationResult, SafetyBatches, objectives, restore
from tests import cases

TASK, COMPLIANCES, BENIGN = (cases.batches(4, seed=seed) for seed in (1, 3, 4))
REFUSALS = cases.said_by_base(cases.pair()[0], cases.batches(4, seed=2))
REQUESTS = make_batches([open_ended(example, 1) for example in taken_apart(REFUSALS)], 3, 0)
MARGIN = objectives.Margin(REQUESTS, 3.0, [3, 4, 5], [6, 7])
SAFETY = SafetyBatches(REFUSALS, COMPLIANCES, MARGIN)
ROLES = {"task": TASK, "benign": BENIGN}


def run(model: Any, **settings: Any) -> RestorationResult:
    judged = SAFETY if settings.get("objective") == "margin" else replace(SAFETY, margin=None)
    return restore(model, SAFETY, ROLES, HeldOut(judged, ROLES), **settings)


def lesson(model: Any, metric: str) -> torch.Tensor:
    """The loop as lesson 05 writes it, to seven tenths of the way."""
    theta, terms = trainable(model), objectives.terms("refusal", SAFETY)

    def loss() -> float:
        return objectives.mean_loss(model, REFUSALS)

    def slope() -> torch.Tensor:
        return objectives.gradient(model, terms, list(theta.values()))

    tuned = loss()
    with model.disable_adapter():
        aligned = loss()
    for parameter in theta.values():
        parameter.requires_grad_(True)
    goal, gain = tuned - 0.7 * (tuned - aligned), (tuned - aligned) / 5
    inverse, _ = damped_by_rule(metric, model, protected_halves(model, ROLES), slope())
    history = [(tuned, flatten(theta))]
    while history[-1][0] > goal:
        g, (before, here), length = slope(), history[-1], gain
        v = inverse(g)
        assign(theta, here - length * v / float(g @ v))
        while (now := loss()) >= before and length > gain / 16:
            length /= 2
            assign(theta, here - length * v / float(g @ v))
        history.append((now, flatten(theta)))
    (above, left), (below, right) = history[-2:]
    for _ in range(4):
        middle = left + (above - goal) / (above - below) * (right - left)
        assign(theta, middle)
        now = loss()
        if abs(now - goal) < 0.005 * (tuned - aligned):
            break
        above, left, below, right = (now, middle, below, right) if now > goal else (above, left, now, middle)
    return flatten(theta)


@pytest.mark.parametrize("metric", ["identity", "diagonal", "ekfac"])
def test_it_is_the_lessons_loop(metric: str, device: str) -> None:
    model = cases.nf4_llama(device=device)
    result = run(model, metric=metric)
    assert result.stop_reason == "reached the goal"
    assert len(result.path) > 2
    assert result.path[-1].loss == pytest.approx(result.goal, abs=0.01)
    torch.testing.assert_close(result.after, lesson(cases.nf4_llama(device=device), metric), rtol=1e-4, atol=1e-5)
    assert torch.equal(flatten(trainable(model)), result.after)


def test_the_first_move_is_the_dense_natural_one_of_the_gain_that_was_asked() -> None:
    model = cases.nf4_llama()
    fitting, held_out = protected_halves(model, ROLES)
    gradient = objectives.gradient(model, objectives.terms("refusal", SAFETY), list(trainable(model).values()))
    result = run(model, metric="fisher", gain=0.01, moves=1)
    assert result.damping
    g, rows = gradient.double(), fitting.fisher.rows.double()
    natural = torch.linalg.solve(rows.T @ rows + result.damping.value * torch.eye(len(g)), g)
    move = result.after - result.before
    assert cases.relative_error(move, -0.01 * natural / (g @ natural)) < 1e-3
    paid = [float(v @ held_out.fisher.matvec(v.float()).double() / (g @ v) ** 2) for v in (natural, g)]
    assert result.damping.ratio == pytest.approx(paid[0] / paid[1], rel=1e-3)
    assert run(cases.nf4_llama(), metric="fisher", gain=0.02, moves=1).path[-1].norm == pytest.approx(
        2 * result.path[-1].norm, rel=1e-4
    )


@pytest.mark.parametrize("objective", ["ascent", "composite", "margin", "distill"])
def test_every_objective_falls_and_ends_at_a_goal_of_its_own(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "COMPLIANCE_BOUND", 50.0)  # random weights are at the usual bound already
    monkeypatch.setitem(objectives.GOALS, "ascent", -6.0)
    model = cases.nf4_llama()
    result = run(model, objective=objective, metric="diagonal", moves=4)
    losses = [point.loss for point in result.path]
    assert len(losses) > 1
    assert losses == sorted(losses, reverse=True)
    end = objectives.value(model, objectives.terms(objective, SAFETY, ROLES, judging=True))
    assert losses[-1] == pytest.approx(end)
    goals = {**objectives.GOALS, "distill": 0.3 * losses[0]}  # the base's own divergence is zero
    assert result.goal == pytest.approx(goals[objective], abs=1e-5)


@pytest.mark.parametrize("nats", [0.5, 1.5])
def test_the_margin_ends_where_the_mean_log_odds_reach_it(nats: float) -> None:
    model, margin = cases.nf4_llama(), replace(MARGIN, nats=nats)
    safety = SafetyBatches(REFUSALS, margin=margin)
    result = restore(model, safety, ROLES, HeldOut(safety, ROLES), objective="margin", metric="diagonal")
    with torch.no_grad():
        found = torch.cat([objectives.log_odds(model, batch, margin) for batch in REQUESTS])
    assert result.stop_reason == "reached the goal"
    assert nats - result.path[0].loss < 0.4 < float(found.mean())
    assert float(found.mean()) == pytest.approx(nats, abs=0.01)
    assert (found < nats).any()  # the mean is there, not each of them


def test_it_ends_where_nothing_to_learn_from_is_short_of_the_margin() -> None:
    easy, hard = (SafetyBatches(REFUSALS, margin=replace(MARGIN, nats=nats)) for nats in (-20.0, 20.0))
    result = restore(cases.nf4_llama(), easy, ROLES, HeldOut(hard, ROLES), objective="margin")
    assert (result.stop_reason, len(result.path)) == ("nothing to learn from is short of the margin", 1)


def test_the_goal_is_a_share_of_the_way_to_the_model_without_its_adapter() -> None:
    model = cases.nf4_llama()
    tuned = objectives.mean_loss(model, REFUSALS)
    with model.disable_adapter():
        aligned = objectives.mean_loss(model, REFUSALS)
    results = [run(cases.nf4_llama(), metric="identity", way=way) for way in (0.3, 0.6)]
    assert [result.goal for result in results] == pytest.approx([tuned - way * (tuned - aligned) for way in (0.3, 0.6)])
    assert results[0].path[-1].norm < results[1].path[-1].norm
    there = run(cases.nf4_llama(), way=0.0)
    assert (there.stop_reason, len(there.path), there.damping) == ("the goal is behind the model already", 1, None)


def test_the_goal_is_in_log_odds_where_held_out_chats_have_a_margin() -> None:
    """The refusals' first tokens are the likelier ones without the adapter; the loss is that of the whole refusals."""
    model, firsts = (
        cases.nf4_llama(),
        sorted({int(batch.labels[row, -1]) for batch in REQUESTS for row in range(len(batch))}),
    )
    margin = replace(MARGIN, nats=0.0, refusing=firsts, agreeing=[token for token in (6, 7, 8) if token not in firsts])

    def odds() -> float:
        with torch.no_grad():
            return float(torch.cat([objectives.log_odds(model, batch, margin) for batch in REQUESTS]).mean())

    tuned = odds()
    with model.disable_adapter():
        goal = tuned + 0.7 * (odds() - tuned)
    assert goal > tuned
    result = restore(model, SAFETY, ROLES, HeldOut(SafetyBatches(REFUSALS, margin=margin), ROLES), metric="diagonal")
    assert result.stop_reason == "reached the goal"
    assert odds() == pytest.approx(goal, abs=0.01 * (goal - tuned))
    assert [-result.path[0].loss, -result.goal] == pytest.approx([tuned, goal], abs=1e-4)


def test_the_limit_holds_and_the_price_is_that_of_the_way() -> None:
    model = cases.nf4_llama()
    free = run(model, metric="identity")
    assign(trainable(model), free.before)
    for role, chats in ROLES.items():
        paid = price(model, free.after - free.before, chats)
        assert free.path[-1].price[role] == pytest.approx(paid, rel=1e-3)
    assert free.path[0].price == {"task": 0.0, "benign": 0.0}
    limit = 0.3 * max(free.path[-1].price.values())
    result = run(model, metric="identity", limit=limit)
    assert 0 < max(result.path[-1].price.values()) <= limit
    assert result.stop_reason == "no move passed the held-out chats"
    assert result.path[-1].loss > result.goal


def test_nothing_moves_where_no_move_passes_and_all_can_be_undone() -> None:
    model = cases.nf4_llama()
    start = flatten(trainable(model))
    result = run(model, limit=0.0)
    assert (result.stop_reason, len(result.path)) == ("no move passed the held-out chats", 1)
    assert torch.equal(flatten(trainable(model)), start)
    result = run(model)
    assert not torch.equal(result.after, start)
    assign(trainable(model), result.before)
    assert torch.equal(flatten(trainable(model)), start)


def test_the_same_seed_gives_the_same_adapter() -> None:
    first, again = (run(cases.nf4_llama(), seed=5).after for _ in range(2))
    torch.testing.assert_close(first, again, atol=1e-6, rtol=0)


def test_it_counts_what_it_spends() -> None:
    for metric, gradients, products in (("identity", 4 + 8, 0), ("ekfac", 4 + 8 + 8, 0), ("ggn", 4 + 8, None)):
        result = run(cases.nf4_llama(), metric=metric, moves=1)
        assert result.gradients == gradients  # refusals; both halves of what stays; EK-FAC reads its half twice more
        assert result.products == products or (products is None and 30 < result.products <= 60)


def test_names_that_are_unknown_and_losses_that_are_no_numbers_are_refused() -> None:
    for settings, message in (({"objective": "hope"}, "no objective is called"), ({"metric": "euclid"}, "is called")):
        with pytest.raises(CurvlibError, match=message):
            run(cases.nf4_llama(), **settings)
    broken = cases.nf4_llama()
    trainable(broken)[next(iter(trainable(broken)))].data.fill_(math.nan)
    with pytest.raises(CurvlibError, match="the held-out loss is nan"):
        run(broken)
