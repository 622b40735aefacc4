"""The figure of the engine draws the numbers that it was given."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest

from curvlib import plots_curvature as plots
from tests.test_plots import png_size, tick_labels

MIB = 2**20


def test_memory_bars_are_in_mebibytes_and_skip_what_was_not_measured() -> None:
    told, seen, kept = {"a": 2 * MIB, "b": 8 * MIB}, {"b": 7 * MIB}, {"a": 0, "b": 3 * MIB}
    drawn = plots.memory(told, seen, kept)
    (axes,) = drawn.axes
    forecast, measured, weights = ([bar.get_width() for bar in bars] for bars in axes.containers)
    assert (forecast, measured, weights) == ([2, 8], [7], [0, 3])
    assert axes.containers[1][0].get_y() == pytest.approx(1 + 0.19 - 0.18)  # beside its own forecast
    assert tick_labels(axes.get_yticklabels()) == ["a", "b"]
    assert png_size(drawn) < 120_000
    assert plt.get_fignums() == []
