"""The figures of the curvature engine: one function each, in the style of :mod:`curvlib.plots`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from curvlib.curvature.lanczos import SpectralDensity
from curvlib.curvature.solve import Solution
from curvlib.plots import BLACK, BLUE, CYCLE, MARKERS, ORANGE, SKY, figure

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


def residuals(solutions: Mapping[str, Solution], tolerance: float) -> Figure:
    """Draw each solver's relative residual after each product, on logarithmic axes, down to the tolerance."""
    drawn, (axes,) = figure()
    dashes = cycle(("-", "--"))  # two solvers may walk the same path
    for (name, found), colour, marker, dash in zip(solutions.items(), CYCLE, MARKERS, dashes, strict=False):
        spent = np.arange(len(found.history)) + found.products - len(found.history) + 1
        every = max(1, len(spent) // 12)
        axes.loglog(spent[1:], found.history[1:], c=colour, ls=dash, marker=marker, markevery=every, label=name)
    axes.axhline(tolerance, color="#777777", lw=1, ls="--")
    axes.set(xlabel="products with the operator", ylabel="residual / right-hand side", title="Solving for one vector")
    axes.legend()
    return drawn


def spectrum(found: SpectralDensity, exact: Tensor, name: str) -> Figure:
    """Draw the estimated density of eigenvalues with two standard errors, above a mark for each exact eigenvalue.

    Args:
        found: estimate.
        exact: all eigenvalues (size,).
        name: of the matrix, for the title.
    """
    drawn, (axes,) = figure()
    x, y = found.grid.numpy(), found.density.numpy()
    low, high = (y + sign * 2 * found.standard_error.numpy() for sign in (-1, 1))
    floor = 1e-3 * y.max()
    axes.fill_between(x, np.maximum(low, floor), np.maximum(high, floor), color=SKY, alpha=0.5, label="± 2 s.e.")
    axes.semilogy(x, np.maximum(y, floor), c=BLUE, label=f"{len(found.nodes)} probes, {found.products} products")
    axes.plot(
        exact.numpy(), np.full(len(exact), 0.6 * floor), "|", c=BLACK, ms=9, label=f"all {len(exact)} eigenvalues"
    )
    axes.set(xlabel="eigenvalue", ylabel="share of eigenvalues per unit", title=f"Spectrum of the {name}")
    axes.legend()
    return drawn
