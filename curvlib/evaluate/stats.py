"""Intervals for the numbers that the notebooks state: Wilson for rates, the percentile bootstrap for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from curvlib.errors import CurvlibError

Statistic = Callable[..., Any]
RESAMPLES = 2000  # the Monte Carlo error of a 95 % limit is then about 0.05 standard errors of the statistic


@dataclass(frozen=True)
class Estimate:
    """A value with its interval [low, high] and the number n of observations behind it."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}], n={self.n}"

    def __format__(self, form: str) -> str:
        """Write the value and its interval in one number format; n is left out.

        >>> f"{Estimate(0.5, 0.25, 0.75, 4):.1f}"
        '0.5 [0.2, 0.8]'
        """
        if not form:
            return str(self)
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"

    @property
    def percent(self) -> Estimate:
        """The same rate in per cent."""
        return Estimate(100 * self.value, 100 * self.low, 100 * self.high, self.n)

    def columns(self, name: str) -> dict[str, Any]:
        """Return the fields under ``name_value``, ``name_low``, ``name_high`` and ``name_n``, for a study's row."""
        return {f"{name}_{field}": value for field, value in asdict(self).items()}


def wilson(successes: int, n: int, level: float = 0.95) -> Estimate:
    """Estimate a rate with Wilson's score interval, which stays inside [0, 1] and keeps its width at 0 and n successes.

    With p = successes / n and z the normal quantile: (p + z²/2n ± z √(p(1 - p)/n + z²/4n²)) / (1 + z²/n).
    Source: Wilson, JASA 22 (1927); computed by `scipy.stats.binomtest`.
    Raises CurvlibError unless 0 ≤ successes ≤ n and n ≥ 1.

    >>> print(wilson(0, 10))
    0 [0, 0.278], n=10
    """
    if n < 1 or not 0 <= successes <= n:
        raise CurvlibError(f"{successes} successes of {n} given, expected 0 <= successes <= n and 1 <= n: recount")
    interval = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    return Estimate(successes / n, float(interval.low), float(interval.high), n)


def bootstrap(
    *samples: ArrayLike,
    statistic: Statistic = np.mean,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    paired: bool = True,
) -> Estimate:
    """Estimate a statistic of one sample, or of several, with the percentile bootstrap interval.

    `samples` are (n,) each; observation i is drawn from all of them together, unless they are not `paired`: then each
    is drawn apart, sizes may differ, and `n` is the least. `statistic` takes as many arrays and returns a number; one
    that takes `axis` too, as `numpy.mean` does, is given all draws at once, which is several times as fast.
    Source: Efron and Tibshirani (1993), computed by `scipy.stats.bootstrap`.
    Raises CurvlibError for fewer than two observations, or for pairs of unequal number.
    """
    arrays = [np.asarray(sample, dtype=float) for sample in samples]
    if min(map(len, arrays)) < 2 or (paired and len(set(map(len, arrays))) > 1):
        sizes = [len(array) for array in arrays]
        wanted = "equal sizes of at least two" if paired else "at least two in each"
        raise CurvlibError(f"samples of {sizes} observations given, expected {wanted}: add some")
    result = stats.bootstrap(
        arrays,
        statistic,
        paired=paired,
        n_resamples=resamples,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    interval = result.confidence_interval
    return Estimate(float(statistic(*arrays)), float(interval.low), float(interval.high), min(map(len, arrays)))


def paired_difference(first: ArrayLike, second: ArrayLike, *, seed: int = 0, level: float = 0.95) -> Estimate:
    """Estimate mean(first - second) where observation i of both belongs to the same prompt, example or seed."""
    return bootstrap(first, second, statistic=lambda a, b, axis=-1: np.mean(a - b, axis), seed=seed, level=level)


def over_seeds(first: ArrayLike, second: ArrayLike, *, seed: int = 0) -> Estimate:
    """Estimate mean(first - second) of two arrays (seeds, prompts); a prompt's mean over the seeds is one observation.

    A prompt that was asked of three models is no three prompts, so the interval draws prompts anew, with all their
    seeds. How far the seeds lie apart is not in it: tell that beside it.

    >>> print(over_seeds([[1, 0], [1, 0]], [[0, 0], [0, 0]]))
    0.5 [0, 1], n=2
    """
    return bootstrap((np.asarray(first, dtype=float) - np.asarray(second, dtype=float)).mean(axis=0), seed=seed)


def sum_over_seeds(*differences: ArrayLike, seed: int = 0) -> Estimate:
    """Estimate the sum of the means of several arrays (seeds, prompts) whose prompts are not the same; see above.

    >>> print(sum_over_seeds([[1, 1]], [[0, 0, 1, 1], [1, 1, 0, 0]]))
    1.5 [1.5, 1.5], n=2
    """
    by_prompt = [np.asarray(difference, dtype=float).mean(axis=0) for difference in differences]
    return bootstrap(*by_prompt, statistic=_sum_of_means, seed=seed, paired=False)


def _sum_of_means(*samples: NDArray[Any], axis: int = -1) -> Any:
    return sum(sample.mean(axis) for sample in samples)


def pooled_rate(flags: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Estimate a rate from flags (seeds, prompts): its mean, and the hull of two 95 % intervals.

    One is Wilson's with as many observations as prompts, for a prompt asked of three seeds is no three prompts; it is
    wide where nothing was seen. The other is the percentile bootstrap that draws seeds and prompts anew, each with
    replacement; it is wide where seeds differ.
    """
    observed: NDArray[Any] = np.asarray(flags, dtype=float)
    seeds, prompts = observed.shape
    value, generator = float(observed.mean()), np.random.default_rng(seed)
    score = wilson(round(value * prompts), prompts)
    chosen = (
        generator.integers(seeds, size=(resamples, seeds, 1)),
        generator.integers(prompts, size=(resamples, 1, prompts)),
    )
    drawn = observed[chosen].mean(axis=(1, 2))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(value, min(score.low, float(low)), max(score.high, float(high)), prompts)


def cohen_kappa(first: ArrayLike, second: ArrayLike) -> float:
    """Return Cohen's κ = (p_o - p_e) / (1 - p_e): agreement of two raters beyond chance.

    p_o is the share of equal labels, p_e that expected from each rater's own label frequencies. Where both raters give
    one and the same label throughout (p_e = 1) κ is not defined; 1.0 is returned. Source: Cohen (1960).

    >>> cohen_kappa([1, 1, 0, 0], [1, 0, 0, 0])
    0.5
    """
    a: NDArray[Any] = np.asarray(first)
    b: NDArray[Any] = np.asarray(second)
    observed = float(np.mean(a == b))
    chance = sum(float(np.mean(a == label) * np.mean(b == label)) for label in np.union1d(a, b))
    return 1.0 if chance == 1.0 else (observed - chance) / (1.0 - chance)


def rate(flags: Sequence[bool], level: float = 0.95) -> Estimate:
    """Return the share of true flags with its Wilson interval."""
    return wilson(sum(map(bool, flags)), len(flags), level)
