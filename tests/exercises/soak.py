"""``make soak``: on 200 seeds each solution passes, and no listed mistake passes at three seeds together."""

from __future__ import annotations

import pytest

from curvlib.exercises import assess
from curvlib.exercises.core import Answer
from tests.exercises.cases import MISTAKES, PARAMETERS, function

SEEDS = range(1000, 1200)


@pytest.mark.parametrize("name", MISTAKES)
def test_the_solution_passes_every_seed(name: str) -> None:
    answer = Answer(function(name))
    lost = {seed: verdict.message for seed in SEEDS if not (verdict := assess(name, answer, [seed]))}
    assert not lost


@pytest.mark.parametrize(("name", "message", "old", "new"), PARAMETERS)
def test_no_mistake_passes_three_seeds(name: str, message: str, old: str, new: str) -> None:
    answer = Answer(function(name, old, new))
    seeds = SEEDS[: 20 if "400,000" in message else 200]
    passed = [bool(assess(name, answer, [seed])) for seed in seeds]
    assert not any(all(passed[start : start + 3]) for start in range(len(passed) - 2))
    assert sum(passed) <= len(seeds) / 20, "a single seed lets it pass too often"
