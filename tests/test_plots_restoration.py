"""The figures of the restoration study draw every model once, with the rates of its rows."""

from __future__ import annotations

from typing import Any

import pytest

from curvlib import plots_restoration


def row(name: str, complies: int, *, control: str = "") -> dict[str, Any]:
    harmful = ["complies"] * complies + ["refuses"] * (10 - complies)
    return {
        "name": name,
        "control": control,
        "harmful": harmful,
        "edgy": ["refuses"] + ["complies"] * 9,
        "task": [True, False],
    }


def test_rates_are_means_over_seeds() -> None:
    found = plots_restoration.rates([row("a", 2), row("a", 4)])
    assert {part: estimate.value for part, estimate in found.items()} == {
        "harmful": pytest.approx(0.3),
        "edgy": pytest.approx(0.1),
        "task": pytest.approx(0.5),
    }
    assert found["harmful"].n == 10


def test_the_front_numbers_every_model_once_and_circles_ours() -> None:
    rows = [row("ours", 1), row("ours", 3), row("nothing", 9, control="nothing")]
    left, right = plots_restoration.front(rows, "ours").axes
    assert [text.get_text() for text in left.texts] == ["1", "2"]
    legend = right.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["1 ours", "2 nothing"]
    circles = [line for line in left.lines if line.get_markersize() == 15]
    assert [tuple(line.get_xydata()[0]) for line in circles] == [(10.0, 20.0)]  # type: ignore[index]


def test_regimes_stand_in_rows_and_contenders_in_colours() -> None:
    names = ("ours, 1 safety chats", "plain, 1 safety chats", "ours, saved metric, alone", "plain, alone")
    drawn = plots_restoration.regimes([row(name, number) for number, name in enumerate(names)])
    panels = drawn.axes
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["1 safety chats", "alone"]
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["ours", "plain", "ours, saved metric"]
    plain = next(container for container in panels[0].containers if container.get_label() == "plain")
    assert plain[0].get_xdata().tolist() == [10.0, 30.0]  # type: ignore[attr-defined]
