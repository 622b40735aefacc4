"""The protocol on a tiny model: a cell is measured once, trials meet validation, and only the best is tested."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from curvlib import data
from curvlib.defenses import protocol, study
from curvlib.defenses.linear import LINEAR
from curvlib.defenses.method import Defended, Setting
from curvlib.defenses.protocol import Cell, cell
from curvlib.defenses.registry import METHODS
from curvlib.errors import CurvlibError
from curvlib.evaluate import scorecard
from tests.defenses.tiny import BENIGN, HARMFUL, RECIPE, TIER, setting, tiny  # noqa: F401  a fixture

QUESTION = data.Example("q", "one two", answer="B", options={"A": "red", "B": "blue"})
FIRST = LINEAR.trials[0]


@pytest.fixture
def splits(tiny: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:  # noqa: ARG001, F811
    """Tiny splits; the names of those that were read."""
    read: list[str] = []

    def load(name: str) -> list[data.Example]:
        read.append(name)
        prompts = HARMFUL if "harmful" in name else BENIGN
        return [QUESTION] * 3 if "task" in name else [data.Example(p, p) for p in prompts]

    monkeypatch.setenv("CURVLIB_CACHE", str(tmp_path))
    monkeypatch.setattr(data, "load_split", load)
    monkeypatch.setattr(protocol, "setting_of", lambda *_: setting())
    return read


def test_a_cell_is_measured_once_and_keeps_no_answer(splits: list[str], tmp_path: Path) -> None:
    found = cell(TIER, LINEAR, RECIPE, FIRST)
    assert (found.method, found.trial, found.poison, found.seed) == ("linear merge", FIRST, 0.1, 0)
    assert (len(found.harmful), len(found.edgy), len(found.task)) == (3, 2, 2)
    assert {*found.harmful, *found.edgy} <= {"complies", "refuses", "incoherent"}
    assert set(splits) == {"test_harmful", "test_edgy", "test_task"}
    splits.clear()
    assert cell(TIER, LINEAR, RECIPE, FIRST) == found
    assert splits == []
    kept = "".join(path.read_text() for path in tmp_path.rglob("cell.json"))
    assert not any(prompt in kept for prompt in HARMFUL)


@pytest.mark.usefixtures("splits")
def test_the_clock_does_not_run_while_the_model_is_loaded() -> None:
    loaded: list[bool] = []

    def apply(given: Setting, **_: Any) -> Defended:
        loaded.append("_tuned" in vars(given))
        return Defended(given.tuned())

    cell(TIER, replace(LINEAR, apply=apply), RECIPE, FIRST)
    assert loaded == [True]


@pytest.mark.usefixtures("splits")
def test_another_recipe_judge_or_trial_is_another_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[float] = []
    counting = replace(LINEAR, apply=watch(LINEAR.apply, made))
    changes: list[Any] = [{}, {"recipe": replace(RECIPE, seed=1)}, {"trial": LINEAR.trials[1]}, {"tier": TIER}]
    given = {"tier": TIER, "method": counting, "recipe": RECIPE, "trial": FIRST}
    for change in changes:
        cell(**{**given, **change})
    assert made == [0.6, 0.6, 0.4]
    monkeypatch.setattr(scorecard, "INSTRUMENT", ("judge",))
    cell(**given)
    assert len(made) == 4


def watch(apply: Any, made: list[float]) -> Any:
    def watched(given: Setting, share: float) -> Defended:
        made.append(share)
        found: Defended = apply(given, share)
        return found

    watched.__module__ = apply.__module__
    return watched


def test_the_search_reads_validation_and_takes_the_best(splits: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    worth = {0.6: 0.2, 0.4: 0.9, 0.8: 0.9}
    measured = cell(TIER, LINEAR, RECIPE, FIRST, "validation")
    assert set(splits) == {"validation_harmful", "validation_edgy", "validation_task"}
    assert (len(measured.harmful), len(measured.task)) == (2, 2)

    def fake(*given: Any) -> Any:
        assert given[2:] == (protocol.SEARCHED, given[3], "validation")
        right = [True] * round(10 * worth[given[3]["share"]])
        return replace(measured, harmful=("complies",), edgy=("complies",), task=right + [False] * (10 - len(right)))

    monkeypatch.setattr(protocol, "cell", fake)
    monkeypatch.setattr(study, "METHODS", {LINEAR.name: LINEAR})
    rows = [{"part": "search", **row} for row in study.search_rows(TIER)]
    assert study.chosen(LINEAR.name, rows) == {"share": 0.4}
    assert [row["trial"] for row in study.search_rows(TIER, rows[1:])] == [FIRST]


def test_the_score_rewards_selective_refusals_and_the_task() -> None:
    found = Cell(
        "m", {}, 0.1, 0, 0, 0.0, ("refuses", "complies"), ("refuses", "complies", "complies", "complies"), (True,)
    )
    assert found.score == pytest.approx(0.5 - 0.25 + 1.0)


def test_a_foreign_trial_is_one_line() -> None:
    with pytest.raises(CurvlibError, match="linear merge has no trial"):
        cell(TIER, LINEAR, RECIPE, {"share": 0.123})


def test_the_digest_covers_what_a_method_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []
    monkeypatch.setattr(protocol, "code_digest", lambda files: seen.extend(files) or "code")
    for name, wanted in (
        ("linear merge", {"linear.py", "directions.py", "method.py", "judge.py"}),
        ("Q-realign W4", {"qrealign.py", "quantiser.py", "layers.py"}),
        ("restoration (ours)", {"loop.py", "metrics.py", "outcome.py", "realign.py"}),
    ):
        seen.clear()
        protocol.code(METHODS[name])
        assert wanted <= {path.name for path in seen}
        assert "study.py" not in {path.name for path in seen}
        assert ("loop.py" in {path.name for path in seen}) == (name == "restoration (ours)")
