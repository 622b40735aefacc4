"""Validation: the datamodeling score where it is known, and rankings against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from curvlib.errors import CurvlibError
from curvlib.influence import validate
from tests import cases

FLAGS = [True, False, True, False, False]


def subsets(n: int, count: int) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [sorted(generator.choice(n, n // 2, replace=False).tolist()) for _ in range(count)]


def test_the_datamodeling_score_is_one_for_an_additive_loss_and_about_zero_for_noise() -> None:
    scores, chosen = cases.random(3, 20), subsets(20, 60)
    losses = torch.stack([scores[:, part].sum(dim=1) ** 3 for part in chosen], dim=1)  # any increasing function
    found = validate.datamodeling_score(scores, chosen, losses)
    assert (found.value, found.low, found.n) == (pytest.approx(1), pytest.approx(1), 60)
    assert validate.datamodeling_score(-scores, chosen, losses).value == pytest.approx(-1)
    noise = validate.datamodeling_score(cases.random(3, 20, seed=9), chosen, losses)
    assert noise.low < 0.35
    assert noise.value < 0.5
    with pytest.raises(CurvlibError, match=r"expected \(m, n\), \(m, M\)"):
        validate.datamodeling_score(scores, chosen[:2], losses[:, :2])


def test_auroc_counts_pairs_and_ties_half() -> None:
    assert validate.auroc([5, 1, 4, 2, 3], FLAGS).value == 1
    assert validate.auroc([1, 1, 1, 1, 1], FLAGS).value == 0.5
    found = validate.auroc([5, 1, 0, 2, 3], FLAGS)
    assert (found.value, found.n) == (0.5, 5)
    assert found.low <= 0.5 <= found.high
    for flags in ([False] * 5, [True] * 5, FLAGS[:3]):
        with pytest.raises(CurvlibError, match="expected one score a chat and both kinds"):
            validate.auroc([1, 2, 3, 4, 5], flags)
