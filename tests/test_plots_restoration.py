"""The figures of the restoration study draw every model once, with the rates of its rows."""

from __future__ import annotations

from typing import Any

import pytest

from curvlib import plots_restoration
from curvlib.restore.outcome import Budget


def row(name: str, complies: int, *, control: str = "") -> dict[str, Any]:
    harmful = ["complies"] * complies + ["refuses"] * (10 - complies)
    return {
        "name": name,
        "seed": 0,
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


def test_regimes_stand_in_rows_and_contenders_in_colours() -> None:
    names = ("ours, 1 safety chats", "plain, 1 safety chats", "ours, saved metric, alone", "plain, alone")
    drawn = plots_restoration.regimes([row(name, number) for number, name in enumerate(names)])
    panels = drawn.axes
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["1 safety chats", "alone"]
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["ours", "plain", "ours, saved metric"]
    plain = next(container for container in panels[0].containers if container.get_label() == "plain")
    assert plain[0].get_xdata().tolist() == [10.0, 30.0]  # type: ignore[attr-defined]


def test_the_contest_pools_seeds_and_circles_ours() -> None:
    rows = [row("ours", 0), row("ours", 2), row("start", 10), row("start", 8)]
    left = plots_restoration.contest(rows, "ours", ["start"]).axes[0]
    points = {line.get_marker(): line.get_xydata().tolist() for line in left.lines if line.get_markersize() != 14}
    assert points["o"] == [[10.0, 10.0]]
    assert points["P"] == [[10.0, 90.0]]
    circle = next(line for line in left.lines if line.get_markersize() == 14)
    assert circle.get_xydata().tolist() == [[10.0, 10.0]]


def test_each_model_has_a_line_with_what_is_left_of_its_persona() -> None:
    rows = [
        {**row(name, 1), "persona": [True] * kept + [False] * (4 - kept)}
        for name, kept in (("a", 4), ("a", 2), ("b", 0))
    ]
    panels = plots_restoration.learned(rows).axes
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["a", "b"]
    assert panels[2].containers[0][0].get_xdata().tolist() == [75.0, 0.0]  # type: ignore[attr-defined]


def test_the_screening_is_a_table_with_gaps() -> None:
    names = ("refusal, identity", "refusal, ggn", "return, ggn", "re-alignment")
    (axes,) = plots_restoration.screening(
        [{"name": name, "score": 0.5 * place} for place, name in enumerate(names)]
    ).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["refusal", "return"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["identity", "ggn"]
    places = {text.get_text(): tuple(text.xy) for text in axes.texts}  # type: ignore[attr-defined]
    assert places == {"0.00": (0, 0), "0.50": (1, 0), "1.00": (1, 1), "not run": (0, 1)}


def test_the_chart_frames_the_chosen_budget() -> None:
    rows = [row("τ 0.05, λ 1", 3), row("τ 0.5, λ 1", 6), row("4 safety chats", 1)]
    panels = plots_restoration.trust_and_damping(rows, Budget()).axes
    assert [axes.get_title("left") for axes in panels] == [label for _, label in plots_restoration.AXES.values()]
    assert [text.get_text() for text in panels[0].texts] == ["30", "60"]
    assert [text.get_bbox_patch() is not None for text in panels[0].texts] == [True, False]


def test_attacks_stand_in_rows_and_models_in_colours() -> None:
    models = {"ours": 1, "re-alignment": 5}
    rows = [
        {
            "name": name,
            "seed": 0,
            "part": "attacks",
            "begun with 'So, I'": row(name, n)["harmful"],
            "relearnt": ["complies"] * 4,
        }
        for name, n in models.items()
    ]
    drawn = plots_restoration.attacks(rows)
    (axes,) = drawn.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["begun with 'So, I'", "relearnt"]
    found = {container.get_label(): container[0].get_xdata().tolist() for container in axes.containers}  # type: ignore[attr-defined]
    assert found == {"ours": [10.0, 100.0], "re-alignment": [50.0, 100.0]}
