"""The curvature figures draw the numbers that they were given."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from curvlib import plots_curvature as plots
from curvlib.curvature.lanczos import spectral_density
from curvlib.curvature.operator import DiagonalOperator
from curvlib.curvature.solve import Solution
from tests.test_plots import png_size, tick_labels

MIB = 2**20


def test_memory_bars_are_in_mebibytes_and_skip_what_was_not_measured() -> None:
    told, seen, kept = {"a": 2 * MIB, "b": 8 * MIB}, {"b": 7 * MIB}, {"a": 0, "b": 3 * MIB}
    (axes,) = plots.memory(told, seen, kept).axes
    forecast, measured, weights = ([bar.get_width() for bar in bars] for bars in axes.containers)
    assert (forecast, measured, weights) == ([2, 8], [7], [0, 3])
    assert axes.containers[1][0].get_y() == pytest.approx(1 + 0.19 - 0.18)  # beside its own forecast
    assert tick_labels(axes.get_yticklabels()) == ["a", "b"]


def test_residuals_are_drawn_at_the_products_spent() -> None:
    plain = Solution(torch.zeros(2), 0.01, 2, True, (1.0, 0.1, 0.01))
    late = Solution(torch.zeros(2), 0.5, 11, False, (1.0, 0.5))  # ten products went into its scale
    (axes,) = plots.residuals({"plain": plain, "late": late}, 0.02).axes
    first, second, tolerance = axes.lines
    assert first.get_xydata().tolist() == [[1, 0.1], [2, 0.01]]
    assert second.get_xydata().tolist() == [[11, 0.5]]
    assert list(tolerance.get_ydata()) == [0.02, 0.02]


def test_spectrum_draws_density_band_and_exact_eigenvalues() -> None:
    exact = torch.tensor([-1.0, 0.0, 0.0, 3.0], dtype=torch.float64)
    found = spectral_density(DiagonalOperator(exact), steps=3, probes=4, points=50)
    drawn = plots.spectrum(found, exact, "case")
    (axes,) = drawn.axes
    curve, marks = axes.lines
    floor = 1e-3 * found.density.max().item()
    np.testing.assert_allclose(curve.get_ydata(), found.density.clamp(min=floor))
    assert list(marks.get_xdata()) == exact.tolist()
    assert len(axes.collections) == 1
    assert axes.get_title(loc="left") == "Spectrum of the case"
    assert png_size(drawn) < 120_000
    assert plt.get_fignums() == []
