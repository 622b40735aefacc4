"""The damping rule on quadratics where λ, price and gain are known, what constants score, and the price on a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from curvlib.batches import answer_logits
from curvlib.curvature.damping import (
    DECADES,
    Half,
    choose_damping,
    damped_by_rule,
    halves,
    price,
    protected_halves,
    rate,
)
from curvlib.curvature.ggn import ggn
from curvlib.curvature.inverse import Fit
from curvlib.curvature.lowrank import LowRankOperator
from curvlib.curvature.operator import DenseOperator, DiagonalOperator
from curvlib.errors import CurvlibError
from curvlib.parameters import flatten, trainable
from tests import cases

SIZE = 400
SPECTRUM = torch.logspace(-2, 2, SIZE, dtype=torch.float64)
SPECTRUM /= SPECTRUM.mean()
GRADIENT = cases.random(SIZE)


def diagonal(values: Tensor) -> Fit:
    return Fit("diagonal", DiagonalOperator(values))


def best_ratio(f: Tensor) -> float:
    """The price of F⁻¹g over that of g, by hand: the reciprocal of Kantorovich's ratio."""
    gain = GRADIENT.square()
    return float(gain.sum() ** 2 / ((gain * f).sum() * (gain / f).sum()))


@pytest.mark.parametrize("right", [1e-3, 0.1, 10.0])
def test_the_right_damping_is_taken_and_buys_what_the_closed_form_says(right: float) -> None:
    held_out = SPECTRUM + right  # so that C + λ is F for that λ alone
    found = choose_damping(diagonal(SPECTRUM), DiagonalOperator(held_out), GRADIENT)
    assert found.value == pytest.approx(right)
    assert found.ratio == pytest.approx(best_ratio(held_out))
    assert found.above == int((right < SPECTRUM).sum())
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(GRADIENT / held_out, GRADIENT, dim=0)))
    torch.testing.assert_close(found.direction, GRADIENT / (SPECTRUM + found.value))
    assert len(found.tried) == len(DECADES)
    assert max(found.tried) / min(found.tried) == pytest.approx(1e6)
    assert all(ratio > found.ratio for damping, ratio in found.tried.items() if damping != found.value)


def test_the_oracle_scores_its_closed_form_where_damping_vanishes() -> None:
    found = choose_damping(diagonal(SPECTRUM), DiagonalOperator(SPECTRUM), GRADIENT)
    assert found.value == pytest.approx(min(DECADES))
    assert best_ratio(SPECTRUM) <= found.ratio < 1.1 * best_ratio(SPECTRUM)
    assert not found.is_identity


def shuffled(values: Tensor) -> Tensor:
    return values[torch.randperm(SIZE, generator=torch.Generator().manual_seed(3))]


@pytest.mark.parametrize(
    "fitted",
    [Fit("identity"), diagonal(torch.ones(SIZE, dtype=torch.float64)), diagonal(shuffled(SPECTRUM))],
    ids=["identity", "constant", "shuffled"],
)
def test_what_constants_and_random_diagonals_score(fitted: Fit) -> None:
    found = choose_damping(fitted, DiagonalOperator(SPECTRUM), GRADIENT)
    assert found.ratio == pytest.approx(1.0, abs=0.05)
    assert found.is_identity
    assert ("in effect the identity" in str(found)) == (fitted.name != "identity")


def test_a_random_diagonal_without_damping_costs_more_than_the_plain_step() -> None:
    found = choose_damping(diagonal(shuffled(SPECTRUM)), DiagonalOperator(SPECTRUM), GRADIENT)
    assert found.tried[min(found.tried)] > 2
    assert found.value == max(found.tried)


def test_a_krylov_space_finds_the_damping_of_the_dense_inverse() -> None:
    rows = cases.random(12, 30)
    matrix, gradient = rows.T @ rows / 12, cases.random(30, seed=5)
    unit = float(matrix.trace()) / 30
    held_out = DenseOperator(matrix + 0.1 * unit * torch.eye(30, dtype=torch.float64))
    fitted = Fit("ggn", DenseOperator(matrix), LowRankOperator(rows / 12**0.5))
    found = choose_damping(fitted, held_out, gradient)
    assert found.value == pytest.approx(0.1 * unit)
    assert found.above is None
    exact = torch.linalg.solve(held_out.matrix, gradient)
    assert cases.relative_error(found.direction, exact) < 1e-8
    assert found.ratio == pytest.approx(rate(held_out, gradient, exact) / rate(held_out, gradient, gradient))


@pytest.mark.parametrize("errors", [0.0, 1.0, 2.0])
def test_the_largest_damping_within_standard_errors_of_the_least_price_is_taken(errors: float) -> None:
    rows = SPECTRUM.sqrt() * cases.random(20, SIZE, seed=7)  # of 20 chats; a chat's part of the price is one square
    found = choose_damping(diagonal(SPECTRUM), LowRankOperator(rows), GRADIENT, errors=errors)
    prices = {}
    for damping in found.tried:
        v = GRADIENT / (SPECTRUM + damping)
        parts = (rows @ v / (GRADIENT @ v)).square()
        prices[damping] = float(parts.sum()), float(parts.std()) * 20**0.5
    least, error = min(prices.values())
    good = [damping for damping, (price, _) in prices.items() if price <= least + errors * error]
    assert found.value == max(good)
    assert len(good) == 1 if errors == 0 else len(good) > 1
    torch.testing.assert_close(found.direction, GRADIENT / (SPECTRUM + found.value))


def test_a_step_against_the_gradient_is_never_taken() -> None:
    values = SPECTRUM.clone()
    values[:200] = -1.0  # at small λ the step climbs there
    found = choose_damping(Fit("diagonal", DiagonalOperator(values + 1.5)), DiagonalOperator(SPECTRUM), GRADIENT)
    assert found.ratio < float("inf")
    assert rate(DiagonalOperator(SPECTRUM), GRADIENT, -GRADIENT) == float("inf")


def test_a_gradient_of_zero_is_one_line() -> None:
    with pytest.raises(CurvlibError, match="the plain step has price"):
        choose_damping(Fit("identity"), DiagonalOperator(SPECTRUM), 0 * GRADIENT)


def test_halves_hold_every_chat_once() -> None:
    batches = cases.batches(10, 3)
    first, second = halves(batches)
    assert {sum(map(len, half)) for half in (first, second)} == {5}
    tokens = [sorted(tuple(row.tolist()) for row in half_rows(half)) for half in (batches, [*first, *second])]
    assert tokens[0] == tokens[1]
    with pytest.raises(CurvlibError, match="fewer than two chats"):
        halves([batches[0].rows(0, 1)])


def half_rows(batches: Any) -> list[Tensor]:
    return [ids[mask > 0] for batch in batches for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]


def protected() -> tuple[Half, Half]:
    return protected_halves(cases.pair()[0], {"task": cases.batches(2, seed=1), "benign": cases.batches(6, seed=4)})


def test_roles_have_equal_traces_and_the_sum_is_kept() -> None:
    for half in protected():
        shares = half.fisher.rows.square().sum(dim=1).split([len(batch) for batch in half.batches])
        by_batch = torch.stack([share.sum() for share in shares])
        plain = by_batch / torch.tensor(half.weights)
        assert float(by_batch[0]) == pytest.approx(float(by_batch[1:].sum()), rel=1e-4)  # the task is one batch
        assert float(by_batch.sum()) == pytest.approx(float(plain.sum()), rel=1e-4)
        assert abs(float(plain[0] / plain.sum()) - 0.5) > 0.05


def test_the_rule_on_a_model_prices_the_step_that_its_inverse_makes() -> None:
    model, both = cases.pair()[0], protected()
    gradient = cases.random(both[0].fisher.size, dtype=torch.float32)
    for name in ("identity", "diagonal", "fisher", "ekfac", "ggn"):
        inverse, found = damped_by_rule(name, model, both, gradient)
        held_out = both[1].fisher
        ratio = rate(held_out, gradient, inverse(gradient)) / rate(held_out, gradient, gradient)
        assert found.ratio == pytest.approx(ratio, rel=0.02)
        assert (found.name, inverse.damping) == (name, found.value)


def logits(model: Any, batches: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat([answer_logits(model, batch) for batch in batches]).double()


@pytest.mark.parametrize("which", [0, 1], ids=["NF4", "dense"])
def test_price_is_the_divergence_in_nats_a_token(which: int, device: str) -> None:
    model, batches = cases.pair(device)[which], cases.batches(4)
    parameters = trainable(model)
    start = flatten(parameters)
    step = 0.3 * cases.random(len(start)).to(start)
    before = logits(model, batches).log_softmax(-1)
    told = price(model, step, batches)
    assert torch.equal(flatten(parameters), start)
    assert price(model, 0 * step, batches) == pytest.approx(0, abs=1e-9)
    after = shifted_logits(model, step, lambda: logits(model, batches)).log_softmax(-1)
    assert told == pytest.approx(float((before.exp() * (before - after)).sum(1).mean()), rel=1e-4)
    assert told != pytest.approx(float((after.exp() * (after - before)).sum(1).mean()), rel=1e-3)  # the other way
    short = 0.02 * step
    form = float(short @ ggn(model, batches).matvec(short))
    assert price(model, short, batches) == pytest.approx(form / 2, rel=0.05)


def shifted_logits(model: Any, step: Tensor, work: Callable[[], Tensor]) -> Tensor:
    parameters = trainable(model)
    start = flatten(parameters)
    with torch.no_grad():
        for sign in (1, -1):
            at = 0
            for parameter in parameters.values():
                parameter += sign * step[at : at + parameter.numel()].view(parameter.shape)
                at += parameter.numel()
            if sign > 0:
                result = work()
    assert cases.relative_error(flatten(parameters), start) < 1e-6
    return result
