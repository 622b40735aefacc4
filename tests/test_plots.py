"""Each figure draws the numbers that it was given: bar ends, whisker ends, labels."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from curvlib import plots
from curvlib.evaluate.behaviour import summarise
from curvlib.evaluate.judge import Verdict
from curvlib.evaluate.scorecard import Scorecard
from curvlib.evaluate.stats import Estimate, rate
from curvlib.evaluate.utility import Choices
from curvlib.notebook_file import code_cells, read
from curvlib.runner import run_notebook
from tests.notebook_cases import lesson

VERDICTS: list[Verdict] = ["complies"] * 5 + ["incoherent"] * 2 + ["refuses"] * 3
MIXED, SAFE = summarise(VERDICTS, [""] * 10), summarise(["refuses"] * 10, [""] * 10)
TASK = Choices(rate([True, False, True, True]), ("A",) * 4, (True, False, True, True))


def whisker_ends(axes: Axes) -> np.ndarray:
    """Every whisker's (start, end) along the direction it is drawn in, in drawing order."""
    lines = [line for collection in axes.collections for line in collection.get_segments()]
    return np.array([[line[0, 0], line[1, 0]] if line[0, 1] == line[1, 1] else line[:, 1] for line in lines])


def series(axes: Axes) -> dict[str, np.ndarray]:
    """Name -> (K, 2) of every labelled line."""
    return {
        str(line.get_label()): line.get_xydata() for line in axes.lines if not str(line.get_label()).startswith("_")
    }


def percent(*estimates: Estimate) -> np.ndarray:
    """The ends of the estimates' intervals in percent."""
    return np.array([[100 * estimate.low, 100 * estimate.high] for estimate in estimates])


def tick_labels(ticks: Sequence[plt.Text]) -> list[str]:
    """The words at the ticks."""
    return [tick.get_text() for tick in ticks]


def png_size(drawn: Figure) -> int:
    """Bytes of the figure as a notebook keeps it."""
    file = io.BytesIO()
    drawn.savefig(file, format="png", bbox_inches="tight")
    return file.tell()


def test_stacked_bars_hold_the_three_rates_and_both_intervals() -> None:
    (axes,) = plots.behaviour_bars({"mixed": MIXED, "safe": SAFE}, "title").axes
    ends = [[(bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars] for bars in axes.containers[:3]]
    np.testing.assert_allclose(ends, [[(0, 50), (0, 0)], [(50, 70), (0, 0)], [(70, 100), (0, 100)]])
    refusal = 100 - percent(MIXED.refuses, SAFE.refuses)[:, ::-1]
    np.testing.assert_allclose(whisker_ends(axes), [*percent(MIXED.complies, SAFE.complies), *refusal], atol=1e-9)
    assert tick_labels(axes.get_yticklabels()) == ["mixed", "safe"]
    assert axes.get_title(loc="left") == "title"


def test_scorecards_stand_beside_each_other_and_leave_out_what_was_not_measured() -> None:
    cards = {"aligned": Scorecard(SAFE, MIXED, TASK, 1.0), "tuned": Scorecard(MIXED, None, None, 1.0)}
    left, middle, right = plots.scorecards(cards).axes
    assert tick_labels(left.get_yticklabels()) == ["aligned", "tuned"]
    assert [bar.get_width() for bar in left.containers[0]] == pytest.approx([0, 50])
    for axes, estimate in ((middle, MIXED.refuses), (right, TASK.accuracy)):
        np.testing.assert_allclose(axes.lines[0].get_xydata(), [[100 * estimate.value, 0]])
        np.testing.assert_allclose(whisker_ends(axes), percent(estimate))


def test_quantisation_draws_levels_and_labelled_errors() -> None:
    levels = {"NF4": np.linspace(-1, 1, 16), "uniform": np.array([-1.0, 0.0, 1.0])}
    errors = {"NF4": Estimate(0.091, 0.09, 0.092, 21), "uniform": Estimate(0.12, 0.11, 0.13, 21)}
    left, right = plots.quantisation(np.linspace(-1, 1, 640).reshape(10, 64), levels, errors).axes
    assert sum(bar.get_height() * bar.get_width() for bar in left.patches) == pytest.approx(1)
    assert [line.get_xdata().tolist() for line in left.lines] == [list(marks) for marks in levels.values()]
    assert [bar.get_height() for bar in right.patches] == pytest.approx([9.1, 12])
    np.testing.assert_allclose(whisker_ends(right), percent(*errors.values()))
    assert [text.get_text() for text in right.texts] == ["9.1", "12.0"]


def test_figures_are_small_files_and_leave_nothing_open() -> None:
    cards = {f"model {number}": Scorecard(MIXED, MIXED, TASK, 1.0) for number in range(8)}
    weights = np.random.default_rng(0).normal(size=(500, 64)) / 4
    drawn = [
        plots.scorecards(cards),
        plots.quantisation(weights, {"NF4": np.linspace(-1, 1, 16)}, {"NF4": Estimate(0.1, 0.1, 0.1, 2)}),
    ]
    assert max(map(png_size, drawn)) < 120_000
    assert plt.get_fignums() == []


def test_a_notebook_draws_the_figure_that_a_cell_ends_with(tmp_path: Path) -> None:
    cell = "from curvlib import plots\n\nplots.figure()[0]"
    assert run_notebook(lesson(tmp_path / "00_figure.ipynb", cell), tmp_path / "run", "ci", 0).fault == ""
    outputs = [output for code in code_cells(read(tmp_path / "run" / "00_figure.ipynb")) for output in code.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1


def test_every_number_is_a_dot_on_its_names_line_and_an_estimate_has_its_interval() -> None:
    panels = {
        "harm, %": {"before": {"a": 20.0, "b": [30.0, 40.0]}, "after": {"b": Estimate(50.0, 45.0, 60.0, 8)}},
        "cost, s": {"": {"a": 1.0}},
    }
    left, right = plots.dots(panels).axes
    before, after = (bar.lines[0].get_xydata().tolist() for bar in left.containers)
    assert (before, after) == ([[20, -0.125], [30, 0.875], [40, 0.875]], [[50, 1.125]])
    np.testing.assert_allclose(whisker_ends(left)[-1], [45, 60])
    assert tick_labels(left.get_yticklabels()) == ["a", "b"]
    assert [text.get_text() for text in left.get_legend().texts] == ["before", "after"]
    assert (left.get_xlabel(), right.get_xlabel(), right.get_legend()) == ("harm, %", "cost, s", None)


def test_every_curve_has_its_line_and_its_band() -> None:
    (axes,) = plots.lines({"a": ([1, 2], [3, 4]), "b": ([1, 2], [5, 6], [4, 5], [7, 8])}, title="t", yscale="log").axes
    assert series(axes)["a"].tolist() == [[1, 3], [2, 4]]
    (band,) = (path.get_extents() for path in axes.collections[0].get_paths())
    assert (band.y0, band.y1) == (4, 8)
    assert (axes.get_title(loc="left"), axes.get_yscale()) == ("t", "log")
