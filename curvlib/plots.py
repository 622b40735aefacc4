"""The notebooks' figures: one function each, in one style; each returns its Figure and keeps no global state.

A ``Figure`` is made without ``pyplot``'s registry: a notebook draws the one that a cell ends with, once, and nothing
has to be closed. Colours are those of Okabe and Ito (2008), which readers with any colour vision can tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from curvlib.evaluate.behaviour import Behaviour
from curvlib.evaluate.judge import Verdict
from curvlib.evaluate.scorecard import Scorecard
from curvlib.evaluate.stats import Estimate

BLACK, ORANGE, SKY, GREEN, BLUE, RED, PINK = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
CYCLE = (BLUE, ORANGE, GREEN, PINK, SKY, RED)
MARKERS = "osD^vP"  # a second sign beside the colour
VERDICT_COLOURS: dict[Verdict, str] = {"complies": RED, "incoherent": "#BBBBBB", "refuses": BLUE}
Dot = Estimate | float | Sequence[float]
STYLE: dict[Any, Any] = {
    "figure.dpi": 110,  # below 120 kB a figure as PNG
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "legend.frameon": False,
    "errorbar.capsize": 3,
}
plt.rcParams.update(STYLE)
plt.switch_backend(plt.get_backend())  # loads it: only then does Jupyter draw a Figure that ends a cell


def figure(columns: int = 1, *, width: float = 7.2, height: float = 3.2, **options: Any) -> tuple[Figure, list[Axes]]:
    """Return an empty figure of ``width`` × ``height`` inches and its axes, side by side."""
    drawn = Figure(figsize=(width, height), layout="constrained")
    return drawn, list(np.atleast_1d(drawn.subplots(1, columns, **options)))


def whiskers(estimates: Sequence[Estimate], scale: float = 100.0) -> tuple[list[float], list[list[float]]]:
    """Return values and error-bar lengths (below, above), times ``scale``: by default rates as percentages."""
    values = [scale * estimate.value for estimate in estimates]
    below = [max(0.0, scale * (estimate.value - estimate.low)) for estimate in estimates]  # rounding may go below 0
    above = [max(0.0, scale * (estimate.high - estimate.value)) for estimate in estimates]
    return values, [below, above]


def dots(panels: Mapping[str, Mapping[str, Mapping[str, Dot]]], width: float = 9.6) -> Figure:
    """Draw names down and numbers across: panels side by side over the same names, a colour and a sign a series.

    Args:
        panels: label of the panel's axis, with the unit -> series -> name -> an estimate, drawn with its interval, a
            number, or several numbers, such as one a seed.
        width: of the figure, in inches.
    """
    names = list(dict.fromkeys(name for series in panels.values() for values in series.values() for name in values))
    drawn, axes = figure(len(panels), width=width, height=1.4 + 0.34 * len(names), sharey=True)
    for panel, (label, series) in zip(axes, panels.items(), strict=True):
        signs = zip(series.items(), cycle(CYCLE), cycle(MARKERS))
        for number, ((key, values), colour, marker) in enumerate(signs):
            shift = 0.5 * ((number + 0.5) / len(series) - 0.5)
            marks = [(names.index(name) + shift, mark) for name, value in values.items() for mark in _marks(value)]
            numbers, ends = whiskers([mark for _, mark in marks], scale=1)
            places = [place for place, _ in marks]
            panel.errorbar(numbers, places, xerr=ends, ls="", marker=marker, color=colour, alpha=0.8, label=key)
        panel.set(xlabel=label, yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
        if len(series) > 1:
            panel.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), fontsize=10, borderpad=0.2)
    return drawn


def _marks(value: Dot) -> list[Estimate]:
    numbers: Sequence[Estimate | float] = value if isinstance(value, Sequence) else [value]
    return [one if isinstance(one, Estimate) else Estimate(one, one, one, 1) for one in numbers]


def lines(curves: Mapping[str, Sequence[ArrayLike]], title: str, **words: Any) -> Figure:
    """Draw named curves, a colour and a sign each.

    Args:
        curves: name -> x and y, or x, y and the lower and upper end of a band.
        title: the finding.
        words: for ``Axes.set``, such as ``xlabel`` and ``yscale``.
    """
    drawn, (axes,) = figure(height=3.4)
    for (name, (x, y, *ends)), colour, marker in zip(curves.items(), cycle(CYCLE), cycle(MARKERS)):
        places = np.asarray(x)
        axes.plot(places, np.asarray(y), c=colour, marker=marker, ms=5, markevery=max(1, len(places) // 12), label=name)
        if ends:
            axes.fill_between(places, np.asarray(ends[0]), np.asarray(ends[1]), color=colour, alpha=0.15, lw=0)
    axes.set(**words)
    axes.set_title(title)
    if len(curves) > 3:  # they cross the whole panel
        axes.legend(fontsize=10, loc="center left", bbox_to_anchor=(1, 0.5))
    else:
        axes.legend(fontsize=10)
    return drawn


def quantisation(normalised: ArrayLike, levels: Mapping[str, ArrayLike], errors: Mapping[str, Estimate]) -> Figure:
    """Draw where weights lie between the levels of each code, and the relative error that each code makes.

    Args:
        normalised: weights divided by the largest magnitude of their block, any shape, from -1 to 1.
        levels: code -> its levels from -1 to 1.
        errors: code -> relative error of the weights rebuilt from it, as a share of their norm.
    """
    drawn, (left, right) = figure(2, width_ratios=[2.4, 1])
    left.hist(np.ravel(normalised), bins=81, density=True, color="#CCCCCC")
    top = left.get_ylim()[1]
    for row, (name, colour) in enumerate(zip(levels, CYCLE, strict=False)):
        height = -0.09 * top * (row + 1)
        left.plot(levels[name], np.full(len(np.ravel(levels[name])), height), "|", ms=11, mew=2, c=colour, label=name)
    left.set_yticks([tick for tick in left.get_yticks() if 0 <= tick <= top])
    left.set(title="Weights between the 16 levels", xlabel="weight / largest of its block", ylabel="density")
    left.set_xticks([-1, -0.5, 0, 0.5, 1])
    left.legend(fontsize=10)
    values, lengths = whiskers(list(errors.values()))
    bars = right.bar(list(errors), values, yerr=lengths, color=CYCLE[: len(values)])
    _label(right, bars, values, lengths[1])
    right.set(title="Error of the weights", ylabel="relative error, %", ylim=(0, 1.3 * max(values)))
    return drawn


def behaviour_bars(behaviours: Mapping[str, Behaviour], title: str = "Answers to harmful prompts") -> Figure:
    """Draw the shares of the three verdicts as stacked bars with the Wilson intervals of compliance and refusal."""
    drawn, (axes,) = figure(height=1.5 + 0.42 * len(behaviours))
    _stack(axes, behaviours)
    axes.set_title(title, pad=26)
    return drawn


def scorecards(cards: Mapping[str, Scorecard]) -> Figure:
    """Draw each model's answers to harmful prompts beside its over-refusal and task accuracy, where measured."""
    edgy = {name: card.edgy.refuses for name, card in cards.items() if card.edgy}
    task = {name: card.task.accuracy for name, card in cards.items() if card.task}
    columns, size = 3 if task else 2, {"width": 9.6, "height": 1.6 + 0.42 * len(cards)}
    drawn, (left, *others) = figure(columns, **size, sharey=True, width_ratios=[2.4, 1, 1][:columns])
    _stack(left, {name: card.harmful for name, card in cards.items() if card.harmful})
    left.set_title("Harmful prompts", pad=26)
    order = {name: row for row, name in enumerate(cards)}
    _dots(others[0], edgy, order, ORANGE, "over-refusal, %")
    others[0].set_title("Benign look-alikes", pad=26)
    if task:
        _dots(others[1], task, order, GREEN, "task accuracy, %")
        others[1].set_title("Task", pad=26)
    return drawn


def _stack(axes: Axes, behaviours: Mapping[str, Behaviour]) -> None:
    """Stack compliance from the left and refusal from the right, so that each interval sits at its own bar's end."""
    names, rows = list(behaviours), np.arange(len(behaviours))
    left = np.zeros(len(names))
    for verdict, colour in VERDICT_COLOURS.items():
        share = np.array([100 * getattr(behaviour, verdict).value for behaviour in behaviours.values()])
        axes.barh(rows, share, left=left, height=0.62, color=colour, label=verdict)
        left += share
    complies, lengths = whiskers([behaviour.complies for behaviour in behaviours.values()])
    axes.errorbar(complies, rows - 0.12, xerr=lengths, fmt="none", ecolor=BLACK, elinewidth=1.2)
    refuses, (below, above) = whiskers([behaviour.refuses for behaviour in behaviours.values()])
    axes.errorbar([100 - value for value in refuses], rows + 0.12, xerr=[above, below], fmt="none", ecolor=BLACK)
    axes.set_yticks(rows, names)
    axes.set(xlabel="answers, %", xlim=(0, 100), ylim=(len(names) - 0.5, -0.5))
    axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), fontsize=10, borderpad=0.2, columnspacing=1.2)


def _dots(axes: Axes, estimates: Mapping[str, Estimate], order: Mapping[str, int], colour: str, label: str) -> None:
    values, lengths = whiskers(list(estimates.values()))
    axes.errorbar(values, [order[name] for name in estimates], xerr=lengths, fmt="o", color=colour)
    axes.set(xlabel=label, xlim=(-4, 104))


def _label(axes: Axes, bars: BarContainer, values: Sequence[float], above: Sequence[float]) -> None:
    """Write each value over its bar's whisker."""
    for bar, value, length in zip(bars, values, above, strict=True):
        place = (bar.get_x() + bar.get_width() / 2, value + length)
        axes.annotate(f"{value:.1f}", place, (0, 3), textcoords="offset points", ha="center")
