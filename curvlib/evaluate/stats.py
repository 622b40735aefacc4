"""The statistics of everything that the notebooks state: intervals, equivalence, families of tests, agreement.

One model's rate: :func:`wilson`. Two models, the same prompts: :func:`paired_proportions`. A method: fine-tunes are the
unit, so :func:`over_fine_tunes`, :func:`ratio_over_fine_tunes` or, where prompts vary too,
:func:`hierarchical_bootstrap`. Other numbers of one sample: :func:`bootstrap`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

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

    def at_most(self, limit: float) -> bool:
        """Tell whether the upper end lies below `limit`, which shows "no worse than"; a value alone never does."""
        return self.high < limit

    def columns(self, name: str) -> dict[str, Any]:
        """Return the fields under ``name_value``, ``name_low``, ``name_high`` and ``name_n``, for a study's row."""
        return {f"{name}_{field}": value for field, value in asdict(self).items()}


def wilson(successes: int, n: int, level: float = 0.95) -> Estimate:
    """Estimate a rate with Wilson's score interval, which stays inside [0, 1] and keeps its width at 0 and n successes.

    With p = successes / n and z the normal quantile: (p + z²/2n ± z √(p(1 - p)/n + z²/4n²)) / (1 + z²/n).
    Source: Wilson, JASA 22 (1927). Raises CurvlibError unless 0 ≤ successes ≤ n and n ≥ 1.

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
        raise CurvlibError(f"samples of {sizes} observations given, expected two in each and, in pairs, equal sizes")
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


def over_fine_tunes(values: ArrayLike, *, level: float = 0.95) -> Estimate:
    """Estimate the mean of one number a fine-tune, (n,), with Student's interval: value ± t_{n-1} s / √n.

    Exact for normal numbers. Raises CurvlibError for fewer than two numbers, or one that is not finite.
    """
    observed: NDArray[Any] = np.asarray(values, dtype=float)
    n = len(observed)
    if n < 2 or not np.isfinite(observed).all():
        raise CurvlibError(f"{observed.tolist()} given, expected two finite numbers at least: train with other seeds")
    return _student(float(observed.mean()), float(observed.std(ddof=1)) / n**0.5, n, level)


def ratio_over_fine_tunes(first: ArrayLike, second: ArrayLike, *, level: float = 0.95) -> Estimate:
    """Estimate the geometric mean of first / second, (n,) each and above 0: exp of the t interval of the log ratio."""
    with np.errstate(divide="ignore", invalid="ignore"):
        log = over_fine_tunes(np.log(np.divide(first, second)), level=level)
    value, low, high = np.exp([log.value, log.low, log.high]).tolist()
    return Estimate(value, low, high, log.n)


def _student(value: float, error: float, n: int, level: float) -> Estimate:
    half = float(special.stdtrit(n - 1, (1 + level) / 2)) * error
    return Estimate(value, value - half, value + half, n)


def hierarchical_bootstrap(
    values: ArrayLike, *, seed: int = 0, level: float = 0.95, resamples: int = RESAMPLES
) -> Estimate:
    """Estimate the mean of values (fine-tunes, prompts) where both are samples; all fine-tunes saw the same prompts.

    Each draw takes fine-tunes and, for all of them, prompts anew (Owen, Annals of Applied Statistics 1, 2007). The
    interval is value ± t_{n-1} · s · √(n / (n - 1)) for n fine-tunes and draws of standard deviation s: percentiles of
    the draws are too narrow. Raises CurvlibError below two of each.
    """
    observed: NDArray[Any] = np.asarray(values, dtype=float)
    if observed.ndim != 2 or min(observed.shape) < 2:
        raise CurvlibError(
            f"values of shape {observed.shape} given, expected (fine-tunes, prompts), two or more of each"
        )
    n, generator = len(observed), np.random.default_rng(seed)
    rows, columns = (generator.multinomial(size, np.full(size, 1 / size), resamples) / size for size in observed.shape)
    drawn = ((rows @ observed) * columns).sum(axis=1)
    return _student(float(observed.mean()), float(drawn.std()) * (n / (n - 1)) ** 0.5, n, level)


def paired_proportions(first: ArrayLike, second: ArrayLike, *, level: float = 0.95) -> Estimate:
    """Estimate the difference of two rates, first - second, whose flags (n,) belong to the same prompts.

    By :func:`tango`: wide where no prompt differs and a bootstrap says [0, 0]. Raises CurvlibError for unequal sizes.

    >>> print(f"{paired_proportions([True] * 32, [True] * 32):.3f}")
    0.000 [-0.107, 0.107]
    """
    a, b = (np.asarray(side, dtype=bool) for side in (first, second))
    if a.shape != b.shape or not a.size:
        raise CurvlibError(f"{a.size} and {b.size} flags given, expected as many of both, at least one")
    gained, lost = int((a & ~b).sum()), int((~a & b).sum())
    low, high = tango(gained, lost, a.size, level)
    return Estimate((gained - lost) / a.size, float(low), float(high), a.size)


def tango(gained: ArrayLike, lost: ArrayLike, n: int, level: float = 0.95) -> tuple[NDArray[Any], NDArray[Any]]:
    r"""Return the ends of the score interval for a paired difference of rates; counts may be arrays of one shape.

    The differences Δ with :math:`|b - c - n\Delta| \le z \sqrt{n (2 q + \Delta (1 - \Delta))}` for b pairs gained
    and c lost, where q, the rate of losing that is likeliest under Δ, is the greater root of
    :math:`2n q^2 + ((2n - b + c) \Delta - b - c) q - c \Delta (1 - \Delta) = 0`. Ends are bisected to 1e-12.
    Coverage of 95 % intervals is nowhere below 93 % for n of 16 and more (a test adds up every outcome).
    Source: Tango, Statistics in Medicine 17 (1998).
    """
    b, c = (np.asarray(count, dtype=float) for count in (gained, lost))
    z, ends = float(stats.norm.ppf((1 + level) / 2)), []
    for outer in (-1.0, 1.0):
        inside, outside = (b - c) / n, np.full(b.shape, outer)
        for _ in range(42):
            middle = (inside + outside) / 2
            accepted = np.abs(b - c - n * middle) <= z * _spread(middle, b, c, n)
            inside, outside = np.where(accepted, middle, inside), np.where(accepted, outside, middle)
        ends.append(np.asarray(inside))
    return ends[0], ends[1]


def _spread(delta: NDArray[Any], b: NDArray[Any], c: NDArray[Any], n: int) -> NDArray[Any]:
    """Return the standard deviation of b - c where the difference of the rates is delta."""
    linear, own = (2 * n - b + c) * delta - b - c, delta * (1 - delta)
    rate_lost = (np.sqrt(np.maximum(linear**2 + 8 * n * c * own, 0)) - linear) / (4 * n)
    result: NDArray[Any] = np.sqrt(np.maximum(n * (2 * rate_lost + own), 0))
    return result


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Return p-values (m,) adjusted for being m questions at once: below 0.05 all are right with 95 % certainty.

    The k-th smallest times m - k + 1, no smaller than those before it and at most 1, however the questions depend.
    Source: Holm, Scandinavian Journal of Statistics 6 (1979).

    >>> holm([0.04, 0.01, 0.03]).tolist()
    [0.06, 0.03, 0.06]
    """
    p: NDArray[np.float64] = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    adjusted = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    result: NDArray[np.float64] = adjusted[np.argsort(order)]
    return result


def cohen_kappa(first: ArrayLike, second: ArrayLike) -> float:
    """Return Cohen's κ = (p_o - p_e) / (1 - p_e): agreement of two raters beyond chance.

    p_o is the share of equal labels, p_e that expected from each rater's own frequencies; 1.0 where both give one and
    the same label throughout (p_e = 1). As scikit-learn's, in a fiftieth of its time. Source: Cohen (1960).
    """
    a, b = (np.asarray(labels) for labels in (first, second))
    observed = float(np.mean(a == b))
    chance = sum(float(np.mean(a == label) * np.mean(b == label)) for label in np.union1d(a, b))
    return 1.0 if chance == 1.0 else (observed - chance) / (1.0 - chance)


def rate(flags: Sequence[bool], level: float = 0.95) -> Estimate:
    """Return the share of true flags with its Wilson interval."""
    return wilson(sum(map(bool, flags)), len(flags), level)
