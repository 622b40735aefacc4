"""The figures of the influence notebook: one function each, in the style of :mod:`curvlib.plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from numpy.typing import ArrayLike, NDArray

from curvlib.plots import BLACK, BLUE, CYCLE, MARKERS, RED, figure, whiskers

LINES = 1000  # resamples of a band


def predicted_against_actual(panels: Mapping[str, tuple[ArrayLike, ArrayLike]], unit: str = "nats") -> Figure:
    """Draw predicted against measured effects of single examples, one panel a method, with the identity line.

    The band holds 95 per cent of the straight lines that fit resampled effects: does it hold the identity line?

    Args:
        panels: name -> predicted and measured effects, of one shape.
        unit: of both.
    """
    drawn, axes = figure(len(panels), width=3.1 * len(panels) + 0.6, height=3.4)
    for panel, (name, (predicted, actual)) in zip(axes, panels.items(), strict=True):
        x, y = np.ravel(predicted), np.ravel(actual)
        reach = 1.1 * float(max(np.abs(x).max(), np.abs(y).max())) or 1.0
        panel.plot([-reach, reach], [-reach, reach], c=BLACK, lw=1, ls="--", label="y = x")
        panel.plot(x, y, "o", c=BLUE, ms=4, alpha=0.6)
        if np.ptp(x) > 0:
            panel.fill_between(*_band(x, y, reach), color=BLUE, alpha=0.2, lw=0, label="fitted lines, 95 %")
        panel.set(xlabel=f"predicted, {unit}", title=name, xlim=(-reach, reach), ylim=(-reach, reach))
    axes[0].set_ylabel(f"measured by retraining, {unit}")
    axes[-1].legend(loc="lower right", fontsize=10)
    return drawn


def _band(x: NDArray[Any], y: NDArray[Any], reach: float) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return places and the 95 per cent band of least-squares lines through resampled points (x, y)."""
    generator, places = np.random.default_rng(0), np.linspace(-reach, reach, 41)
    drawn = (generator.integers(len(x), size=len(x)) for _ in range(LINES))
    lines = [np.polyval(np.polyfit(x[rows], y[rows], 1), places) for rows in drawn if np.ptp(x[rows]) > 0]
    low, high = np.percentile(lines, [2.5, 97.5], axis=0)
    return places, low, high


def scores_by_cost(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw each method's linear datamodeling score with its interval, best first, beside the seconds that it took.

    Args:
        rows: each with ``label``, ``seconds``, ``lds_value``, ``lds_low`` and ``lds_high``.
    """
    ordered = sorted(rows, key=lambda row: -float(row["lds_value"]))
    drawn, (left, right) = figure(2, width=9.6, height=1.4 + 0.26 * len(rows), sharey=True, width_ratios=[1.6, 1])
    places = range(len(ordered))
    values, low, high = np.array([[float(row[f"lds_{end}"]) for row in ordered] for end in ("value", "low", "high")])
    lengths = np.maximum(0, [values - low, high - values])
    left.errorbar(values, places, xerr=lengths, ls="", marker="o", c=BLUE)
    left.axvline(0, color="#999999", lw=0.8)
    left.set(xlabel="linear datamodeling score", xlim=(min(-0.05, low.min()) - 0.02, 1))
    left.set_yticks(places, [row["label"] for row in ordered])
    left.set_ylim(len(rows) - 0.5, -0.5)
    seconds = [max(float(row["seconds"]), 1e-3) for row in ordered]
    right.plot(seconds, places, ls="", marker="D", c=RED)
    decades = 10 ** np.floor(np.log10(min(seconds)) - 0.1), 10 ** np.ceil(np.log10(max(seconds)) + 0.1)
    right.set(xscale="log", xlabel="seconds beside the gradients", xlim=decades)
    right.xaxis.set_minor_formatter(NullFormatter())
    return drawn


def ranked(values: ArrayLike, texts: Sequence[str], poisoned: Sequence[bool], unit: str = "nats") -> Figure:
    """Draw the influence of some examples, in the order given, with the first words of each and poison in red."""
    drawn, (axes,) = figure(width=9.6, height=1.2 + 0.3 * len(texts))
    colours = [RED if flag else BLUE for flag in poisoned]
    axes.barh(range(len(texts)), np.asarray(values), color=colours)
    axes.set_yticks(range(len(texts)), [_safe(text) for text in texts], fontsize=9)
    axes.invert_yaxis()
    axes.axvline(0, color=BLACK, lw=0.8)
    axes.set(xlabel=f"influence on the loss of harmful compliance, {unit}", title="Red: poisoned")
    return drawn


def roc(suspicions: Mapping[str, ArrayLike], poisoned: ArrayLike) -> Figure:
    """Draw how many poisoned examples each ranking finds against the clean ones that it accuses on the way."""
    drawn, (axes,) = figure(width=6.4, height=3.8)
    flags = np.asarray(poisoned, dtype=bool)
    for (name, values), colour in zip(suspicions.items(), [*CYCLE, "#777777"], strict=False):
        order = flags[np.argsort(-np.asarray(values, dtype=float), kind="stable")]
        found, accused = (np.concatenate([[0], np.cumsum(kind)]) / max(1, kind.sum()) for kind in (order, ~order))
        axes.plot(100 * accused, 100 * found, c=colour, label=name)
    axes.plot([0, 100], [0, 100], c=BLACK, lw=1, ls=":")
    axes.set(xlabel="clean examples accused, %", ylabel="poison found, %", title="Which ranking finds the poison?")
    drawn.legend(loc="outside right upper", fontsize=10)
    return drawn


def end_against_half_way(end: ArrayLike, half_way: ArrayLike, poisoned: ArrayLike, unit: str = "nats") -> Figure:
    """Draw each example's influence at the end of training against that half way there, poison in red.

    Args:
        end: influence at the fine-tuned model.
        half_way: influence at half the adapter, in the same order.
        poisoned: which examples are poison.
        unit: of both.
    """
    drawn, (axes,) = figure(width=6.0, height=4.0)
    flags = np.asarray(poisoned, dtype=bool)
    for kind, colour, name in ((~flags, BLUE, "clean"), (flags, RED, "poisoned")):
        axes.plot(np.asarray(end)[kind], np.asarray(half_way)[kind], "o", c=colour, ms=5, alpha=0.7, label=name)
    axes.axhline(0, color=BLACK, lw=0.8)
    axes.axvline(0, color=BLACK, lw=0.8)
    axes.set(xlabel=f"influence at the end of training, {unit}", ylabel=f"influence half way, {unit}")
    axes.locator_params(axis="x", nbins=6)
    axes.set_title("Poison lowers the loss of agreeing: which point sees it?")
    axes.legend(fontsize=10)
    return drawn


def areas_by_seed(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the area under the ROC curve of each ranking, a mark and an interval a seed.

    Args:
        rows: each with ``removed``, the ranking's name, ``seed``, and ``auroc_value``, ``_low`` and ``_high``.
    """
    names, seeds = (list(dict.fromkeys(row[key] for row in rows)) for key in ("removed", "seed"))
    drawn, (axes,) = figure(width=7.6, height=1.4 + 0.36 * len(names))
    for number, seed in enumerate(seeds):
        own = [row for row in rows if row["seed"] == seed]
        values = np.array([float(row["auroc_value"]) for row in own])
        ends = np.array([[float(row["auroc_low"]), float(row["auroc_high"])] for row in own]).T
        heights = [names.index(row["removed"]) + 0.22 * (number - (len(seeds) - 1) / 2) for row in own]
        lengths = np.abs(ends - values)
        axes.errorbar(
            values, heights, xerr=lengths, ls="", marker=MARKERS[number], c=CYCLE[number], label=f"seed {seed}"
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.axvline(0.5, color=BLACK, lw=1, ls=":")
    axes.axvline(0.95, color="#999999", lw=1, ls="--")
    axes.set(xlabel="area under the ROC curve; dotted: chance, dashed: 0.95", xlim=(0, 1.02))
    drawn.legend(loc="outside right upper", fontsize=10)
    return drawn


def token_bars(values: Mapping[str, Sequence[float]], tokens: Mapping[str, Sequence[str]]) -> Figure:
    """Draw the influence of each answer token, one panel an example."""
    drawn, axes = figure(len(values), width=9.6)
    for panel, (name, numbers) in zip(axes, values.items(), strict=True):
        panel.bar(range(len(numbers)), numbers, color=[RED if number < 0 else BLUE for number in numbers])
        panel.set_xticks(range(len(numbers)), [_safe(token) for token in tokens[name]], rotation=60, ha="right")
        panel.set_title(name)
        panel.axhline(0, color=BLACK, lw=0.8)
    axes[0].set_ylabel("influence, nats")
    return drawn


def before_after(rates: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw harmful compliance and task accuracy of each model with their intervals.

    Args:
        rates: measure -> model -> :class:`~curvlib.evaluate.stats.Estimate` of a rate.
    """
    drawn, axes = figure(len(rates), width=9.6, height=1.4 + 0.35 * max(map(len, rates.values())), sharey=True)
    for panel, (measure, by_model), colour in zip(axes, rates.items(), (RED, BLUE), strict=False):
        values, lengths = whiskers(list(by_model.values()))
        panel.barh(range(len(values)), values, xerr=lengths, color=colour, alpha=0.75)
        panel.set_yticks(range(len(values)), list(by_model))
        panel.set(xlabel=f"{measure}, %", xlim=(0, 100))
    axes[0].invert_yaxis()
    return drawn


def _safe(text: str) -> str:
    """Keep matplotlib from reading a dollar sign as mathematics."""
    return text.replace("$", r"\$").replace("\n", " ")
