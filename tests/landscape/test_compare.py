"""Comparison measures on cases whose answers are known exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from curvlib.curvature.lanczos import vector_spectrum
from curvlib.curvature.operator import DenseOperator, DiagonalOperator
from curvlib.errors import CurvlibError
from curvlib.evaluate.stats import Estimate
from curvlib.landscape import compare
from curvlib.landscape.slices import Array, grid
from tests import cases

POINTS = grid(1.5, 9)
X, Y = POINTS.T
BOWL = 2 * X**2 - X * Y + Y**2 + 0.3 * X + 5
EVEN, ODD = np.cos(3 * Y), np.sin(3 * Y)


def chats(surface: Array, spread: float = 0.0, count: int = 6, seed: int = 0) -> Array:
    """A surface as the mean of chats that differ from it by noise, (K, n)."""
    noise = np.random.default_rng(seed).normal(size=(len(surface), count))
    return surface[:, None] + spread * (noise - noise.mean(1, keepdims=True))


def test_a_quadratic_leaves_nothing_and_a_ripple_stays_what_it_is() -> None:
    assert np.abs(compare.without_bowl(POINTS, BOWL)).max() < 1e-12
    left = compare.without_bowl(POINTS, BOWL + EVEN)
    np.testing.assert_allclose(left, compare.without_bowl(POINTS, EVEN), atol=1e-12)
    assert np.abs(left).max() > 0.1
    np.testing.assert_allclose(compare.without_bowl(POINTS, chats(BOWL + EVEN)), chats(left), atol=1e-12)
    with pytest.raises(CurvlibError, match="measure a finer grid"):
        compare.without_bowl(grid(1, 2), np.zeros(4))


@pytest.mark.parametrize("ranks", [False, True])
def test_two_bowls_with_unrelated_ripples_do_not_look_alike(ranks: bool) -> None:
    first, second = chats(9 * BOWL + EVEN), chats(9 * BOWL + ODD)
    naive = compare.surface_correlation(POINTS, [(first, second)], bowl=True, ranks=ranks)
    assert naive.value > 0.95
    fair = compare.surface_correlation(POINTS, [(first, second)], ranks=ranks)
    assert abs(fair.value) < (0.05 if ranks else 1e-9)
    same = compare.surface_correlation(POINTS, [(first, chats(2 * EVEN - BOWL))], ranks=ranks)
    rounding = 0.1 if ranks else 1e-9  # the even ripple has many ties, which rounding orders at will
    assert (same.low, same.value, same.high) == pytest.approx((1, 1, 1), abs=rounding)
    assert same.n == 6


def test_the_interval_grows_with_the_spread_between_chats_and_between_pairs() -> None:
    clean, noisy = ((chats(EVEN), chats(EVEN, spread, seed=1)) for spread in (0.0, 3.0))
    pairs = [(chats(EVEN), chats(EVEN)), (chats(EVEN), chats(-EVEN))]
    widths = [e.high - e.low for e in (compare.surface_correlation(POINTS, p) for p in ([clean], [noisy], pairs))]
    assert widths[0] < 1e-9 < 0.02 < widths[1] < widths[2] == pytest.approx(2)


def test_spearman_sees_order_and_pearson_size() -> None:
    steep = np.exp(8 * EVEN)
    assert compare.correlation(EVEN, steep, ranks=True) == pytest.approx(1)
    assert compare.correlation(EVEN, steep) < 0.9
    assert compare.correlation(EVEN, np.ones_like(EVEN)) == 0


def test_the_null_is_made_of_unrelated_pairs_only() -> None:
    random = np.random.default_rng(0)
    surfaces = [chats(random.normal(size=len(POINTS))) for _ in range(4)]
    null = compare.unrelated_correlation(POINTS, [(surface, surface) for surface in surfaces])
    assert null.n == 8 * 4 * 3
    assert abs(null.value) < 0.1
    assert null.high < 0.5 < compare.surface_correlation(POINTS, [(s, s) for s in surfaces]).low
    alike = compare.unrelated_correlation(POINTS, [(surfaces[0], surfaces[0])] * 2)
    assert alike.high == pytest.approx(1)
    with pytest.raises(CurvlibError, match="at least two"):
        compare.unrelated_correlation(POINTS, [(surfaces[0], surfaces[0])])


@pytest.mark.parametrize(
    ("low", "value", "high", "answer"),
    [
        (0.5, 0.8, 0.9, "shifted"),
        (0.2, 0.8, 0.9, "undecided"),
        (0.4, 0.45, 0.9, "undecided"),
        (-0.1, 0.3, 0.4, "erased"),
        (-0.1, 0.3, 0.6, "undecided"),
    ],
)
def test_the_rule(low: float, value: float, high: float, answer: str) -> None:
    assert compare.verdict(Estimate(value, low, high, 6), Estimate(0.0, -0.3, 0.3, 16)) == answer


def test_the_eight_orientations_are_all_different() -> None:
    turned = [tuple(values) for values in compare.orientations(np.arange(9.0))]
    assert len(set(turned)) == 8
    assert tuple(np.arange(9.0)) in turned


def test_prompts_that_stay_hard_are_correlated() -> None:
    hard = np.arange(12.0)
    assert compare.prompt_correlation(hard, hard**3).value == pytest.approx(1)
    shuffled = np.random.default_rng(1).permutation(hard)
    assert compare.prompt_correlation(hard, shuffled).low < 0.3


def test_principal_angles_are_exact_in_any_bases() -> None:
    angle = 0.3
    first = torch.eye(5, dtype=torch.float64)[:, :2]
    second = torch.stack([first[:, 0], angle_vector(angle)], 1)
    mix = cases.random(2, 2, seed=3)
    found = compare.principal_angles(first @ mix, second @ mix.T)
    assert found.tolist() == pytest.approx([0, angle], abs=1e-6)
    assert compare.overlap(first, second) == pytest.approx((1 + np.cos(angle) ** 2) / 2)
    by_layer = compare.overlap_by_layer(first, second, {"both": slice(0, 5), "last": slice(1, 5)})
    assert by_layer["both"] == pytest.approx(compare.overlap(first, second))


def angle_vector(angle: float) -> torch.Tensor:
    return torch.tensor([0, np.cos(angle), 0, np.sin(angle), 0], dtype=torch.float64)


def test_random_spaces_overlap_by_their_share_of_the_dimensions() -> None:
    found = [compare.overlap(cases.random(40, 4, seed=s), cases.random(40, 4, seed=s + 99)) for s in range(30)]
    assert np.mean(found) == pytest.approx(4 / 40, abs=0.02)


def test_a_step_lies_where_its_eigenvectors_are() -> None:
    matrix = cases.spd(12)
    values, vectors = torch.linalg.eigh(matrix)
    step = vectors @ (coordinates := cases.random(12, seed=5))
    found = compare.step_spectrum(DenseOperator(matrix), step, products=12)
    shares = (coordinates.square() / coordinates.square().sum()).numpy()
    np.testing.assert_allclose(found.curvatures, values, rtol=1e-6)
    np.testing.assert_allclose(found.shares, shares, atol=1e-6)
    assert found.mean == pytest.approx(float(step @ matrix @ step / (step @ step)))
    assert found.above(float(values[6]) - 1e-6) == pytest.approx(shares[6:].sum())
    few = compare.step_spectrum(DenseOperator(matrix), step, products=3)
    assert few.mean == pytest.approx(found.mean)
    assert len(few.shares) == 3


@pytest.mark.parametrize(("v", "steps"), [(torch.zeros(2), 3), (torch.ones(2), 0), (torch.ones(3), 3)])
def test_a_step_without_length_has_no_spectrum(v: torch.Tensor, steps: int) -> None:
    with pytest.raises(CurvlibError, match="expected"):
        vector_spectrum(DiagonalOperator(torch.ones(2)), v, steps)
