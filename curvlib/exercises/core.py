"""What an exercise is, how an answer is checked, and what is printed: the same under an exercise and in grading."""

import copy
import importlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from curvlib.errors import CurvlibError


class WrongError(Exception):
    """An answer is wrong, for the reason that the message gives; ``earned`` points are given all the same."""

    def __init__(self, message: str, earned: int = 0) -> None:
        super().__init__(message)
        self.earned = earned


class RemoteError(Exception):
    """What a learner's function raised in another process, in that process's words."""


class LostError(Exception):
    """The process that holds the answers is gone: it was too slow, or it ended itself."""


class Answer:
    """A learner's function. It gets copies, so it can spoil neither the check's numbers nor the next call."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        """The function's result."""
        return self.run(*arguments)[0]

    def run(self, *arguments: Any) -> tuple[Any, Sequence[Any]]:
        """The function's result, and the arguments as it left them."""
        copies = copy.deepcopy(arguments)
        return self.function(*copies), copies


class Probe:
    """A callable argument that travels to another process, so it is a class at module level; ``log`` comes back."""

    def __init__(self) -> None:
        self.log: list[Any] = []


class Matvec(Probe):
    """A matrix that is only seen through its products; ``log`` holds the vectors that it met."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix

    def __call__(self, vector: Tensor) -> Tensor:
        """The product."""
        self.log.append(vector.tolist())
        return self.matrix @ vector


Check = Callable[[Answer, Generator], None]


@dataclass(frozen=True)
class Exercise:
    """A function that a learner writes: its name, the number of its notebook, its points and its check."""

    name: str
    notebook: str
    points: int
    check: Check


@dataclass(frozen=True)
class Verdict:
    """What a check found: points earned of so many, and one line. It is true where all were earned."""

    name: str
    earned: int
    points: int
    message: str

    def __bool__(self) -> bool:
        return self.earned == self.points

    def __str__(self) -> str:
        return f"{'✔' if self else '✘'} {self.name}: {self.message}"

    def _ipython_display_(self) -> None:
        """Show nothing at the end of a cell, where check has printed the line."""


REGISTRY: dict[str, Exercise] = {}
LAST: dict[str, Verdict] = {}  # of this kernel, for score


def exercise(points: int) -> Callable[[Check], Check]:
    """Register a check under the name of the function that it checks."""

    def register(checked: Check) -> Check:
        name, module = checked.__name__, checked.__module__.rpartition(".")[2]
        if name in REGISTRY and REGISTRY[name].check.__module__ != checked.__module__:
            raise ValueError(f"two exercises are called {name}: names are one list over all notebooks")
        REGISTRY[name] = Exercise(name, module[1:3], points, checked)
        return checked

    return register


def load(*notebooks: str) -> dict[str, Exercise]:
    """All exercises by name, or those of the notebooks with these numbers.

    >>> "wilson_interval" in load("00")
    True
    """
    for path in sorted(Path(__file__).parent.glob("e[0-9]*.py")):
        importlib.import_module(f"curvlib.exercises.{path.stem}")
    if missing := set(notebooks) - {exercise.notebook for exercise in REGISTRY.values()}:
        known = ", ".join(sorted({exercise.notebook for exercise in REGISTRY.values()}))
        raise CurvlibError(f"no exercises belong to notebook {', '.join(sorted(missing))}: expected one of {known}")
    return {name: ex for name, ex in REGISTRY.items() if not notebooks or ex.notebook in notebooks}


def assess(name: str, answer: Answer, seeds: Sequence[int] = range(3)) -> Verdict:
    """Check an answer on the numbers that each seed draws; the worst verdict counts."""
    task = load()[name]
    worst = Verdict(name, task.points, task.points, f"right, {task.points} of {task.points} points")
    for seed in seeds:
        try:
            task.check(answer, Generator().manual_seed(seed))
        except NotImplementedError:
            return Verdict(name, 0, task.points, "not written yet")
        except LostError as lost:  # the next seed would wait for as long again
            return Verdict(name, 0, task.points, str(lost))
        except WrongError as wrong:
            verdict = Verdict(name, wrong.earned, task.points, str(wrong))
        except Exception as error:  # whatever a learner's code raises
            verdict = Verdict(name, 0, task.points, f"stopped with {describe(error, name)}")
        else:
            continue
        worst = min(worst, verdict, key=lambda each: each.earned)
    return worst


def describe(error: BaseException, name: str) -> str:
    """One line for an error: its type, its text, and the line of the function of this name where it arose."""
    if isinstance(error, RemoteError):
        return str(error)
    text = " ".join(str(error).split())[:200]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name == name]
    place = f" (line {frames[-1].lineno} of the cell: {frames[-1].line})" if frames else ""
    return f"{type(error).__name__}: {text}{place}"


def check(answer: Callable[..., Any]) -> Verdict:
    """Check the answer to the exercise of its name and print one line; the verdict is true if all is right."""
    name = getattr(answer, "__name__", repr(answer))
    if name not in load():
        raise CurvlibError(f"no exercise is called {name}: give the function itself, one of {', '.join(REGISTRY)}")
    LAST[name] = assess(name, Answer(answer))
    print(LAST[name])
    return LAST[name]


def score(notebook: str) -> None:
    """Print the verdicts and the points of a notebook's exercises, as far as they were checked in this kernel."""
    tasks = load(notebook)
    for name in tasks:
        print(LAST.get(name, f"✘ {name}: not checked yet"))
    earned = sum(LAST[name].earned for name in tasks if name in LAST)
    print(f"{earned} of {sum(task.points for task in tasks.values())} points")


def require(condition: object, message: str, earned: int = 0) -> None:
    """Raise WrongError with this message unless the condition holds."""
    if not condition:
        raise WrongError(message, earned)


def refuse(value: Any, message: str, *mistakes: Any, earned: int = 0) -> None:
    """Raise WrongError with this message where the value is what one of these mistakes gives."""
    require(not any(close(value, each) for each in mistakes), message, earned)


@contextmanager
def hint(phrase: str, message: str) -> Iterator[None]:
    """Replace an error whose text holds the phrase by WrongError with this message."""
    try:
        yield
    except Exception as error:
        if phrase in str(error):
            raise WrongError(message) from error
        raise


def close(value: Any, target: Any, tolerance: float = 1e-6) -> bool:
    """Whether two tensors or numbers have one shape and differ by this relative error at most."""
    value, target = (torch.as_tensor(each, dtype=torch.float64).detach() for each in (value, target))
    return value.shape == target.shape and bool((value - target).norm() <= tolerance * max(1e-3, float(target.norm())))


def tensor(value: Any, *shape: int) -> Tensor:
    """The answer as float64 numbers of this shape, all finite; a list or an array will do, too."""
    require(value is not None, "returned None: is there a return?")
    try:
        array = torch.as_tensor(value, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError):
        raise WrongError(f"returned {type(value).__name__}, expected numbers of shape {shape}") from None
    require(array.shape == shape, f"returned shape {tuple(array.shape)}, expected {shape}")
    require(array.isfinite().all(), "returned numbers that are not finite")
    return array


def number(value: Any) -> float:
    """The answer as one finite number."""
    return float(tensor(value))


def parts(value: Any, *names: str) -> Sequence[Any]:
    """The answer as a tuple of as many parts as there are names."""
    require(value is not None, "returned None: is there a return?")
    right = isinstance(value, tuple | list) and len(value) == len(names)
    require(right, f"returned {type(value).__name__}, expected a tuple: {', '.join(names)}")
    return tuple(value)
