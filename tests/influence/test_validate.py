"""Validation: exact leave-one-out, the datamodeling score where it is known, and rankings against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from curvlib.errors import CurvlibError
from curvlib.influence import toys, validate
from curvlib.influence.toys import fit, retrainer, toy, unchanged
from curvlib.parameters import flatten, trainable
from tests import cases

FLAGS = [True, False, True, False, False]


def test_the_closed_form_is_refitting_without_each_point() -> None:
    x, y, asked, targets, ridge = (
        cases.random(7, 3),
        cases.random(7, seed=1),
        cases.random(2, 3, seed=2),
        cases.random(2),
        0.1,
    )

    def retrain(kept: object) -> torch.Tensor:
        rows = list(kept)  # type: ignore[call-overload]
        normal = x[rows].T @ x[rows] / 7 + ridge * torch.eye(3, dtype=x.dtype)
        theta = torch.linalg.solve(normal, x[rows].T @ y[rows] / 7)
        return (asked @ theta - targets).square() / 2

    exact, predicted = validate.ridge_leave_one_out(x, y, asked, targets, ridge)
    assert cases.relative_error(exact, validate.leave_one_out(retrain, 7)) < 1e-10
    assert 1e-3 < cases.relative_error(predicted, exact) < 1  # first order only: the leverage is left out


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_influence_orders_leave_one_out_of_the_convex_toy(seed: int) -> None:
    exact, predicted = toys.ridge_case(seed)
    found = validate.rank_correlations(predicted.numpy(), exact.numpy()).mean()
    assert found >= 0.95
    wrong = predicted[:, np.random.default_rng(0).permutation(predicted.shape[1])]
    assert abs(validate.rank_correlations(wrong.numpy(), exact.numpy()).mean()) < 0.5


def test_influence_orders_leave_one_out_of_the_tiny_transformer() -> None:
    _, actual, found = toys.transformer_case(0, ("identity", "cg", "hessian"))
    order = {name: validate.rank_correlations(v.double().numpy(), actual.numpy()).mean() for name, v in found.items()}
    assert order["hessian"] >= 0.9
    assert order["hessian"] > order["cg"] > order["identity"]
    slope = float((found["hessian"] * actual).sum() / found["hessian"].double().square().sum())
    assert 0.7 < slope < 1.4  # the scale is that of the effects, not their order alone


def test_a_fit_ends_at_an_optimum_and_the_model_is_put_back() -> None:
    case = toy(chats=8, poison=2, queries=2)
    before = flatten(trainable(case.model))
    with unchanged(case.model):
        slopes = [fit(case.model, case.examples, range(8), ridge=0.1, anchor=before, steps=s) for s in (1, 100)]
        assert slopes[1] < 1e-3 < slopes[0]
    retrain = retrainer(case.model, case.examples, case.queries, ridge=0.1, anchor=before)
    assert not torch.allclose(retrain(range(8)), retrain(range(2, 8)))
    assert torch.equal(flatten(trainable(case.model)), before)
    with pytest.raises(CurvlibError, match="do not fit"):
        toy(chats=2, poison=3)


def test_subsets_are_random_halves() -> None:
    chosen = validate.subsets(10, 50, seed=1)
    assert chosen == validate.subsets(10, 50, seed=1) != validate.subsets(10, 50, seed=2)
    assert all(len(set(part)) == 5 and part == sorted(part) and min(part) >= 0 and max(part) < 10 for part in chosen)
    assert np.bincount(np.concatenate(chosen)).min() > 10


def test_the_datamodeling_score_is_one_for_an_additive_loss_and_about_zero_for_noise() -> None:
    scores, chosen = cases.random(3, 20), validate.subsets(20, 60)
    losses = torch.stack([scores[:, part].sum(dim=1) ** 3 for part in chosen], dim=1)  # any increasing function
    found = validate.datamodeling_score(scores, chosen, losses)
    assert (found.value, found.low, found.n) == (pytest.approx(1), pytest.approx(1), 60)
    assert validate.datamodeling_score(-scores, chosen, losses).value == pytest.approx(-1)
    noise = validate.datamodeling_score(cases.random(3, 20, seed=9), chosen, losses)
    assert noise.low < 0.35
    assert noise.value < 0.5
    with pytest.raises(CurvlibError, match=r"expected \(m, n\), \(m, M\)"):
        validate.datamodeling_score(scores, chosen[:2], losses[:, :2])


def test_a_gain_is_the_difference_of_two_scores_and_nothing_over_oneself() -> None:
    scores, chosen = cases.random(3, 20), validate.subsets(20, 60)
    losses, noise = torch.stack([scores[:, part].sum(dim=1) for part in chosen], dim=1), cases.random(3, 20, seed=9)
    found = validate.datamodeling_gain(scores, noise, chosen, losses)
    apart = [validate.datamodeling_score(values, chosen, losses).value for values in (scores, noise)]
    assert found.value == pytest.approx(apart[0] - apart[1])
    assert 0 < found.low <= found.value <= found.high
    same = validate.datamodeling_gain(scores, scores, chosen, losses)
    assert (same.low, same.value, same.high) == (0, 0, 0)


def test_auroc_counts_pairs_and_ties_half() -> None:
    assert validate.auroc([5, 1, 4, 2, 3], FLAGS).value == 1
    assert validate.auroc([1, 1, 1, 1, 1], FLAGS).value == 0.5
    found = validate.auroc([5, 1, 0, 2, 3], FLAGS)
    assert (found.value, found.n) == (0.5, 5)
    assert found.low <= 0.5 <= found.high
    for flags in ([False] * 5, [True] * 5, FLAGS[:3]):
        with pytest.raises(CurvlibError, match="expected one score a chat and both kinds"):
            validate.auroc([1, 2, 3, 4, 5], flags)


def test_the_most_suspicious_come_first() -> None:
    assert validate.most_suspicious([1, 3, 3, 2], 3) == [1, 2, 3]
    assert validate.precision_at([5, 1, 0, 2, 3], FLAGS, 2) == 0.5
