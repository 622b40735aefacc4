"""Checks let right answers pass, meet each listed mistake with its own line, and are fooled by no constant."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from curvlib.errors import CurvlibError
from curvlib.exercises import assess, check, load, score
from curvlib.exercises.core import LAST, POINTS, Answer, LostError, check_of, close
from tests.exercises.cases import MISTAKES, PARAMETERS, ROOT, function

FREE = """
import sys
import curvlib.exercises.core as core
checks = [core.check_of(name) for name in core.load()]
print(sorted({name.partition(".")[0] for name in sys.modules if getattr(sys.modules[name], "__file__", None)}))
"""


def test_every_exercise_has_a_name_of_its_own_a_check_and_mistakes_with_a_line_each() -> None:
    assert MISTAKES.keys() == load().keys()
    assert len(load()) == sum(map(len, POINTS.values())) >= 35
    for name, mistakes in MISTAKES.items():
        assert len(mistakes) >= 3, name
        assert callable(check_of(name))


@pytest.mark.parametrize("name", MISTAKES)
def test_the_solution_passes(name: str) -> None:
    verdict = assess(name, Answer(function(name)))
    assert verdict, verdict
    assert str(verdict).startswith(f"✔ {name}: right, ")


@pytest.mark.parametrize(("name", "message", "old", "new"), PARAMETERS)
def test_a_mistake_is_met_with_its_own_line_at_each_seed(name: str, message: str, old: str, new: str) -> None:
    wrong = Answer(function(name, old, new))
    for seed in (0, 1, 123_456):
        verdict = assess(name, wrong, [seed])
        assert message in verdict.message
        assert verdict.earned < verdict.points


def first_argument(*arguments: Any) -> Any:
    return arguments[0] if arguments else 0.0


def shuffled_argument(*arguments: Any) -> Any:
    tensors = [each for each in arguments if isinstance(each, torch.Tensor)]
    return torch.randn_like(tensors[0].double()) if tensors else 0.5


IDLE = {
    "none": lambda *_: None,
    "zero": lambda *_: 0.0,
    "one": lambda *_: 1.0,
    "text": lambda *_: "refuses",
    "empty": lambda *_: [],
    "pair": lambda *_: (0.0, 1.0),
    "triple": lambda *_: (0.0, 0.0, 0.0),
    "first argument": first_argument,
    "noise": shuffled_argument,
}


@pytest.mark.parametrize("idle", IDLE)
def test_an_answer_that_does_nothing_earns_nothing(idle: str) -> None:
    for name in load():
        verdict = assess(name, Answer(IDLE[idle]), [0])
        assert verdict.earned == 0, (name, verdict)


def test_an_answer_cannot_spoil_the_numbers_of_its_check() -> None:
    def natural_step(g: torch.Tensor, G: torch.Tensor, tau: float) -> torch.Tensor:
        g.zero_()
        G.zero_()
        return g * tau

    assert not assess("natural_step", Answer(natural_step))


def test_a_kernel_prints_verdicts_and_points(capsys: pytest.CaptureFixture[str]) -> None:
    LAST.clear()
    assert check(function("bits_per_weight"))
    assert not check(function("wilson_interval", "", 'raise NotImplementedError("not yet")'))
    score("00")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["✔ bits_per_weight: right, 2 of 2 points", "✘ wilson_interval: not written yet"]
    assert lines.count("✘ wilson_interval: not written yet") == 2
    assert "✘ quantise: not checked yet" in lines
    assert lines[-1] == "2 of 14 points"


def test_an_error_is_told_with_its_type_and_its_line() -> None:
    verdict = assess("bits_per_weight", Answer(function("bits_per_weight", "return 4", "return missing + 4")))
    assert verdict.message.startswith("stopped with NameError: name 'missing' is not defined (line ")
    verdict = assess("pareto_front", Answer(function("pareto_front", "return front", "front = None")))
    assert verdict.message == "stopped with TypeError: 'NoneType' object is not iterable"  # in the check, so no line


def test_a_lost_answer_is_not_asked_again() -> None:
    calls: list[tuple[Any, ...]] = []

    def gone(*arguments: Any) -> None:
        calls.append(arguments)
        raise LostError("no answer within 5 seconds")

    assert assess("bits_per_weight", Answer(gone)).message == "no answer within 5 seconds"
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check(len), "no exercise is called len"),
        (lambda: check("quantise"), "give the function itself"),  # type: ignore[arg-type]
        (lambda: score("99"), "no exercises belong to notebook 99"),
    ],
)
def test_a_wrong_call_is_told_in_one_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises(CurvlibError, match=message):
        call()


def test_close_needs_the_shape_and_a_small_relative_error() -> None:
    assert close(torch.ones(3), [1, 1, 1])
    assert not close(torch.ones(3), torch.ones(1))
    assert not close(torch.ones(3), torch.ones(3) * (1 + 1e-5))
    assert not close(torch.tensor(float("nan")), 1.0)


def test_a_students_import_loads_neither_models_nor_notebook_tools() -> None:
    done = subprocess.run([sys.executable, "-c", FREE], cwd=ROOT, check=True, capture_output=True, text=True)
    modules = set(eval(done.stdout))
    heavy = {"transformers", "peft", "bitsandbytes", "datasets", "matplotlib", "scipy", "sklearn", "nbformat", "psutil"}
    assert "torch" in modules
    assert not modules & heavy
