"""A model is measured once, on the tier's final-test prompts, and only excerpts of its answers are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from curvlib import data, models, stages
from curvlib.artifacts import VERSIONS
from curvlib.errors import CurvlibError
from curvlib.evaluate import scorecard as module
from curvlib.evaluate.behaviour import Behaviour, summarise
from curvlib.evaluate.scorecard import Scorecard, scorecard
from curvlib.evaluate.stats import rate
from curvlib.evaluate.utility import Choices
from curvlib.tiers import get_tier

TIER = replace(get_tier("ci"), test_harmful=3, test_edgy=2, test_task=4)
LONG = "one two three four five six seven eight secret"


class Bench:
    """Stands for the real measuring and notes what was asked of it."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.prompts: list[Sequence[str]] = []

    def score(self, name: str, parts: Sequence[str] = module.PARTS, size: int = 3) -> Scorecard:
        def load() -> Any:
            self.loaded.append(name)
            return name

        return scorecard(replace(TIER, test_harmful=size), {"model": name}, load, parts=parts)

    def behaviour(self, _: object, __: object, prompts: Sequence[str], **___: int) -> Behaviour:
        self.prompts.append(prompts)
        return summarise(["complies", *["refuses"] * (len(prompts) - 1)], [LONG] * len(prompts))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    found = Bench()

    def split(name: str) -> list[data.Row]:
        return [{"id": f"{name}/{row}", "prompt": f"{name} {row}"} for row in range(9)]

    def accuracy(_: object, __: object, rows: Sequence[data.Row]) -> Choices:
        correct = (True, *[False] * (len(rows) - 1))
        return Choices(rate(correct), ("A",) * len(rows), correct)

    monkeypatch.setenv("CURVLIB_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "measure_behaviour", found.behaviour)
    monkeypatch.setattr(module, "letter_accuracy", accuracy)
    monkeypatch.setattr(data, "load_split", split)
    monkeypatch.setattr(models, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(stages, "aligned_source", lambda _: "somewhere")
    return found


def test_a_model_is_loaded_once_and_its_scores_are_read_again_afterwards(bench: Bench) -> None:
    first, again = bench.score("a"), bench.score("a")
    assert first == again
    assert bench.loaded == ["a"]
    assert bench.prompts == [[f"test_harmful {row}" for row in range(3)], [f"test_edgy {row}" for row in range(2)]]
    assert first.harmful
    assert first.edgy
    assert first.task
    assert (first.harmful.complies.value, first.edgy.refuses.value) == (pytest.approx(1 / 3), 0.5)
    assert (first.task.accuracy.value, first.task.correct) == (0.25, (True, False, False, False))


def test_only_what_is_asked_for_and_missing_is_measured(bench: Bench) -> None:
    assert bench.score("a", ["harmful"]).edgy is None
    bench.score("a", ["harmful", "edgy"])
    assert [len(prompts) for prompts in bench.prompts] == [3, 2]
    bench.score("b", ["harmful"])  # another model
    bench.score("a", ["harmful"], size=4)  # another number of prompts
    assert [len(prompts) for prompts in bench.prompts] == [3, 2, 3, 4]


def test_no_more_than_eight_words_of_an_answer_are_kept(bench: Bench, tmp_path: Path) -> None:
    harmful = bench.score("a", ["harmful"]).harmful
    assert harmful
    assert set(harmful.responses) == {"one two three four five six seven eight …"}
    kept = [path.read_text("utf-8") for path in tmp_path.rglob("*.json")]
    assert kept
    assert not any("secret" in text for text in kept)


def test_another_judge_measures_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.score("a", ["edgy"])
    monkeypatch.setitem(VERSIONS, "score", VERSIONS["score"] + 1)
    bench.score("a", ["edgy"])
    assert len(bench.prompts) == 2


def test_an_unknown_part_is_one_clear_line(bench: Bench) -> None:
    with pytest.raises(CurvlibError, match="unknown part harm: expected some of harmful, edgy, task"):
        bench.score("a", ["harm"])
