"""What an exercise is, how an answer is checked, and what is printed: the same under an exercise and in grading."""

import copy
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvlib.errors import CurvlibError

# Notebook -> exercise -> points. A name is unique over all notebooks; eNN_*.py has a check of the same name.
POINTS = {
    "00": {"nf4_levels": 4, "quantise": 5, "bits_per_weight": 2, "wilson_interval": 3},
    "01": {"answer_loss": 6, "lora_forward": 3, "paired_interval": 5, "cohen_kappa": 3, "judge": 6, "token_kl": 3},
    "02": {"hessian_product": 6, "ggn_product": 8, "conjugate_gradient": 8, "hutchinson_trace": 4},
    "03": {"row_normalised": 3, "without_bowl": 5, "slice_2d": 5, "subspace_overlap": 5, "unrelated_null": 5},
    "04": {"leave_one_out": 3, "influence_scores": 6, "woodbury_solve": 7, "auroc": 3, "datamodeling_score": 5},
    "05": {"natural_step": 6, "line_search": 6, "orthogonal_step": 4, "weighted_return": 4, "random_control": 3}
    | {"restore": 10},
    "06": {"refusal_direction": 3, "ablate": 3, "margin_step": 6, "depth_ratio": 5, "relearning_area": 4},
    "07": {"slerp": 3, "dare": 3, "pareto_front": 5, "projected_update": 4, "claim_status": 2},
    "08": {"ddim_step": 4, "erase_gradient": 3, "hypergradient": 5, "unrolled_gradient": 4},
}


class WrongError(Exception):
    """An answer is wrong, for the reason that the message gives; ``earned`` points are given all the same."""

    def __init__(self, message: str, earned: int = 0) -> None:
        super().__init__(message)
        self.earned = earned


class LostError(Exception):
    """The process that holds the answers is gone: it was too slow, or it ended itself."""


class Draw(torch.Generator):
    """The small random numbers of a case, in float64; it is also the generator that torch's own draws take."""

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(*shape, generator=self, dtype=torch.float64)

    def uniform(self, low: float, high: float) -> float:
        """One number between two bounds."""
        return low + (high - low) * float(torch.rand((), generator=self, dtype=torch.float64))

    def integer(self, low: int, high: int) -> int:
        """One integer from low to high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self))

    def positive(self, size: int) -> Tensor:
        """A symmetric positive definite matrix that lies along no axis."""
        root = self.normal(size, size)
        return root @ root.T / size + 0.2 * torch.eye(size, dtype=torch.float64)

    def valley(self) -> tuple[Tensor, Tensor]:
        """A matrix (2, 2) with eigenvalues 10 and 0.1 that lies along no axis, and a vector between its axes."""
        angle = torch.tensor(self.uniform(0.3, 1.2), dtype=torch.float64)
        axes = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
        between = torch.tensor([1.0, self.uniform(0.5, 2.0)], dtype=torch.float64) * (-1) ** self.integer(0, 1)
        return axes @ torch.tensor([10.0, 0.1], dtype=torch.float64).diag() @ axes.T, axes @ between


class Probe:
    """A callable argument that travels to another process; ``log`` holds each call's arguments, then its result.

    The function stands at module level. Its first arguments are fixed, and may be arguments of the answer as well.
    """

    def __init__(self, function: Callable[..., Any], *fixed: Any) -> None:
        self.function, self.fixed, self.log = function, fixed, list[list[Any]]()

    def __call__(self, *arguments: Any) -> Any:
        """The function's result."""
        result = self.function(*self.fixed, *arguments)
        self.log.append([torch.as_tensor(each, dtype=torch.float64).tolist() for each in (*arguments, result)])
        return result


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


LAST: dict[str, Verdict] = {}  # of this kernel, for score


def load(*notebooks: str) -> dict[str, int]:
    """The points of each exercise, or of those of the notebooks with these numbers.

    >>> load("00")["wilson_interval"]
    3
    """
    if missing := set(notebooks) - POINTS.keys():
        raise CurvlibError(f"no exercises belong to notebook {', '.join(missing)}: expected one of {', '.join(POINTS)}")
    return {name: points for number in notebooks or POINTS for name, points in POINTS[number].items()}


def check_of(name: str) -> Callable[[Answer, Draw], None]:
    """The check of this exercise, from the module of its notebook."""
    notebook = next(number for number, points in POINTS.items() if name in points)
    [module] = Path(__file__).parent.glob(f"e{notebook}_*.py")
    found: Callable[[Answer, Draw], None] = getattr(import_module(f"curvlib.exercises.{module.stem}"), name)
    return found


def assess(name: str, answer: Answer, seeds: Sequence[int] = range(3)) -> Verdict:
    """Check an answer on the numbers that each seed draws; the worst verdict counts."""
    points, draw = load()[name], Draw()
    worst = Verdict(name, points, points, f"right, {points} of {points} points")
    for seed in seeds:
        draw.manual_seed(seed)
        try:
            check_of(name)(answer, draw)
        except NotImplementedError:
            return Verdict(name, 0, points, "not written yet")
        except LostError as lost:  # the next seed would wait for as long again
            return Verdict(name, 0, points, str(lost))
        except Exception as error:  # whatever a learner's code raises
            wrong = error if isinstance(error, WrongError) else WrongError(f"stopped with {describe(error, name)}")
            worst = min(worst, Verdict(name, wrong.earned, points, str(wrong)), key=lambda each: each.earned)
    return worst


def describe(error: BaseException, name: str) -> str:
    """One line for an error: its type, its text, and the line of the learner's function where it arose."""
    text, stack = " ".join(str(error).split())[:200], traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in stack if frame.name == name and Path(frame.filename).parent != Path(__file__).parent]
    place = f" (line {frames[-1].lineno} of the cell: {frames[-1].line})" if frames else ""
    return f"{type(error).__name__}: {text}{place}"


def check(answer: Callable[..., Any]) -> Verdict:
    """Check the answer to the exercise of its name and print one line; the verdict is true if all is right."""
    name = getattr(answer, "__name__", repr(answer))
    if name not in load():
        raise CurvlibError(f"no exercise is called {name}: give the function itself, one of {', '.join(load())}")
    LAST[name] = assess(name, Answer(answer))
    print(LAST[name])
    return LAST[name]


def score(notebook: str) -> None:
    """Print the verdicts and the points of a notebook's exercises, as far as they were checked in this kernel."""
    points = load(notebook)
    for name in points:
        print(LAST.get(name, f"✘ {name}: not checked yet"))
    print(f"{sum(LAST[name].earned for name in points if name in LAST)} of {sum(points.values())} points")


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
        require(phrase not in str(error), message)
        raise


def close(value: Any, target: Any, tolerance: float = 1e-6) -> bool:
    """Whether two tensors or numbers have one shape and differ by this relative error at most."""
    value, target = (torch.as_tensor(each, dtype=torch.float64).detach() for each in (value, target))
    return value.shape == target.shape and bool((value - target).norm() <= tolerance * max(1e-3, float(target.norm())))


def along(vector: Tensor, direction: Tensor) -> bool:
    """Whether two vectors lie on one line."""
    return abs(float(vector @ direction)) > (1 - 1e-9) * float(vector.norm() * direction.norm())


def rays(M: Tensor) -> tuple[Tensor, Tensor]:
    """20,001 directions v of the plane, all the way round, and the price ½ vᵀMv of each."""
    angles = torch.linspace(0, 2 * torch.pi, 20_001, dtype=torch.float64)
    ways = torch.stack([angles.cos(), angles.sin()], dim=1)
    return ways, (ways @ M * ways).sum(1) / 2


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


def parts(value: Any, /, **shapes: tuple[int, ...]) -> list[Tensor]:
    """The answer as a tuple with a part of this shape for each name; the shape of a number is ()."""
    require(value is not None, "returned None: is there a return?")
    right = isinstance(value, tuple | list) and len(value) == len(shapes)
    require(right, f"returned {type(value).__name__}, expected a tuple: {', '.join(shapes)}")
    return [tensor(part, *shape) for part, shape in zip(value, shapes.values(), strict=True)]
