from __future__ import annotations

import math

import numpy as np
import pytest

from curvlib.errors import CurvlibError
from curvlib.evaluate.stats import bootstrap, cohen_kappa, paired_difference, pooled_rate, rate, wilson


@pytest.mark.parametrize(("successes", "n"), [(0, 20), (3, 20), (20, 20), (95, 100)])
def test_wilson_is_its_formula(successes: int, n: int) -> None:
    p, z = successes / n, 1.959963984540054
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    found = wilson(successes, n)
    expected = (p, (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n))
    assert (found.value, found.low, found.high) == pytest.approx(expected, abs=1e-12)
    assert rate([True] * successes + [False] * (n - successes)) == found


def test_wilson_covers_as_it_says() -> None:
    counts = np.random.default_rng(0).binomial(60, 0.9, size=2000)
    inside = [found.low <= 0.9 <= found.high for found in (wilson(int(k), 60) for k in counts)]
    assert 0.93 < np.mean(inside) < 0.975


def test_bootstrap_of_a_mean_has_the_normal_width() -> None:
    values = np.random.default_rng(1).normal(2.0, 3.0, size=400)
    found = bootstrap(values)
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.08)
    assert bootstrap(values) == found
    assert bootstrap(values, seed=1) != found


def test_pairing_removes_what_both_share() -> None:
    rng = np.random.default_rng(2)
    shared = rng.normal(0, 10, 100)
    found = paired_difference(shared + 1 + rng.normal(0, 0.1, 100), shared)
    assert found.value == pytest.approx(1, abs=0.05)
    assert found.high - found.low < 0.1  # unpaired, the interval would be about 5 wide


def test_kappa_by_hand() -> None:
    first = [1] * 25 + [0] * 25
    second = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15  # the textbook table 20, 5, 10, 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa(["a", "b"], ["b", "a"]) == -1.0
    assert cohen_kappa([1, 1], [1, 1]) == 1.0


def test_impossible_counts_and_samples_are_refused() -> None:
    for successes, n in [(0, 0), (3, 2), (-1, 2)]:
        with pytest.raises(CurvlibError, match="successes"):
            wilson(successes, n)
    for samples in [([1.0],), ([1.0, 2.0], [1.0])]:
        with pytest.raises(CurvlibError, match="observations"):
            bootstrap(*samples)


def test_the_interval_is_wide_where_seeds_differ_and_where_nothing_was_seen() -> None:
    same, differ = np.tile([1.0] * 30 + [0.0] * 30, (3, 1)), np.repeat([[0.0], [0.5], [1.0]], 60, axis=1).round()
    narrow, wide = pooled_rate(same, resamples=300), pooled_rate(differ, resamples=300)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
    assert pooled_rate(np.zeros((3, 60)), resamples=50).high == pytest.approx(wilson(0, 60).high)
