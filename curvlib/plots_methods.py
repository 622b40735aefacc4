"""The figures of the methods notebook and of the report: one function each, in the style of :mod:`curvlib.plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from curvlib.plots import BLACK, BLUE, GREEN, ORANGE, RED, figure
from curvlib.report import Claim

STAGES = {"reference": (BLACK, "P"), "during": (ORANGE, "s"), "after": (BLUE, "o"), "quantisation": (GREEN, "D")}


def pareto(rows: Sequence[Mapping[str, Any]], ours: str) -> Figure:
    """Draw harmful compliance against over-refusal and against task accuracy, one numbered point a method.

    Args:
        rows: as :func:`curvlib.defenses.study.rows` returns them, all of one poison rate.
        ours: name of the method that is circled.
    """
    drawn, (left, right) = figure(2, width=10.5, height=1.6 + 0.22 * len(rows), sharey=True)
    for axes, rate in ((left, "over_refusal"), (right, "task_accuracy")):
        together: dict[tuple[int, int], tuple[tuple[float, float], list[int]]] = {}  # points that lie on one another
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
            together.setdefault((round(point[0] / 2), round(point[1] / 4)), (point, []))[1].append(number)
            if row["name"] == ours:
                axes.plot(*point, "o", ms=14, mfc="none", mec=RED, mew=1.5)
        for place, numbers in together.values():
            axes.annotate(", ".join(map(str, numbers)), place, (5, 5), textcoords="offset points", fontsize=9)
    left.set(xlabel="over-refusal, % (less is better)", ylabel="harmful compliance, % (less is better)")
    right.set(xlabel="task accuracy, % (more is better)")
    left.set_title("Harm against over-refusal")
    right.set_title("Harm against the task")
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
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
    axes.scatter([claim.control for claim in shown], rows, marker="D", fc="none", ec=BLACK, label="null control")
    axes.set_yticks(rows, [claim.id for claim in shown])
    axes.set(xlabel="points or per cent", ylim=(len(shown) - 0.5, -0.5))
    axes.set_title("Claims beside their null controls", pad=26)
    axes.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1), fontsize=10, borderpad=0.2)
    return drawn
