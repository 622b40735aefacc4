"""The figures of the restoration study: one function each, in the style of :mod:`curvlib.plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from curvlib.defenses.study import ends
from curvlib.evaluate.intervals import Estimate, pooled_rate
from curvlib.plots import CYCLE, MARKERS, RED, figure, whiskers
from curvlib.plots_methods import pareto
from curvlib.restore.cases import Row
from curvlib.restore.outcome import Budget
from curvlib.restore.rows import by_name, flags
from curvlib.restore.study import under_attack

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
    for model, group in by_name(rows).items():
        stage = "reference" if model in references else "after"
        point: dict[str, Any] = {"name": model, "stage": stage}
        for part, found in rates(group).items():
            point |= ends(names[part], found)
        points.append(point)
    return pareto(points, ours)


def screening(rows: Sequence[Row]) -> Figure:
    """Draw the validation score of every objective (down) in every metric (across) as a table of colours.

    Args:
        rows: those of the study's part ``screening``, named "objective, metric"; one without a metric is left out.
    """
    scores = {tuple(row["name"].split(", ")): row["score"] for row in rows if ", " in row["name"]}
    return _tables({"validation score: refused − over-refused + task": scores}, "{:.2f}")


def trust_and_damping(rows: Sequence[Row], chosen: Budget) -> Figure:
    """Draw compliance, over-refusal and task accuracy by allowance τ (down) and damping λ (across).

    Args:
        rows: those of the study's part ``settings``; the ones named "τ …, λ …" are drawn.
        chosen: the budget that the other parts have, framed.
    """
    found = {tuple(row["name"].split(", ")): rates([row]) for row in rows if row["name"].startswith("τ")}
    tables = {label: {cell: 100 * own[part].value for cell, own in found.items()} for part, (_, label) in AXES.items()}
    return _tables(tables, "{:.0f}", (f"τ {chosen.trust:g}", f"λ {chosen.damping:g}"))


def _tables(tables: Mapping[str, Mapping[tuple[str, ...], float]], text: str, framed: object = None) -> Figure:
    """Draw tables of numbers side by side, coloured; each maps (row, column) to its number, and cells may lack."""
    cells = list(next(iter(tables.values())))
    down, across = (
        {name: place for place, name in enumerate(dict.fromkeys(names))} for names in zip(*cells, strict=True)
    )
    width = len(tables) * (1.0 + 0.75 * len(across)) + 1.0
    drawn, panels = figure(len(tables), width=width, height=1.0 + 0.42 * len(down), sharey=True)
    for axes, (title, table) in zip(panels, tables.items(), strict=True):
        shown = np.full((len(down), len(across)), np.nan)
        for (row, column), value in table.items():
            shown[down[row], across[column]] = value
        axes.imshow(shown, cmap="cividis", aspect="auto")
        middle = (np.nanmin(shown) + np.nanmax(shown)) / 2
        for (row, column), value in table.items():
            place, frame = (across[column], down[row]), {"ec": RED, "fc": "none"} if (row, column) == framed else None
            axes.annotate(
                text.format(value), place, ha="center", va="center", color="w" if value < middle else "k", bbox=frame
            )
        for down_at, across_at in np.argwhere(np.isnan(shown)):
            axes.annotate("not run", (across_at, down_at), ha="center", va="center", color="#777777", fontsize=8)
        axes.set_xticks(range(len(across)), list(across))
        axes.set_yticks(range(len(down)), list(down))
        axes.grid(visible=False)
        axes.set_title(title)
    return drawn


def regimes(rows: Sequence[Row]) -> Figure:
    """Draw compliance, over-refusal and task accuracy of each contender in each regime, with intervals.

    Args:
        rows: those of the study's part ``regimes``, named "contender, regime".
    """
    return _contenders({tuple(row["name"].rsplit(", ", 1)): row for row in rows}, AXES)


def attacks(rows: Sequence[Row]) -> Figure:
    """Draw compliance with harmful prompts under each attack, one colour a model.

    Args:
        rows: those of the study's part ``attacks``: attack -> verdicts, beside the model's name.
    """
    cells: dict[tuple[str, ...], Row] = {
        (row["name"], attack): {"harmful": verdicts} for row in rows for attack, verdicts in under_attack(row).items()
    }
    return _contenders(cells, {"harmful": AXES["harmful"]})


def _contenders(cells: Mapping[tuple[str, ...], Row], shown: Mapping[str, tuple[str, str]]) -> Figure:
    """Draw (contender, regime) -> row: a panel for each part, a line for each regime, a colour for each contender."""
    places = {regime: place for place, regime in enumerate(dict.fromkeys(regime for _, regime in cells))}
    contenders = list(dict.fromkeys(contender for contender, _ in cells))
    width = max(3 + 2.5 * len(shown), 1.8 * len(contenders))  # of the panels, or of the legend in one row
    drawn, panels = figure(len(shown), width=width, height=1.5 + 0.62 * len(places), sharey=True)
    for axes, (part, (_, label)) in zip(panels, shown.items(), strict=True):
        for number, contender in enumerate(contenders):
            own = {places[at]: rates([row], shown)[part] for (who, at), row in cells.items() if who == contender}
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
    return lines(rows, {**{part: AXES[part] for part in ("harmful", "edgy")}, "persona": ("", "persona kept, %")})


def lines(rows: Sequence[Row], shown: Mapping[str, tuple[str, str]] = AXES) -> Figure:
    """Draw what is shown of each model as a line with intervals, rows of one name pooled."""
    groups = by_name(rows)
    drawn, panels = figure(len(shown), width=10.5, height=1.2 + 0.36 * len(groups), sharey=True)
    found = [rates(group, shown) for group in groups.values()]
    for axes, (part, (_, label)) in zip(panels, shown.items(), strict=True):
        values, lengths = whiskers([one[part] for one in found])
        axes.errorbar(values, range(len(groups)), xerr=lengths, fmt=MARKERS[0], color=CYCLE[0])
        axes.set(xlabel=label, xlim=(-4, 104), ylim=(len(groups) - 0.5, -0.5))
    panels[0].set_yticks(range(len(groups)), list(groups))
    return drawn
