"""How alike two windows on a loss are, and where a step lies in a spectrum: measures with intervals and nulls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from curvlib.curvature.lanczos import vector_spectrum
from curvlib.curvature.operator import CurvatureOperator
from curvlib.errors import CurvlibError
from curvlib.evaluate.stats import Estimate, bootstrap
from curvlib.landscape.slices import Array

LEAST = 0.5  # a window that shares less than a quarter of the other's variance has not kept its structure
RESAMPLES = 500  # each repeats every correlation; the Monte Carlo error of a limit is then about 0.1 standard errors


def without_bowl(points: Array, values: Array) -> Array:
    r"""Return what is left of ``values`` (K, ...) after the best quadratic in ``points`` (K, d) is taken out.

    Any two minima look alike: a bowl correlates with every other bowl. The fit is by least squares over
    :math:`1, x_i, x_i x_j`, hence linear in the values, and each column is treated alone.

    Raises:
        CurvlibError: no more points than coefficients, so that nothing would be left.
    """
    size = points.shape[1]
    pairs = [(i, j) for i in range(size) for j in range(i, size)]
    scaled = points / (np.abs(points).max() or 1.0)
    design = np.column_stack([np.ones(len(points)), scaled, *[scaled[:, i] * scaled[:, j] for i, j in pairs]])
    if len(points) <= design.shape[1]:
        raise CurvlibError(f"{len(points)} points for {design.shape[1]} coefficients of the bowl: measure a finer grid")
    flat = values.reshape(len(values), -1)
    fitted = design @ np.linalg.lstsq(design, flat, rcond=None)[0]
    left: Array = (flat - fitted).reshape(values.shape)
    return left


def correlation(first: Array, second: Array, *, ranks: bool = False) -> float:
    """Return Pearson's correlation of two samples (K,), or Spearman's with ``ranks``; 0 where one is constant."""
    if ranks:
        first, second = stats.rankdata(first), stats.rankdata(second)
    first, second = first - first.mean(), second - second.mean()
    scale = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / scale if scale > 0 else 0.0


def surface_correlation(
    points: Array, pairs: Sequence[tuple[Array, Array]], *, bowl: bool = False, ranks: bool = False, seed: int = 0
) -> Estimate:
    """Estimate the correlation of two mean losses over a grid, as the mean over direction pairs.

    Args:
        points: (K, 2), the matched grid.
        pairs: for each pair of directions the two surfaces (K, n) of the same n chats.
        bowl: leave the quadratic fit in (:func:`without_bowl` takes it out by default).
        ranks: Spearman's correlation in place of Pearson's.
        seed: of the bootstrap, which draws direction pairs and chats anew, both with replacement.

    Returns:
        Value, 95 % interval and the number of direction pairs times chats.
    """
    left = [(a, b) if bowl else (without_bowl(points, a), without_bowl(points, b)) for a, b in pairs]
    chats = left[0][0].shape[1]

    def mean(chosen: NDArray[np.int64], drawn: NDArray[np.int64]) -> float:
        found = [correlation(left[i][0][:, drawn].mean(1), left[i][1][:, drawn].mean(1), ranks=ranks) for i in chosen]
        return float(np.mean(found))

    generator = np.random.default_rng(seed)
    everything = np.arange(len(left)), np.arange(chats)
    samples = [mean(*(generator.choice(kind, len(kind)) for kind in everything)) for _ in range(RESAMPLES)]
    low, high = np.quantile(samples, [0.025, 0.975])
    return Estimate(mean(*everything), float(low), float(high), len(left) * chats)


def unrelated_correlation(
    points: Array, pairs: Sequence[tuple[Array, Array]], *, bowl: bool = False, ranks: bool = False
) -> Estimate:
    """Estimate the null: the same correlation for surfaces over *unrelated* direction pairs.

    The first surface of each pair meets the second of every other pair, in all eight orientations of the square grid,
    since no orientation of unrelated directions is the right one. The interval holds 95 % of these single correlations:
    where one matched correlation would fall by chance.

    Raises:
        CurvlibError: fewer than two direction pairs.
    """
    if len(pairs) < 2:
        raise CurvlibError(f"{len(pairs)} direction pairs were given, expected at least two to have unrelated ones")
    left = [[a.mean(1) if bowl else without_bowl(points, a.mean(1)) for a in pair] for pair in pairs]
    found = [
        correlation(first, turned, ranks=ranks)
        for i, (first, _) in enumerate(left)
        for j, (_, second) in enumerate(left)
        for turned in orientations(second)
        if i != j
    ]
    low, high = np.quantile(found, [0.025, 0.975])
    return Estimate(float(np.mean(found)), float(low), float(high), len(found))


def verdict(matched: Estimate, null: Estimate, least: float = LEAST) -> Literal["shifted", "erased", "undecided"]:
    """Answer "erased or shifted?" by the rule that the notebook states before its run.

    Shifted: the whole interval of the matched correlation lies above the null's, and its value is at least ``least``.
    Erased: its value lies within or below the null's interval, and its own interval below ``least``. Else undecided.

    >>> verdict(Estimate(0.8, 0.6, 0.9, 12), Estimate(0.0, -0.3, 0.3, 16))
    'shifted'
    """
    if matched.low > null.high and matched.value >= least:
        return "shifted"
    return "erased" if matched.value <= null.high and matched.high < least else "undecided"


def orientations(surface: Array) -> Iterator[Array]:
    """Yield the eight rotations and reflections of values (K,) on a square grid."""
    side = round(len(surface) ** 0.5)
    square = surface.reshape(side, side)
    for turns in range(4):
        turned = np.rot90(square, turns)
        yield turned.ravel()
        yield turned.T.ravel()


def prompt_correlation(first: Array, second: Array, *, seed: int = 0) -> Estimate:
    """Estimate Spearman's correlation of two models' losses (n,) on the same chats: is what was hard still hard?"""

    def spearman(a: Array, b: Array) -> float:
        return correlation(a, b, ranks=True)

    return bootstrap(first, second, statistic=spearman, seed=seed, resamples=RESAMPLES)


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Return the angles (k,) between the spans of two sets of columns (P, k), ascending, in radians.

    Source: Björck and Golub 1973. Angles below about 1e-8 in float64 are lost to rounding of the cosine.

    >>> principal_angles(torch.eye(3)[:, :2], torch.eye(3)[:, 1:]).rad2deg()
    tensor([ 0., 90.])
    """
    bases = [torch.linalg.qr(columns).Q for columns in (first, second)]
    cosines: Tensor = torch.linalg.svdvals(bases[0].T @ bases[1]).clamp(max=1)
    return cosines.acos()


def overlap(first: Tensor, second: Tensor) -> float:
    r"""Return the mean of :math:`\cos^2` over the principal angles: 1 for equal spans, k/P for random ones."""
    return float(principal_angles(first, second).cos().square().mean())


def overlap_by_layer(first: Tensor, second: Tensor, layers: Mapping[str, slice]) -> dict[str, float]:
    """Return the overlap of the parts of two eigenspaces in each layer's coordinates."""
    return {name: overlap(first[where], second[where]) for name, where in layers.items()}


@dataclass(frozen=True)
class StepSpectrum:
    r"""Where a step v lies in an operator's spectrum: ``shares`` of :math:`\|v\|^2` at ``curvatures``, (m,) each."""

    curvatures: Array
    shares: Array

    @property
    def mean(self) -> float:
        r"""The curvature along the step, :math:`v^\top A v / \|v\|^2`."""
        return float(self.curvatures @ self.shares)

    def above(self, curvature: float) -> float:
        """Return the share of the step at curvatures of at least this."""
        return float(self.shares[self.curvatures >= curvature].sum())


def step_spectrum(operator: CurvatureOperator, step: Tensor, *, products: int) -> StepSpectrum:
    r"""Return the shares of a step's squared norm by curvature, from Lanczos started at the step itself.

    The shares are the weights of a Gauss rule for :math:`f \mapsto v^\top f(A) v / \|v\|^2`, exact for polynomials up
    to degree 2 m - 1 after m products.

    >>> from curvlib.curvature.operator import DiagonalOperator
    >>> found = step_spectrum(DiagonalOperator(torch.tensor([100.0, 1.0])), torch.tensor([1.0, 3.0]), products=2)
    >>> round(found.above(50), 3), round(found.mean, 1)
    (0.1, 10.9)
    """
    nodes, weights = vector_spectrum(operator, step, products)
    return StepSpectrum(nodes.numpy(), weights.numpy())
