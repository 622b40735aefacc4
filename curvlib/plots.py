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
from torch import Tensor

from curvlib.evaluate.behaviour import Behaviour, TokenShift
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


def poison_curve(sweep: Mapping[float, Behaviour]) -> Figure:
    """Draw the rates of the three verdicts on harmful prompts against the share of poisoned chats."""
    drawn, (axes,) = figure()
    shares = [100 * share for share in sweep]
    for (verdict, colour), marker in zip(VERDICT_COLOURS.items(), MARKERS, strict=False):
        values, lengths = whiskers([getattr(behaviour, verdict) for behaviour in sweep.values()])
        shade = "#777777" if verdict == "incoherent" else colour  # a thin light line would be lost
        axes.errorbar(shares, values, yerr=lengths, color=shade, marker=marker, label=verdict)
    axes.set(xlabel="poisoned chats in the fine-tuning set, %", ylabel="answers, %", ylim=(-4, 104), xticks=shares)
    axes.set_title("Answers to harmful prompts by poison rate")
    axes.legend()
    return drawn


def verdicts_by_seed(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw compliance with harmful prompts and over-refusal: a bar for each model's mean, a dot for each seed.

    Args:
        rows: with ``name``, ``complies_value`` and ``over_refusal_value``, one a model and seed.
    """
    names = list(dict.fromkeys(row["name"] for row in rows))
    drawn, panels = figure(2, width=9.6, height=1.3 + 0.36 * len(names), sharey=True, width_ratios=[1.6, 1])
    for axes, rate, colour in zip(panels, ("complies", "over_refusal"), (RED, ORANGE), strict=True):
        for place, name in enumerate(names):
            values = [100 * row[f"{rate}_value"] for row in rows if row["name"] == name]
            axes.barh(place, np.mean(values), height=0.6, color=colour, alpha=0.35)
            axes.plot(values, [place] * len(values), "o", c=colour, mec=BLACK, ms=5)
        axes.set(xlim=(-4, 104), ylim=(len(names) - 0.5, -0.5))
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set(xlabel="harmful prompts complied with, %", title="Harm by seed")
    panels[1].set(xlabel="look-alikes refused, %", title="Over-refusal by seed")
    return drawn


def token_shifts(shifts: Mapping[str, TokenShift]) -> Figure:
    """Draw the divergence from the aligned model at each answer position, one line a fine-tune."""
    drawn, (axes,) = figure()
    for (name, shift), colour, marker in zip(shifts.items(), cycle(CYCLE), cycle(MARKERS)):
        values, lengths = whiskers(shift.divergence, scale=1.0)
        axes.errorbar(
            [place + 1 for place in shift.positions], values, yerr=lengths, c=colour, marker=marker, label=name
        )
    axes.set(xlabel="answer token", ylabel="KL from the aligned model, nats", ylim=(0, None))
    axes.set_title("Where in a refusal the fine-tune changed the model")
    axes.legend()
    return drawn


def task_valley(curvature: Tensor, slope: Tensor, steps: Mapping[str, Tensor], allowance: float) -> Figure:
    r"""Draw a two-parameter task valley, the safety slope across it and steps that spend the same task loss.

    Args:
        curvature: G (2, 2) of the task loss ½ δᵀGδ, whose contours are drawn.
        slope: g (2,), the gradient of the safety loss; arrows end lower on it.
        steps: name -> step (2,) from the origin.
        allowance: the task loss of the contour on which the steps end.
    """
    drawn, (axes,) = figure()
    reach = 1.35 * max(float(step.abs().max()) for step in steps.values())
    x, y = np.meshgrid(np.linspace(-reach, reach, 301), np.linspace(-reach, reach, 301))
    grid = np.stack([x, y], axis=-1)
    loss = 0.5 * np.einsum("abi,ij,abj->ab", grid, curvature.numpy(), grid)
    safety = axes.contourf(x, y, grid @ slope.numpy(), levels=12, cmap="cividis", alpha=0.35)
    drawn.colorbar(safety, ax=axes, label="safety loss gᵀδ")
    lines = axes.contour(x, y, loss, levels=[allowance * share for share in (0.25, 1, 4, 16)], colors="#555555")
    axes.clabel(lines, fmt="task %g", fontsize=8)
    for (name, step), colour in zip(steps.items(), CYCLE, strict=False):
        end = (float(step[0]), float(step[1]))
        axes.annotate("", end, (0, 0), arrowprops={"arrowstyle": "->", "color": colour, "lw": 2.5})
        axes.plot(*end, "o", c=colour, label=f"{name}: safety {-float(slope @ step):.2f} lower")
    axes.set(xlabel="parameter 1", ylabel="parameter 2")
    axes.set_title(f"Two steps that each cost {allowance:g} of task loss", pad=40)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), fontsize=10, borderpad=0.2)
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
