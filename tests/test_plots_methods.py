"""The figures draw what they are given, every method once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from curvlib import plots_methods
from curvlib.report import Claim

RATES = ("harmful_compliance", "over_refusal", "task_accuracy")


def row(name: str, stage: str, value: float) -> dict[str, Any]:
    ends = {f"{rate}_{end}": value + by for rate in RATES for end, by in (("low", -0.1), ("high", 0.1))}
    return {"name": name, "stage": stage, **dict.fromkeys(RATES, value), **ends}


def test_the_pareto_figure_numbers_every_method_and_circles_ours() -> None:
    rows = [
        row("plain", "reference", 0.9),
        row("a", "during", 0.5),
        row("b", "after", 0.2),
        row("c", "quantisation", 0.4),
    ]
    left, right = plots_methods.pareto(rows, "b").axes
    labels = {text.get_text(): text.xy[0] for text in left.texts}  # type: ignore[attr-defined]
    assert labels == pytest.approx({"1": 90, "2": 50, "3": 20, "4": 40})
    legend = right.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["1 plain", "2 a", "3 b", "4 c"]
    circles = [line for line in left.lines if line.get_markersize() == 14]
    assert [tuple(line.get_xydata()[0]) for line in circles] == [(20.0, 20.0)]  # type: ignore[index]


def test_methods_that_coincide_share_a_label_that_fits_the_panel() -> None:
    left, right = plots_methods.pareto([row(str(number), "after", 0.5) for number in range(1, 21)], "1").axes
    assert [text.get_text() for text in left.texts] == ["1–20"]
    assert left.title.get_window_extent().count_overlaps([right.title.get_window_extent()]) == 0


def test_no_label_of_crowded_points_covers_another_or_a_point() -> None:
    harms = (0.5, 0.42, 0.34, 0.26, 0.42)
    rows = [{**row(str(harm), "after", harm), "over_refusal": 0.2 + 0.01 * n} for n, harm in enumerate(harms)]
    left, _ = plots_methods.pareto(rows, "0.5").axes
    boxes = [text.get_window_extent() for text in left.texts]
    points = left.transData.transform([text.xy for text in left.texts])  # type: ignore[attr-defined]
    assert len(boxes) == len(harms)
    for number, box in enumerate(boxes):
        assert box.count_overlaps(boxes[:number]) == 0
        assert not any(box.contains(*point) for point in points)
        own, others = points[number], np.delete(points, number, axis=0)
        ways = np.linalg.norm(np.mean(box, axis=0) - others, axis=1)
        assert np.linalg.norm(np.mean(box, axis=0) - own) < ways.min()


def test_the_kinds_figure_has_a_line_a_method_and_a_point_a_kind() -> None:
    rows = [{**row(name, "after", harm), "part": part} for part, harm in (("10", 0.5), ("0", 0.2)) for name in "ab"]
    left, right = plots_methods.kinds(rows, "b").axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["a", "b"]
    legend = left.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["10", "0"]
    for axes in (left, right):
        found = [np.asarray(container.lines[0].get_xydata()) for container in axes.containers]  # type: ignore[union-attr]
        assert [points[:, 0].tolist() for points in found] == [[50.0, 50.0], [20.0, 20.0]]
        assert found[0][:, 1].tolist() == [-0.25, 0.75], "each kind has its own height beside the method's"


def test_claims_in_other_units_are_left_out() -> None:
    claims = [Claim("rise_points", "s", 5.0, 1.0, 9.0, 0.0, 3, True), Claim("kappa", "s", 0.5, 0.1, 0.9, 0.0, 3, True)]
    (axes,) = plots_methods.claims_in_points(claims).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["rise_points"]
    assert axes.collections[-1].get_offsets()[0].tolist() == pytest.approx([0.0, 0.0])  # type: ignore[index]
