"""The figure of the four-bit engine, in the style of :mod:`curvlib.plots`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from curvlib.plots import BLUE, ORANGE, SKY, figure

MIB = 2**20


def memory(forecast: Mapping[str, int], measured: Mapping[str, int], kept: Mapping[str, int]) -> Figure:
    """Draw the peak bytes of each product as forecast and as measured, and the dequantised weights among them.

    Args:
        forecast: product -> bytes told before the work.
        measured: product -> bytes counted during the work; some may be missing.
        kept: product -> bytes of dequantised 4-bit weights that its graphs keep.
    """
    drawn, (axes,) = figure(height=1.3 + 0.62 * len(forecast))
    rows = np.arange(len(forecast))
    for values, shift, colour, label in ((forecast, -0.19, SKY, "forecast"), (measured, 0.19, BLUE, "measured")):
        places = [row + shift for row, name in enumerate(forecast) if name in values]
        sizes = [values[name] / MIB for name in forecast if name in values]
        bars = axes.barh(places, sizes, height=0.36, color=colour, label=label)
        axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=9)
    sizes = [kept[name] / MIB for name in forecast]
    axes.barh(rows, sizes, height=0.74, color="none", edgecolor=ORANGE, hatch="///", label="dequantised weights kept")
    axes.set_yticks(rows, list(forecast))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_title("Memory of one product beside the model", pad=26)
    axes.set(xlabel="peak, MiB")
    axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), fontsize=10, borderpad=0.2, columnspacing=1.2)
    return drawn
