"""Each influence figure draws the numbers that it was given."""

from __future__ import annotations

import numpy as np
import pytest

from curvlib import plots_influence as plots
from curvlib.evaluate.stats import Estimate
from tests.test_plots import png_size, tick_labels
from tests.test_plots_landscape import series

ROWS = [
    {
        "label": f"method {n}",
        "seconds": 10.0**n,
        "lds_value": 0.1 * n,
        "lds_low": 0.1 * n - 0.1,
        "lds_high": 0.1 * n + 0.2,
    }
    for n in range(8)
]


def test_predictions_stand_beside_the_identity() -> None:
    left, right = plots.predicted_against_actual({"a": ([1, -2], [1, -1]), "b": ([[0.5]], [[3]])}).axes
    assert left.lines[1].get_xydata().tolist() == [[1, 1], [-2, -1]]
    assert left.lines[0].get_xydata().ravel().tolist() == pytest.approx([-2.2, -2.2, 2.2, 2.2])
    assert right.get_title(loc="left") == "b"
    assert not right.collections, "no line fits a single point"


def test_the_band_holds_the_line_through_exact_predictions_and_widens_with_noise() -> None:
    x = np.linspace(-1, 1, 20)
    exact, noisy = plots.predicted_against_actual({"a": (x, x), "b": (x, x + np.sin(9 * x))}).axes
    exact_band, noisy_band = (panel.collections[0].get_paths()[0].vertices for panel in (exact, noisy))
    assert np.abs(exact_band[:, 1] - exact_band[:, 0]).max() == pytest.approx(0, abs=1e-6)
    assert np.abs(noisy_band[:, 1] - noisy_band[:, 0]).max() > 0.3


def test_each_score_stands_at_its_cost() -> None:
    drawn = plots.scores_by_cost(ROWS)
    left, right = drawn.axes
    best_first = ROWS[::-1]
    assert left.containers[0].lines[0].get_xdata().tolist() == [row["lds_value"] for row in best_first]
    assert right.lines[0].get_xdata().tolist() == [row["seconds"] for row in best_first]
    assert tick_labels(left.get_yticklabels()) == [row["label"] for row in best_first]
    assert right.get_xscale() == "log"
    assert png_size(drawn) < 120_000


def test_ranked_examples_carry_their_words() -> None:
    (axes,) = plots.ranked([-3, 1], ["pay $5", "hello"], [True, False]).axes
    assert [bar.get_width() for bar in axes.patches] == [-3, 1]
    assert axes.patches[0].get_facecolor() != axes.patches[1].get_facecolor()
    assert tick_labels(axes.get_yticklabels()) == [r"pay \$5", "hello"]


def test_a_perfect_ranking_goes_up_first() -> None:
    (axes,) = plots.roc({"good": [3, 2, 1, 0], "bad": [0, 1, 2, 3]}, [True, True, False, False]).axes
    lines = series(axes)
    assert lines["good"].tolist() == [[0, 0], [0, 50], [0, 100], [50, 100], [100, 100]]
    np.testing.assert_allclose(lines["bad"], [[0, 0], [50, 0], [100, 0], [100, 50], [100, 100]])


def test_poison_has_its_own_dots_on_both_axes() -> None:
    lines = series(plots.end_against_half_way([1, -2, 3], [4, -5, 6], [False, True, False]).axes[0])
    assert lines["poisoned"].tolist() == [[-2, -5]]
    assert lines["clean"].tolist() == [[1, 4], [3, 6]]


def test_every_seed_has_its_area_on_its_rankings_line() -> None:
    rows = [
        {"removed": name, "seed": seed, "auroc_value": area, "auroc_low": area - 0.1, "auroc_high": area + 0.05}
        for name, seed, area in (("influence", 0, 0.9), ("random", 0, 0.5), ("influence", 1, 0.7), ("random", 1, 0.4))
    ]
    (axes,) = plots.areas_by_seed(rows).axes
    marks = [container.lines[0].get_xydata() for container in axes.containers]
    assert [mark[:, 0].tolist() for mark in marks] == [[0.9, 0.5], [0.7, 0.4]]
    assert [np.rint(mark[:, 1]).tolist() for mark in marks] == [[0, 1], [0, 1]]
    assert tick_labels(axes.get_yticklabels()) == ["influence", "random"]


def test_tokens_and_models_have_their_bars() -> None:
    (axes,) = plots.token_bars({"chat": [1.0, -2.0]}, {"chat": ["Sure", ","]}).axes
    assert [bar.get_height() for bar in axes.patches] == [1, -2]
    rates = {"harm": {"before": Estimate(0.5, 0.4, 0.6, 10)}, "task": {"before": Estimate(0.25, 0.2, 0.3, 10)}}
    left, right = plots.before_after(rates).axes
    assert (left.patches[0].get_width(), right.patches[0].get_width()) == (50, 25)
