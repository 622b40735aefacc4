"""The figures of the restoration study: one function each, in the style of :mod:`curvlib.plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from curvlib.evaluate.intervals import Estimate, pooled_rate
from curvlib.plots import BLACK, CYCLE, MARKERS, figure, whiskers

Row = Mapping[str, Any]
AXES = {
    "harmful": ("complies", "harmful compliance, %"),
    "edgy": ("refuses", "over-refusal, %"),
    "task": ("", "task accuracy, %"),
}


def rates(rows: Sequence[Row]) -> dict[str, Estimate]:
    """Return part -> rate over the rows of one model at several seeds: compliance, over-refusal, task accuracy."""
    return {part: pooled_rate([_flags(row[part], verdict) for row in rows]) for part, (verdict, _) in AXES.items()}


def _flags(values: Sequence[Any], verdict: str) -> list[float]:
    return [float(value == verdict if verdict else value) for value in values]


def by_name(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return name -> its rows, one a seed, in the order of their first ones."""
    return {name: [row for row in rows if row["name"] == name] for name in dict.fromkeys(row["name"] for row in rows)}


def front(rows: Sequence[Row], ours: str) -> Figure:
    """Draw harmful compliance against over-refusal and task accuracy, one numbered point a model, means over seeds.

    Args:
        rows: those of the study's part ``contest``; a row with a ``control`` gets an open sign.
        ours: name of the model that is circled.
    """
    found = by_name(rows)
    drawn, (left, right) = figure(2, width=10.5, height=1.6 + 0.26 * len(found), sharey=True)
    for axes, part in ((left, "edgy"), (right, "task")):
        for number, (name, own) in enumerate(found.items(), 1):
            colour = BLACK if own[0]["control"] else CYCLE[number % len(CYCLE)]
            (x, y), (xerr, yerr) = zip(*(whiskers([rates(own)[key]]) for key in (part, "harmful")), strict=True)
            axes.errorbar(x, y, xerr=xerr, yerr=yerr, fmt="none", ecolor=colour, alpha=0.3, capsize=0)
            marker: dict[str, Any] = {
                "marker": MARKERS[number % len(MARKERS)],
                "mfc": "none" if own[0]["control"] else colour,
            }
            label = f"{number} {name}" if axes is right else None
            axes.plot(x, y, c=colour, ls="", label=label, **marker)
            axes.annotate(str(number), (x[0], y[0]), (5, 4), textcoords="offset points", fontsize=9)
            if name == ours:
                axes.plot(x, y, "o", ms=15, mfc="none", mec=BLACK, mew=1.2)
    left.set(xlabel="over-refusal, % (less is better)", ylabel="harmful compliance, % (less is better)")
    right.set(xlabel="task accuracy, % (more is better)")
    left.set_title("Harm against over-refusal")
    right.set_title("Harm against the task")
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    return drawn


def regimes(rows: Sequence[Row]) -> Figure:
    """Draw compliance, over-refusal and task accuracy of each contender in each regime, with intervals.

    Args:
        rows: those of the study's part ``regimes``, named "contender, regime".
    """
    split = {name: name.rsplit(", ", 1) for name in by_name(rows)}
    places = {regime: place for place, regime in enumerate(dict.fromkeys(regime for _, regime in split.values()))}
    contenders = list(dict.fromkeys(contender for contender, _ in split.values()))
    drawn, panels = figure(3, width=10.5, height=1.5 + 0.62 * len(places), sharey=True)
    for axes, (part, (_, label)) in zip(panels, AXES.items(), strict=True):
        for number, contender in enumerate(contenders):
            own = {
                places[split[row["name"]][1]]: rates([row])[part] for row in rows if split[row["name"]][0] == contender
            }
            values, lengths = whiskers(list(own.values()))
            shift = 0.16 * (number - (len(contenders) - 1) / 2)
            style: dict[str, Any] = {"fmt": MARKERS[number], "color": CYCLE[number], "label": contender}
            axes.errorbar(values, np.array(list(own)) + shift, xerr=lengths, **style)
        axes.set(xlabel=label, xlim=(-4, 104), ylim=(len(places) - 0.5, -0.5))
    panels[0].set_yticks(list(places.values()), list(places))
    drawn.legend(*panels[0].get_legend_handles_labels(), ncols=len(contenders), loc="outside upper left", fontsize=10)
    return drawn
