"""Each landscape figure draws the numbers that it was given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from curvlib import plots_landscape as plots
from curvlib.curvature.lanczos import spectral_density
from curvlib.curvature.operator import DiagonalOperator
from curvlib.evaluate.stats import Estimate
from curvlib.landscape.compare import StepSpectrum
from curvlib.landscape.slices import Slice, grid, line
from tests.test_plots import png_size, tick_labels, whisker_ends

NULL = Estimate(0.0, -0.3, 0.25, 16)
FOUND = {"harmful compliance": Estimate(0.8, 0.6, 0.9, 12), "plain text": Estimate(0.7, 0.5, 0.95, 6)}
POINTS = grid(2.0, 7)
X, Y = POINTS.T


def series(axes: Axes) -> dict[str, np.ndarray]:
    """Name -> (K, 2) of every labelled line."""
    return {
        str(line.get_label()): line.get_xydata() for line in axes.lines if not str(line.get_label()).startswith("_")
    }


def surfaces_figure() -> Figure:
    return plots.paired_surfaces(POINTS, {"before": X**2 + Y, "after": X**2 + 2 * Y + 1})


def test_surfaces_share_a_scale_and_the_difference_is_the_last_minus_the_first() -> None:
    first, second, difference = surfaces_figure().axes[:3]
    levels = [axes.collections[0].levels for axes in (first, second, difference)]
    np.testing.assert_array_equal(levels[0], levels[1])
    assert (levels[0][0], levels[0][-1]) == (pytest.approx(-3), pytest.approx(9))
    assert (levels[2][0], levels[2][-1]) == (pytest.approx(-3), pytest.approx(3))
    assert [axes.get_title(loc="left") for axes in (first, second, difference)] == ["before", "after", "last − first"]


def test_the_first_direction_is_horizontal() -> None:
    axes = plots.paired_surfaces(POINTS, {"a": X, "b": X}).axes[0]
    cells = axes.collections[0].get_array() if axes.collections[0].get_array() is not None else []
    assert len(cells) == 12
    widths = [path.get_extents() for path in axes.collections[0].get_paths()]
    assert all(extent.height == pytest.approx(4) for extent in widths)
    assert sum(extent.width for extent in widths) == pytest.approx(4)


def test_correlations_stand_beside_their_null() -> None:
    (axes,) = plots.correlations(FOUND, NULL, 0.5).axes
    band = axes.patches[0].get_extents().transformed(axes.transData.inverted())
    assert (band.x0, band.x1) == (pytest.approx(-0.3), pytest.approx(0.25))
    np.testing.assert_allclose(whisker_ends(axes), [[e.low, e.high] for e in FOUND.values()])
    assert tick_labels(axes.get_yticklabels()) == list(FOUND)


def test_the_path_has_a_line_a_loss_and_a_tick_a_model() -> None:
    path = Slice(line(0, 1, 3), {"refusal": np.array([[1.0, 3], [2, 2], [4, 0]]), "task": np.ones((3, 2))})
    (axes,) = plots.interpolation(path, [0, 1, 2], {"aligned": 0, "restored": 2}).axes
    assert series(axes)["refusal"].tolist() == [[0, 2], [1, 2], [2, 2]]
    edges = axes.collections[0].get_paths()[0].get_extents()
    assert (edges.y0, edges.y1) == (pytest.approx(2 - 1.96 * 2), pytest.approx(2 + 1.96 * 2))
    assert tick_labels(axes.get_xticklabels()) == ["aligned", "restored"]


def test_spectra_are_overlaid() -> None:
    found = spectral_density(DiagonalOperator(torch.tensor([1.0, 2.0, 5.0])), steps=3, probes=2, points=50)
    (axes,) = plots.spectra({"aligned": found, "tuned": found}).axes
    np.testing.assert_allclose(series(axes)["tuned"][:, 1], found.density)
    assert axes.get_yscale() == "log"


def test_overlaps_are_drawn_by_layer() -> None:
    (axes,) = plots.overlaps_by_layer({"task": {"layers.0": 0.5, "layers.1": 0.25}}, 0.01).axes
    assert series(axes)["task"].tolist() == [[0, 0.5], [1, 0.25]]
    assert series(axes)["random spaces"][:, 1].tolist() == [0.01, 0.01]


def test_shares_of_a_step_are_summed_from_the_stiff_end() -> None:
    step = StepSpectrum(np.array([10.0, -1e-9, 1.0]), np.array([0.25, 0.5, 0.25]))
    (axes,) = plots.step_in_spectrum({"fine-tuning": step}).axes
    np.testing.assert_allclose(series(axes)["fine-tuning"], [[1e-5, 100], [1, 50], [10, 25]])


def test_the_study_has_a_point_a_seed() -> None:
    rows = [{"method": m, "loss": "task", "pearson_value": v} for m, v in (("full", 0.5), ("full", 0.6), ("LoRA", 0.9))]
    (axes,) = plots.by_method(rows, ["LoRA", "full"], NULL).axes
    assert series(axes)["task"].tolist() == [[0.5, 1], [0.6, 1], [0.9, 0]]


def test_figures_are_small_files(tmp_path: Path) -> None:
    drawn = [surfaces_figure(), plots.correlations(FOUND, NULL, 0.5)]
    assert max(map(png_size, drawn)) < 120_000
    drawn[0].savefig(tmp_path / "surfaces.png")
