"""The figures of the methods notebook and of the report: one function each, in the style of :mod:`curvlib.plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from curvlib.plots import BLACK, BLUE, GREEN, ORANGE, RED, figure
from curvlib.report import Claim

STAGES = {"reference": (BLACK, "P"), "during": (ORANGE, "s"), "after": (BLUE, "o"), "quantisation": (GREEN, "D")}
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
            bars: dict[str, Any] = {
                f"{end}err": [
                    [max(0.0, 100 * (row[name] - row[f"{name}_low"]))],
                    [max(0.0, 100 * (row[f"{name}_high"] - row[name]))],
                ]
                for end, name in (("x", rate), ("y", "harmful_compliance"))
            }
            axes.errorbar(*point, **bars, fmt="none", ecolor=colour, alpha=0.25, capsize=0)
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
    """Number the points from 1, each on the side away from its nearest neighbour; near ones share a label."""
    spans = np.ptp(axes.get_xlim()), np.ptp(axes.get_ylim())
    places = _together(points, NEAR[0] * spans[0], NEAR[1] * spans[1])
    for place, numbers in places.items():
        ways = [np.subtract(place, other) / spans for other in places if other != place] or [np.array([0.0, 1.0])]
        nearest = min(ways, key=lambda way: float(np.hypot(*way)))
        x, y = nearest / np.hypot(*nearest)
        y = y if abs(y) > 0.4 else -0.5  # not on the point's own interval
        side: dict[str, Any] = {"ha": "left" if x > 0.4 else "right" if x < -0.4 else "center"}
        side["va"] = "bottom" if y > 0 else "top"
        text = ", ".join(map(str, numbers))
        axes.annotate(text, place, xytext=(7 * x, 7 * y), textcoords="offset points", fontsize=9, **side)


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
