"""Checks of notebook 05: the natural step, its line search, two projections, a control and the whole loop."""

import math
from itertools import pairwise

import torch
from torch import Generator, Tensor

from curvlib.exercises.core import Answer, Matvec, Probe, close, exercise, number, parts, refuse, require, tensor
from curvlib.exercises.draws import integer, positive, randn, uniform


def valley(generator: Generator) -> Tensor:
    """A 2 × 2 metric, steep across and flat along a direction that is neither axis."""
    angle = torch.tensor(uniform(generator, 0.3, 1.2), dtype=torch.float64)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
    return turn @ torch.diag(torch.tensor([10.0, 0.1], dtype=torch.float64)) @ turn.T


def along(vector: Tensor, direction: Tensor) -> bool:
    """Whether two vectors lie on one line."""
    return abs(float(vector @ direction)) > (1 - 1e-9) * float(vector.norm() * direction.norm())


@exercise(points=6)
def natural_step(answer: Answer, generator: Generator) -> None:
    """Against every direction of the plane, each as long as the allowance lets it be."""
    G, tau, turn = valley(generator), uniform(generator, 0.5, 0.9), uniform(generator, 0, 2 * math.pi)
    axes = torch.linalg.eigh(G).eigenvectors
    g = axes @ torch.tensor([1.0, uniform(generator, 0.5, 2.0)], dtype=torch.float64) * (1 if turn > math.pi else -1)
    step = tensor(answer(g, G, tau), 2)
    cost = float(step @ G @ step) / 2
    require(g @ step < 0, "the safety loss rises along it: the step goes against g")
    refuse(cost, "it spends half of tau: the task pays ½ δᵀGδ, hence a 2 under the root", tau / 2)
    refuse(step @ step / 2, "the length of δ is bounded: bound what the task pays, ½ δᵀGδ", tau)
    refuse(cost, "the factor 2τ / gᵀG⁻¹g needs a square root", 2 * tau**2 / float(g @ torch.linalg.solve(G, g)))
    require(close(cost, tau), f"it spends {cost:.3g} of task loss, {tau:.3g} is allowed: mind the step's length")
    require(not along(step, g), "that is the gradient's own direction: divide by the curvature, solve with G", earned=1)
    require(not along(step, G @ g), "g was multiplied by G: solve with it", earned=1)
    angles = torch.linspace(0, 2 * math.pi, 20_001, dtype=torch.float64)
    rays = torch.stack([angles.cos(), angles.sin()], dim=1)
    gains = -(rays @ g) * (2 * tau / ((rays @ G) * rays).sum(1)).sqrt()
    gain, most = -float(g @ step), float(gains.max())
    require(gain > 0.9999 * most, f"it buys {gain:.3g}, and another step {most:.3g} at the same price", earned=1)


class Trial(Probe):
    """Two losses on a line: safety falls by x, the protected loss jumps at a limit; ``log`` holds each x tried."""

    def __init__(self, theta: Tensor, unit: float, limit: float, lift: float = 0.0) -> None:
        super().__init__()
        self.theta, self.home, self.unit, self.limit, self.lift = theta, float(theta), unit, limit, lift

    def __call__(self) -> tuple[float, float]:
        """Safety loss and protected loss; both begin at 1."""
        x = (float(self.theta) - self.home) / self.unit
        self.log.append(x)
        return 1 - x + self.lift, 1.05 if x <= self.limit else 2.0


@exercise(points=6)
def line_search(answer: Answer, generator: Generator) -> None:
    """Steps that pass whole, at a quarter of the length, and never."""
    tau, home = uniform(generator, 0.5, 2.0), randn(generator, 1)

    def search(limit: float, lift: float = 0.0, rise: float = 0.1) -> tuple[float | None, float, list[float]]:
        theta = home.clone()
        trial = Trial(theta, math.sqrt(tau), limit, lift)
        value, left = answer.run(trial, theta, torch.ones(1, dtype=torch.float64), tau, 1.0, 1.0, rise, 4)
        moved = (float(left[1]) - float(home)) / math.sqrt(tau)
        return None if value is None else number(value), moved, left[0].log

    value, moved, tried = search(9)
    require(value is not None, "a good step was refused: compare the protected loss with where it STARTED")
    require(close(moved, 1), "a step that passes at once is taken whole")
    require(len(tried) == 1, f"{len(tried)} measurements where the first step passed: stop there")
    value, moved, tried = search(0.3)
    refuse(tried[1:2], "the second trial is 0.71 of the first: halve the step, not the allowance", [math.sqrt(0.5)])
    require(value is not None, "a step of a quarter would have passed: halve and try again")
    require(close(moved, 0.25), f"it went {moved:.3f} of the step: the step halves, 1, ½, ¼, until one passes")
    require(close(value, tau / 16), "return the allowance that passed: a quarter of the step is a sixteenth of tau")
    value, moved, tried = search(-1)
    require(value is None, "no step passed: return None")
    require(moved == 0, "no step passed: put the parameters back")
    require(len(tried) == 5, f"{len(tried)} trials: the whole step and four halvings are five")
    value, moved, _ = search(9, lift=5)
    require(value is None, "the safety loss did not fall: such a step must not pass, whatever the task says")


@exercise(points=4)
def orthogonal_step(answer: Answer, generator: Generator) -> None:
    """Two conditions: no change of the task to first order, and the correction lies along M⁻¹g."""
    M, g, step = positive(generator, 5), randn(generator, 5), randn(generator, 5)
    step += g * (1 - g @ step) / (g @ g)  # gᵀ step = 1
    value, across = tensor(answer(g, step, Matvec(M.inverse())), 5), torch.linalg.solve(M, g)
    slope = float(g @ value)
    refuse(slope, "gᵀδ has doubled: subtract the part along M⁻¹g", 2)
    refuse(value, "the correction has the right direction, not the right length: divide by gᵀM⁻¹g", step - across)
    require(abs(slope) < 1e-8, f"the task's loss still changes to first order: gᵀδ is {slope:.2g} and must be 0")
    require(not along(value - step, g), "that is the Euclidean projection: subtract along M⁻¹g, nearest in the metric")
    require(along(M @ (value - step), g), "not the nearest step in the metric: subtract along M⁻¹g and nothing else")


@exercise(points=4)
def weighted_return(answer: Answer, generator: Generator) -> None:
    """The gradient of what is minimised must vanish."""
    task, safety = positive(generator, 4), positive(generator, 4)
    tuned, c = randn(generator, 4), uniform(generator, 1, 3)
    value = tensor(answer(tuned, task, safety, 0.0), 4)
    require(close(value, tuned), "c = 0 must stay at the fine-tuned model: M_t θ_f belongs on the right-hand side")
    value = tensor(answer(tuned, task, safety, c), 4)
    require(not along(value, tuned), "all parameters shrink alike: the two metrics decide which ones return")
    swapped = safety @ (value - tuned) + c * task @ value
    require(swapped.norm() > 1e-8, "the metrics are swapped: M_t keeps the fine-tuning, M_s pulls back")
    slope = task @ (value - tuned) + c * safety @ value
    require(slope.norm() < 1e-8, "the gradient of ½(θ-θ_f)ᵀM_t(θ-θ_f) + c/2 θᵀM_sθ does not vanish there")


@exercise(points=3)
def random_control(answer: Answer, generator: Generator) -> None:
    """Length, direction and repetition."""
    step, seed = torch.zeros(2000, dtype=torch.float64), integer(generator, 0, 10**6)
    step[:10] = 3 + randn(generator, 10).abs()
    value, again, other = (tensor(answer(step, each), 2000) for each in (seed, seed, seed + 1))
    length, ratio = float(step.norm()), float(value.norm() / step.norm())
    require(torch.equal(value, again), "the same seed must give the same control: pass it to a generator")
    require(not torch.equal(value, other), "another seed must give another control")
    require((value != 0).double().mean() > 0.9, "it moves few entries: draw a fresh direction, do not flip or permute")
    require(not 40 < ratio < 50, f"it is {ratio:.0f} times as long as the step: divide the draw by its own length")
    require(close(ratio, 1), f"a control must be as long as the step: {length:.1f}, not {ratio * length:.1f}")
    require(abs(value @ step) < 0.15 * length**2, "it points along the step: a control has nothing to do with it")


class Task(Probe):
    """Two parameters: a safety loss that falls along (-1, -1), and a protected loss with curvature G."""

    def __init__(self, theta: Tensor, G: Tensor) -> None:
        super().__init__()
        self.theta, self.G = theta, G

    def gradient(self) -> Tensor:
        """Of the safety loss."""
        return torch.sigmoid(self.theta.sum() + 2) * torch.ones(2, dtype=torch.float64)

    def solve(self, vector: Tensor) -> Tensor:
        """G⁻¹ times the vector."""
        return self.G.inverse() @ vector

    def measure(self) -> tuple[float, float]:
        """Safety loss and protected loss at theta."""
        return float(torch.log1p((self.theta.sum() + 2).exp())), float(self.theta @ self.G @ self.theta / 2)


@exercise(points=10)
def restore(answer: Answer, generator: Generator) -> None:
    """The record of a run is compared with the losses at the parameters that it left."""
    theta, G = torch.zeros(2).double(), torch.diag(torch.tensor([uniform(generator, 80, 120), 1.0])).double()
    task, tau, rise = Task(theta, G), 0.01, uniform(generator, 0.9, 1.1)

    def run(goal: float, steps: int) -> tuple[list[float], list[float], Tensor]:
        log, left = answer.run(theta, task.gradient, task.solve, task.measure, tau, rise, goal, steps)
        require(isinstance(log, list | tuple) and log, "return a list of (safety, protected), one pair a step")
        pairs = [parts(pair, "safety", "protected") for pair in log]
        return [number(pair[0]) for pair in pairs], [number(pair[1]) for pair in pairs], left[0]

    safety, protected, end = run(1.2, 9)
    require(close([safety[0], protected[0]], task.measure()), "the record begins with the losses before the first step")
    require(len(safety) > 1, "no step was taken")
    require(all(b < a for a, b in pairwise(safety)), "an accepted step must lower the safety loss")
    drift = max(protected)
    require(drift <= rise + 1e-9, f"the protected loss rose by {drift:.2f} from the START, {rise:.2f} is allowed")
    there = Task(end, G).measure()
    require(close([safety[-1], protected[-1]], there), "the record does not end where the parameters are")
    require(safety[-1] <= 1.2, "it stopped early: go on until the goal is reached or no step passes")
    require(len(safety) <= 6, f"{len(safety) - 1} steps: after one that passed whole, double the allowance", earned=6)
    _, protected, _ = run(0.0, 30)
    drift = protected[-1]
    require(drift <= rise + 1e-9, "with no goal in reach it must stop at the allowance from the START", earned=6)
