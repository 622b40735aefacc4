"""The figures of the landscape notebook: one function each, in the style of :mod:`curvlib.plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from curvlib.curvature.lanczos import SpectralDensity
from curvlib.evaluate.stats import Estimate
from curvlib.landscape.compare import StepSpectrum
from curvlib.landscape.slices import Slice
from curvlib.plots import BLACK, CYCLE, MARKERS, figure, whiskers


def paired_surfaces(points: ArrayLike, surfaces: Mapping[str, ArrayLike], title: str = "loss, nats") -> Figure:
    """Draw surfaces over one square grid with a shared colour scale, and the last minus the first.

    Args:
        points: (side², 2), as :func:`curvlib.landscape.slices.grid` makes them.
        surfaces: name -> mean loss (side²,); two or three.
        title: what the colours mean, with its unit.
    """
    side = round(len(np.asarray(points)) ** 0.5)
    axis = np.asarray(points)[:side, 1]
    shown = {name: np.asarray(values).reshape(side, side).T for name, values in surfaces.items()}
    first, *_, last = shown.values()
    drawn, panels = figure(len(shown) + 1, width=9.6, height=9.6 / (len(shown) + 1) + 1.2, sharey=True)
    low, high = min(values.min() for values in shown.values()), max(values.max() for values in shown.values())
    for axes, (name, values) in zip(panels, shown.items(), strict=False):
        filled = axes.contourf(axis, axis, values, levels=np.linspace(low, high, 13), cmap="cividis")
        axes.set_title(name)
    below: dict[str, Any] = {"location": "bottom", "shrink": 0.8, "format": "%.2g"}
    drawn.colorbar(filled, ax=panels[:-1], label=title, ticks=MaxNLocator(5), **below)
    reach = float(np.abs(last - first).max()) or 1.0
    difference = panels[-1].contourf(axis, axis, last - first, levels=np.linspace(-reach, reach, 14), cmap="PuOr")
    drawn.colorbar(difference, ax=panels[-1], label="difference", ticks=MaxNLocator(5), **below)
    panels[-1].set_title("last − first")
    for axes in panels:
        axes.plot(0, 0, "+", c="white", ms=10, mew=2)
        axes.set(xlabel="along direction 1", aspect="equal")
        axes.grid(visible=False)
    panels[0].set_ylabel("along direction 2")
    return drawn


def correlations(found: Mapping[str, Estimate], null: Estimate, rule: float) -> Figure:
    """Draw correlations with their intervals, the band of unrelated directions, and the rule's threshold.

    Args:
        found: name -> correlation, from top to bottom.
        null: 95 % of the single correlations between unrelated direction pairs.
        rule: the correlation that the decision rule asks for.
    """
    drawn, (axes,) = figure(height=1.5 + 0.4 * len(found))
    values, lengths = whiskers(list(found.values()), scale=1.0)
    axes.axvspan(null.low, null.high, color="#CCCCCC", label="compliance along unrelated directions, 95 %")
    axes.axvline(rule, color=BLACK, ls=":", label=f"rule: {rule:g}")
    axes.errorbar(values, range(len(found)), xerr=lengths, fmt="o", color=CYCLE[0])
    axes.set_yticks(range(len(found)), list(found))
    axes.set(xlabel="correlation of the two windows, bowl removed", xlim=(-1.05, 1.05), ylim=(len(found) - 0.5, -0.5))
    axes.set_title("How alike the windows are", pad=24)
    axes.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1), fontsize=10, borderpad=0.2)
    return drawn


def interpolation(path: Slice, along: ArrayLike, stations: Mapping[str, float]) -> Figure:
    """Draw each loss along a path through models, with the 95 % range of its mean over the chats.

    Args:
        path: its losses, (K, n) each.
        along: (K,), where each point lies on the path.
        stations: name of a model -> its place on the path.
    """
    drawn, (axes,) = figure(height=3.6)
    place = np.asarray(along)
    for (name, values), colour, marker in zip(path.losses.items(), CYCLE, MARKERS, strict=False):
        mean, width = values.mean(axis=1), 1.96 * values.std(axis=1, ddof=1) / values.shape[1] ** 0.5
        axes.plot(place, mean, c=colour, marker=marker, label=name)
        axes.fill_between(place, mean - width, mean + width, color=colour, alpha=0.15, lw=0)
    axes.set_xticks(list(stations.values()), list(stations))
    axes.set(ylabel="loss, nats per token", ylim=(0, None), title="Losses on the way between the models")
    axes.legend(fontsize=10, ncols=2)
    return drawn


def spectra(densities: Mapping[str, SpectralDensity]) -> Figure:
    """Overlay densities of eigenvalues, each with two standard errors, on a logarithmic scale."""
    drawn, (axes,) = figure()
    for (name, found), colour in zip(densities.items(), CYCLE, strict=False):
        density, error = found.density.numpy(), 2 * found.standard_error.numpy()
        axes.semilogy(found.grid, density, c=colour, label=name)
        axes.fill_between(found.grid, np.maximum(density - error, 1e-12), density + error, color=colour, alpha=0.2)
    top = max(float(found.density.max()) for found in densities.values())
    axes.set(xlabel="eigenvalue", ylabel="density", ylim=(1e-7 * top, 3 * top), title="Spectra of the curvature")
    axes.legend()
    return drawn


def overlaps_by_layer(overlaps: Mapping[str, Mapping[str, float]], null: float) -> Figure:
    """Draw for each loss how far the top eigenspaces of two models agree, layer by layer, over the chance level."""
    drawn, (axes,) = figure()
    for (name, by_layer), colour, marker in zip(overlaps.items(), CYCLE, MARKERS, strict=False):
        axes.plot(list(by_layer.values()), c=colour, marker=marker, ms=5, label=name)
    axes.axhline(null, color=BLACK, ls=":", label="random spaces")
    axes.set(xlabel="decoder layer", ylabel="mean cos² of the angles", ylim=(-0.03, 1.03))
    axes.set_title("Do the stiff directions stay the same?", pad=24)
    axes.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1), fontsize=10, borderpad=0.2)
    return drawn


def step_in_spectrum(steps: Mapping[str, StepSpectrum]) -> Figure:
    """Draw which share of each step's squared length lies at curvatures of at least x."""
    drawn, (axes,) = figure()
    positive = np.concatenate([found.curvatures[found.curvatures > 0] for found in steps.values()])
    floor, least = float(positive.max()) * 1e-6 if len(positive) else 1e-6, 1e-3
    for (name, found), colour, marker in zip(steps.items(), CYCLE, MARKERS, strict=False):
        place, share = _upper_shares(found, floor)
        axes.step(place, 100 * share, where="pre", c=colour)
        seen = 100 * share > least
        axes.plot(place[seen], 100 * share[seen], c=colour, marker=marker, ls="", label=name)
    axes.set(xscale="log", yscale="log", ylim=(least, 200))
    axes.set(xlabel="curvature of the task loss", ylabel="share of the step, %")
    axes.set_title("Share of each step at this curvature or more", pad=42)
    axes.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1), fontsize=10, borderpad=0.2)
    return drawn


def _upper_shares(found: StepSpectrum, floor: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return curvatures, ascending and at least ``floor``, and the share of the step at each of them or above."""
    order = np.argsort(found.curvatures)
    return np.maximum(found.curvatures[order], floor), found.shares[order][::-1].cumsum()[::-1]


def by_method(rows: Sequence[Mapping[str, float | str]], methods: Sequence[str], null: Estimate) -> Figure:
    """Draw the study's correlations, one point a seed and loss, grouped by fine-tuning method.

    Args:
        rows: of the study, each with ``method``, ``loss`` and ``pearson_value``.
        methods: from top to bottom.
        null: as in :func:`correlations`.
    """
    drawn, (axes,) = figure(height=1.6 + 0.4 * len(methods))
    axes.axvspan(null.low, null.high, color="#CCCCCC", label="compliance along unrelated directions, 95 %")
    losses = list(dict.fromkeys(str(row["loss"]) for row in rows))
    for number, (loss, colour, marker) in enumerate(zip(losses, CYCLE, MARKERS, strict=False)):
        chosen = [row for row in rows if row["loss"] == loss and row["method"] in methods]
        heights = [methods.index(str(row["method"])) + 0.13 * (number - (len(losses) - 1) / 2) for row in chosen]
        axes.plot([float(row["pearson_value"]) for row in chosen], heights, marker, ls="", c=colour, ms=6, label=loss)
    axes.set_yticks(range(len(methods)), methods)
    lowest = min(null.low, *(float(row["pearson_value"]) for row in rows))
    axes.set(xlabel="correlation of the two windows, bowl removed", xlim=(lowest - 0.05, 1.02))
    axes.set(ylim=(len(methods) - 0.5, -0.5))
    axes.set_title("The study: one point a seed", pad=40)
    axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), fontsize=10, borderpad=0.2)
    return drawn
