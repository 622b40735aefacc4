"""The figures of the methods notebook and of the report: one function each, in the style of :mod:`curvlib.plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from curvlib.defenses.study import estimate
from curvlib.plots import BLACK, BLUE, CYCLE, GREEN, MARKERS, ORANGE, RED, figure, whiskers
from curvlib.report import Claim

Pixels = NDArray[np.float64]
STAGES = {"reference": (BLACK, "P"), "during": (ORANGE, "s"), "after": (BLUE, "o"), "quantisation": (GREEN, "D")}
SIDES = ((1, -1), (1, 1), (-1, -1), (-1, 1), (1, 0), (-1, 0), (0, -1), (0, 1))  # of a point; off its interval first
NEAR = (0.02, 0.03)  # shares of both axes within which labels would touch


def pareto(rows: Sequence[Mapping[str, Any]], ours: str) -> Figure:
    """Draw harmful compliance against over-refusal and against task accuracy, one numbered point a method.

    Args:
        rows: as :func:`curvlib.defenses.study.rows` returns them, all of one poison rate.
        ours: name of the method that is circled.
    """
    drawn, (left, right) = figure(2, width=10.5, height=1.6 + 0.22 * len(rows), sharey=True)
    panels = ((left, "over_refusal"), (right, "task_accuracy"))
    for axes, rate in panels:
        for number, row in enumerate(rows, 1):
            colour, marker = STAGES[row["stage"]]
            point = 100 * row[rate], 100 * row["harmful_compliance"]
            across, up = (whiskers([estimate(row, name)])[1] for name in (rate, "harmful_compliance"))
            axes.errorbar(*point, up, across, fmt="none", ecolor=colour, alpha=0.25, capsize=0)
            label = f"{number} {row['name']}" if axes is right else None
            axes.plot(*point, marker, c=colour, label=label)
            if row["name"] == ours:
                axes.plot(*point, "o", ms=14, mfc="none", mec=RED, mew=1.5)
    left.set(xlabel="over-refusal, % (less is better)", ylabel="harmful compliance, % (less is better)")
    left.set_ylim(bottom=-0.12 * left.get_ylim()[1])  # room for labels below the points at zero
    for axes, rate in panels:
        _number(axes, [(100 * row[rate], 100 * row["harmful_compliance"]) for row in rows])
    right.set(xlabel="task accuracy, % (more is better)")
    left.set_title("Harm against over-refusal")
    right.set_title("Harm against the task")
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    return drawn


def _number(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    """Number the points from 1, each where it covers the fewest labels and points; near ones share a label."""
    spans = np.ptp(axes.get_xlim()), np.ptp(axes.get_ylim())
    places = _together(points, NEAR[0] * spans[0], NEAR[1] * spans[1])
    pixels = axes.transData.transform(list(places))
    taken = [Bbox.from_extents(*(pixel - 4), *(pixel + 4)) for pixel in pixels]
    for (place, numbers), own in zip(places.items(), pixels, strict=True):
        label = axes.annotate(_told(numbers), place, (0, 0), textcoords="offset points", fontsize=9)
        costs = {side: _cost(_turn(label, side), own, pixels, taken) for side in SIDES}
        taken.append(_turn(label, min(costs, key=costs.__getitem__)))


def _cost(box: Bbox, own: Pixels, pixels: Pixels, taken: Sequence[Bbox]) -> int:
    """Return how many boxes a label covers, and how many points are nearer to its middle than its own is."""
    middle = np.mean(box, axis=0)
    nearer = np.linalg.norm(pixels - middle, axis=1) < np.linalg.norm(own - middle)
    return int(box.count_overlaps(taken) + nearer.sum())


def _turn(label: Annotation, side: tuple[int, int]) -> Bbox:
    """Put a label on this side of its point, and return what it covers there."""
    x, y = side
    label.set(position=(6 * x, 6 * y), ha=("right", "center", "left")[x + 1], va=("top", "center", "bottom")[y + 1])
    return label.get_window_extent()


def _together(points: Sequence[tuple[float, float]], wide: float, high: float) -> dict[tuple[float, float], list[int]]:
    """Return place -> numbers of the points (x, y) there, from 1: nearer than ``wide`` and ``high``, they share one.

    >>> _together([(0, 0), (10, 0), (1, 2)], 3, 4)
    {(0, 0): [1, 3], (10, 0): [2]}
    """
    places: dict[tuple[float, float], list[int]] = {}
    for number, (x, y) in enumerate(points, 1):
        near = (place for place in places if abs(place[0] - x) < wide and abs(place[1] - y) < high)
        places.setdefault(next(near, (x, y)), []).append(number)
    return places


def _told(numbers: Sequence[int]) -> str:
    """Return ascending numbers as a label; four or more in a row are told by their ends, lest it outgrow the panel.

    >>> _told([1, 2, 3, 4, 6, 9, 10, 11])
    '1–4, 6, 9, 10, 11'
    """
    # numbers in a row lie equally far from their places
    rows = [[number for _, number in row] for _, row in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{row[0]}–{row[-1]}" if len(row) > 3 else ", ".join(map(str, row)) for row in rows)


def kinds(rows: Sequence[Mapping[str, Any]], ours: str) -> Figure:
    """Draw harmful compliance and over-refusal of each method on each kind of fine-tune, with their intervals.

    Args:
        rows: as :func:`curvlib.defenses.study.rows` returns them, ``part`` their kind; every method on every kind.
        ours: name of the method whose lines are shaded.
    """
    names, parts = (list(dict.fromkeys(row[key] for row in rows)) for key in ("name", "part"))
    drawn, panels = figure(2, width=10.5, height=1.4 + 0.36 * len(names), sharey=True)
    places = np.linspace(-0.25, 0.25, len(parts)) if len(parts) > 1 else np.zeros(1)
    told = {"harmful_compliance": "harmful compliance", "over_refusal": "over-refusal"}
    for axes, (rate, label) in zip(panels, told.items(), strict=True):
        for part, place, colour, marker in zip(parts, places, CYCLE, MARKERS, strict=False):
            group = [row for row in rows if row["part"] == part]
            at = [names.index(row["name"]) + place for row in group]
            values, ends = whiskers([estimate(row, rate) for row in group])
            axes.errorbar(values, at, xerr=ends, fmt=marker, c=colour, ms=5, elinewidth=1, capsize=0, label=part)
        axes.axhspan(names.index(ours) - 0.5, names.index(ours) + 0.5, color=RED, alpha=0.1, lw=0)
        axes.set(xlabel=f"{label}, % (less is better)", title=f"{label.capitalize()} by kind of fine-tune")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    panels[0].legend(title="fine-tuned on")
    return drawn


def claims_in_points(claims: Sequence[Claim]) -> Figure:
    """Draw each claim that is told in points or per cent: value, interval, and control as an open diamond.

    Args:
        claims: at least one; those in another unit, told by their ids, are left out.
    """
    shown = [claim for claim in claims if claim.id.endswith(("_points", "_percent"))]
    drawn, (axes,) = figure(width=9.0, height=1.4 + 0.36 * len(shown))
    rows = np.arange(len(shown))
    values = np.array([claim.value for claim in shown])
    ends = np.array([[claim.value - claim.low, claim.high - claim.value] for claim in shown]).reshape(-1, 2).T
    colours = [BLUE if claim.holds else RED for claim in shown]
    axes.errorbar(values, rows, xerr=ends.clip(min=0), fmt="none", ecolor="#777777")
    axes.scatter(values, rows, c=colours, zorder=3, label="value: blue holds, red does not")
    axes.scatter([claim.control for claim in shown], rows, marker="D", fc="none", ec=BLACK, zorder=4, label="control")
    axes.set_yticks(rows, [claim.id for claim in shown])
    axes.set(xlabel="points or per cent", ylim=(len(shown) - 0.5, -0.5))
    axes.set_title("Claims beside their controls", pad=26)
    axes.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1), fontsize=10, borderpad=0.2)
    return drawn
