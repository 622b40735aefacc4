"""Checks of notebook 05: the natural step, its line search, two projections, a control and the whole loop."""

import math
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from curvlib.exercises.core import Answer, Draw, Probe, along, close, number, rays, refuse, require, tensor


def natural_step(answer: Answer, draw: Draw) -> None:
    """Against every direction of the plane, each as long as the allowance lets it be."""
    (G, g), tau = draw.valley(), draw.uniform(0.5, 0.9)
    step = tensor(answer(g, G, tau), 2)
    cost = float(step @ G @ step) / 2
    require(g @ step < 0, "the safety loss rises along it: the step goes against g")
    refuse(cost, "it spends half of tau: the task pays ½ δᵀGδ, hence a 2 under the root", tau / 2)
    refuse(step @ step / 2, "the length of δ is bounded: bound what the task pays, ½ δᵀGδ", tau)
    refuse(cost, "the factor 2τ / gᵀG⁻¹g needs a square root", 2 * tau**2 / float(g @ torch.linalg.solve(G, g)))
    require(close(cost, tau), f"it spends {cost:.3g} of task loss, {tau:.3g} is allowed: mind the step's length")
    require(not along(step, g), "that is the gradient's own direction: divide by the curvature, solve with G", earned=1)
    require(not along(step, G @ g), "g was multiplied by G: solve with it", earned=1)
    ways, prices = rays(G)
    gain, most = -g @ step, ((ways @ g) * (tau / prices).sqrt()).max()
    require(gain > 0.9999 * most, f"it buys {gain:.3g}, and another step {most:.3g} at the same price", earned=1)


def trial(theta: Tensor, home: Tensor, unit: float, limit: float, lift: float) -> tuple[float, float]:
    """Two losses on a line: safety falls from 1 by x, plus a lift, and the protected loss jumps beyond a limit."""
    x = float(theta - home) / unit
    return 1 - x + lift, 1.05 if x <= limit else 2.0


def line_search(answer: Answer, draw: Draw) -> None:
    """Steps that pass whole, at a quarter of the length, and never."""
    tau, home, ray = draw.uniform(0.5, 2.0), draw.normal(1), torch.ones(1, dtype=torch.float64)
    unit = math.sqrt(tau)

    def search(limit: float, lift: float = 0.0) -> tuple[float | None, float, list[float]]:
        theta = home.clone()
        measure = Probe(trial, theta, home.clone(), unit, limit, lift)
        value, (measure, end, *_) = answer.run(measure, theta, ray, tau, 1.0, 1.0, 0.1, 4)
        tried = [1 + lift - losses[0] for [losses] in measure.log]
        return None if value is None else number(value), float(end - home) / unit, tried

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
    lifted = search(9, lift=5)[0]
    require(lifted is None, "the safety loss did not fall: such a step must not pass, whatever the task says")


def orthogonal_step(answer: Answer, draw: Draw) -> None:
    """Two conditions: no change of the task to first order, and the correction lies along M⁻¹g."""
    M, g, step = draw.positive(5), draw.normal(5), draw.normal(5)
    step += g * (1 - g @ step) / (g @ g)  # gᵀ step = 1
    value, across = tensor(answer(g, step, partial(torch.mv, M.inverse())), 5), torch.linalg.solve(M, g)
    slope = g @ value
    refuse(slope, "gᵀδ has doubled: subtract the part along M⁻¹g", 2)
    refuse(value, "the correction has the right direction, not the right length: divide by gᵀM⁻¹g", step - across)
    require(abs(slope) < 1e-8, f"the task's loss still changes to first order: gᵀδ is {slope:.2g} and must be 0")
    require(not along(value - step, g), "that is the Euclidean projection: subtract along M⁻¹g, nearest in the metric")
    require(along(M @ (value - step), g), "not the nearest step in the metric: subtract along M⁻¹g and nothing else")


def weighted_return(answer: Answer, draw: Draw) -> None:
    """The gradient of what is minimised must vanish."""
    task, safety, tuned, c = draw.positive(4), draw.positive(4), draw.normal(4), draw.uniform(1, 3)
    value, still = (tensor(answer(tuned, task, safety, each), 4) for each in (c, 0.0))
    require(close(still, tuned), "c = 0 must stay at the fine-tuned model: M_t θ_f belongs on the right-hand side")
    require(not along(value, tuned), "all parameters shrink alike: the two metrics decide which ones return")
    slope, swapped = (M @ (value - tuned) + c * pull @ value for M, pull in ((task, safety), (safety, task)))
    require(swapped.norm() > 1e-8, "the metrics are swapped: M_t keeps the fine-tuning, M_s pulls back")
    require(slope.norm() < 1e-8, "the gradient of ½(θ-θ_f)ᵀM_t(θ-θ_f) + c/2 θᵀM_sθ does not vanish there")


def random_control(answer: Answer, draw: Draw) -> None:
    """Length, direction and repetition."""
    step, seed = torch.zeros(2000, dtype=torch.float64), draw.integer(0, 10**6)
    step[:10] = 3 + draw.normal(10).abs()
    value, again, other = (tensor(answer(step, each), 2000) for each in (seed, seed, seed + 1))
    length, ratio = step.norm(), value.norm() / step.norm()
    require(torch.equal(value, again), "the same seed must give the same control: pass it to a generator")
    require(not torch.equal(value, other), "another seed must give another control")
    require((value != 0).double().mean() > 0.9, "it moves few entries: draw a fresh direction, do not flip or permute")
    require(not 40 < ratio < 50, f"it is {ratio:.0f} times as long as the step: divide the draw by its own length")
    require(close(ratio, 1), f"a control must be as long as the step: {length:.1f}, not {ratio * length:.1f}")
    require(abs(value @ step) < 0.15 * length**2, "it points along the step: a control has nothing to do with it")


def slope_at(theta: Tensor) -> Tensor:
    """The gradient of a safety loss that falls along (-1, -1)."""
    return torch.sigmoid(theta.sum() + 2) * torch.ones(2, dtype=torch.float64)


def losses_at(theta: Tensor, G: Tensor) -> tuple[float, float]:
    """That safety loss, and a protected loss with curvature G."""
    return float(torch.log1p((theta.sum() + 2).exp())), float(theta @ G @ theta / 2)


def restore(answer: Answer, draw: Draw) -> None:
    """The record of a run is compared with the losses at the parameters that it left."""
    G, rise = torch.tensor([draw.uniform(80, 120), 1.0], dtype=torch.float64).diag(), draw.uniform(0.9, 1.1)

    def run(goal: float, steps: int) -> tuple[list[float], list[float], Tensor]:
        theta = torch.zeros(2, dtype=torch.float64)
        functions = partial(slope_at, theta), partial(torch.mv, G.inverse()), partial(losses_at, theta, G)
        log, left = answer.run(theta, *functions, 0.01, rise, goal, steps)
        require(isinstance(log, list | tuple) and log, "return a list of (safety, protected), one pair a step")
        safety, protected = tensor(log, len(log), 2).T.tolist()
        return safety, protected, left[0]

    safety, protected, end = run(1.2, 9)
    start, drift = losses_at(torch.zeros_like(end), G), max(protected)
    require(close([safety[0], protected[0]], start), "the record begins with the losses before the first step")
    require(len(safety) > 1, "no step was taken")
    require(all(b < a for a, b in pairwise(safety)), "an accepted step must lower the safety loss")
    require(drift <= rise + 1e-9, f"the protected loss rose by {drift:.2f} from the START, {rise:.2f} is allowed")
    there = losses_at(end, G)
    require(close([safety[-1], protected[-1]], there), "the record does not end where the parameters are")
    require(safety[-1] <= 1.2, "it stopped early: go on until the goal is reached or no step passes")
    require(len(safety) <= 6, f"{len(safety) - 1} steps: after one that passed whole, double the allowance", earned=6)
    drift = run(0.0, 30)[1][-1]
    require(drift <= rise + 1e-9, "with no goal in reach it must stop at the allowance from the START", earned=6)
