"""The figures of the restoration study: one function each, in the style of :mod:`curvlib.plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from curvlib.defenses.study import ends
from curvlib.evaluate.intervals import Estimate, pooled_rate
from curvlib.plots import CYCLE, MARKERS, figure, whiskers
from curvlib.plots_methods import pareto
from curvlib.restore.study import flags

Row = Mapping[str, Any]
AXES = {
    "harmful": ("complies", "harmful compliance, %"),
    "edgy": ("refuses", "over-refusal, %"),
    "task": ("", "task accuracy, %"),
}


def rates(rows: Sequence[Row], shown: Mapping[str, tuple[str, str]] = AXES) -> dict[str, Estimate]:
    """Return part -> rate over the rows of one model at several seeds; each part comes with the verdict that counts."""
    return {part: pooled_rate([flags(row[part], verdict) for row in rows]) for part, (verdict, _) in shown.items()}


def contest(rows: Sequence[Row], ours: str, references: Sequence[str]) -> Figure:
    """Draw the Pareto front of the contest: compliance against over-refusal and task accuracy, pooled over seeds.

    Args:
        rows: those of the study's part ``contest``, one a model and seed.
        ours: name of the model that is circled.
        references: names of the models that nothing restored.
    """
    names = {"harmful": "harmful_compliance", "edgy": "over_refusal", "task": "task_accuracy"}
    points = []
    for model in dict.fromkeys(row["name"] for row in rows):
        stage = "reference" if model in references else "after"
        point: dict[str, Any] = {"name": model, "stage": stage}
        for part, found in rates([row for row in rows if row["name"] == model]).items():
            point |= ends(names[part], found)
        points.append(point)
    return pareto(points, ours)


def regimes(rows: Sequence[Row]) -> Figure:
    """Draw compliance, over-refusal and task accuracy of each contender in each regime, with intervals.

    Args:
        rows: those of the study's part ``regimes``, named "contender, regime".
    """
    split = {row["name"]: row["name"].rsplit(", ", 1) for row in rows}
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


def learned(rows: Sequence[Row]) -> Figure:
    """Draw compliance, over-refusal and what is left of the learned persona, one line a model, pooled over seeds.

    Args:
        rows: those of the study's part ``learned``.
    """
    shown = {**{part: AXES[part] for part in ("harmful", "edgy")}, "persona": ("", "persona kept, %")}
    names = list(dict.fromkeys(row["name"] for row in rows))
    drawn, panels = figure(3, width=10.5, height=1.2 + 0.36 * len(names), sharey=True)
    found = [rates([row for row in rows if row["name"] == name], shown) for name in names]
    for axes, (part, (_, label)) in zip(panels, shown.items(), strict=True):
        values, lengths = whiskers([one[part] for one in found])
        axes.errorbar(values, range(len(names)), xerr=lengths, fmt=MARKERS[0], color=CYCLE[0])
        axes.set(xlabel=label, xlim=(-4, 104), ylim=(len(names) - 0.5, -0.5))
    panels[0].set_yticks(range(len(names)), names)
    return drawn
