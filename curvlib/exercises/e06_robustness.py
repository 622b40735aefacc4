"""Checks of notebook 06: a direction of refusal, its ablation, the cheapest margin, what a metric buys, and an area."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from curvlib.exercises.core import Answer, Draw, Probe, along, close, hint, number, rays, refuse, require, tensor


def refusal_direction(answer: Answer, draw: Draw) -> None:
    """Four prompts and seven, of two to five tokens each."""
    harmful, harmless = ([draw.normal(draw.integer(2, 5), 6) for _ in range(count)] for count in (4, 7))

    def heading(state: Callable[[Tensor], Tensor], share: float = 1) -> Tensor:
        one, other = (torch.stack([state(states) for states in kind]).mean(0) for kind in (harmful, harmless))
        return normalize(one - share * other, dim=0)

    value = tensor(answer(harmful, harmless), 6)
    way, right = normalize(value, dim=0), heading(lambda states: states[-1])
    refuse(way, "the sign is turned: it leads from the harmless prompts to the harmful ones", -right)
    first, averaged = heading(lambda states: states[0]), heading(lambda states: states.mean(0))
    refuse(way, "that is the first token, which has seen nothing of the prompt: take the last one", first)
    refuse(way, "all tokens are averaged: take the last one, which has seen the whole prompt", averaged)
    alone, alike = heading(lambda states: states[-1], 0), heading(lambda states: normalize(states[-1], dim=0))
    refuse(way, "that is the harmful mean alone: subtract what harmless prompts have in common with it", alone)
    refuse(way, "each state was made of length one: take means first, and divide their difference by its length", alike)
    require(close(way, right), "not the mean of the harmful last states minus the mean of the harmless ones")
    require(close(value, right), f"right, but {value.norm():.2f} long: divide it by its length", earned=2)


def ablate(answer: Answer, draw: Draw) -> None:
    """Each state's part along the direction, which is not of length one."""
    states, r = draw.normal(2, 3, 5), draw.uniform(1.5, 3) * normalize(draw.normal(5), dim=0)
    value, length = tensor(answer(states, r), 2, 3, 5), r.norm()
    part = torch.einsum("btd,d,e->bte", states, r, r) / length**2
    refuse(value, "that is the part along r: subtract it from the state", part)
    refuse(value, "the part along r was added", states + part)
    refuse(value, "the part along r was subtracted twice, which mirrors the state", states - 2 * part)
    unit = [states - length**power * part for power in (1, 2)]
    refuse(value, "r is not of length one: divide by its length in both places", *unit)
    refuse(value, "the same vector went from each state: take off as much of r as the state has", states - r)
    rest = float((value @ r).abs().max() / length)
    require(rest < 1e-8, f"a state still has {rest:.2f} along r: every state loses its own part")
    require(close(value, states - part), "something across r went as well: change a state along r only")


def margin_step(answer: Answer, draw: Draw) -> None:
    """Against every direction of the plane, each as long as the margin asks."""
    M, g = draw.valley()
    b, gap = draw.uniform(0.5, 1.0), draw.uniform(1, 2)
    step, still = (tensor(answer(b, g, M, margin), 2) for margin in (b + gap, b - 0.3))
    s, cost = float(b + g @ step), float(step @ M @ step) / 2
    require(g @ step > 0, "the log-odds fall along it: the step goes with g")
    refuse(s, "the log-odds start at b, so only margin - b is missing", 2 * b + gap)
    require(not along(step, g), "that is the gradient's own direction: divide by the curvature, solve with M")
    require(not along(step, M @ g), "g was multiplied by M: solve with it")
    require(close(s, b + gap), f"it ends at log-odds of {s:.3g}, the margin is {b + gap:.3g}: mind the step's length")
    ways, prices = rays(M)
    least = float((prices * (gap / (ways @ g)) ** 2).min())
    require(cost < 1.0001 * least, f"it pays {cost:.3g}, and another step reaches the margin for {least:.3g}")
    require(not still.any(), "b lies above the margin, so the hinge is zero: stay", earned=4)


def depth_ratio(answer: Answer, draw: Draw) -> None:
    """Against the best of all directions of the plane, at one price; products and solves are counted."""
    M, g = draw.valley()
    raw, (_, product, solve) = answer.run(g, Probe(torch.mv, M), Probe(torch.mv, M.inverse()))
    value, longer = number(raw), number(answer(3 * g, Probe(torch.mv, M), Probe(torch.mv, M.inverse())))
    buys, plain = float(g @ torch.linalg.solve(M, g)), float((g @ g) ** 2 / (g @ M @ g))
    refuse(value, "that is R²: depth grows with the root of the price", buys / plain)
    refuse(value, "the plain step stands on top: R is at least one", (plain / buys) ** 0.5)
    refuse(value, "that is what M's step buys: divide by what a plain step buys at the same price", buys, buys**0.5)
    require(close(longer, value), "a gradient three times as long gives another R: divide by gᵀg, not by ‖g‖")
    ways, prices = rays(M)
    best = float((ways @ g / (2 * prices).sqrt()).max()) / plain**0.5
    require(close(value, best, 1e-3), f"of all steps at one price the best buys {best:.3f} times the plain one's depth")
    calls = len(product.log), len(solve.log)
    require(calls == (1, 1), f"right, with {calls[0]} products and {calls[1]} solves: one of each is enough", earned=3)


def relearning_area(answer: Answer, draw: Draw) -> None:
    """A curve of straight pieces, read off in the middle of each hundredth of a step."""
    steps, falls = torch.tensor([0.0, 1, 2, 4, 8], dtype=torch.float64), draw.normal(4).abs() + 0.2
    end, middles = 4.0 + draw.integer(1, 3), torch.arange(800, dtype=torch.float64) / 100 + 0.005

    def curve(x: Tensor) -> Tensor:
        return 1 - (falls * torch.minimum(x[:, None], steps[1:])).sum(1) / (falls @ steps[1:])

    def mean(until: float) -> float:
        return float(curve(middles[middles < until]).mean())

    chances, right = curve(steps), mean(end)
    widths, fourth = torch.tensor([1, 1, 2, end - 4], dtype=torch.float64), float(chances[3])
    with hint("out of bounds", "end may be the last read-out, which has no next one"):
        value, whole = number(answer(steps, chances, end)), number(answer(steps, chances, 8.0))
    refuse(value, "nothing was cut: two curves compare up to the step that both have reached", mean(8))
    few = "that is a mean of read-outs, which lie closer at the start: weigh each piece by its steps"
    refuse(value, few, chances.mean(), chances[:4].mean())
    refuse(value, "that is a sum over steps: divide by end, so that a chance of one gives one", right * end)
    sides = [float(widths @ chances[first : first + 4]) / end for first in (0, 1)]
    refuse(value, "rectangles: the chance falls between two read-outs, so take trapezoids", *sides)
    early = 4 * mean(4)
    held = (early + fourth * (end - 4)) / end
    refuse(value, "it stops at the read-out before end: add the piece up to end", early / 4, early / end)
    refuse(value, "the last read-out was held: go on along the straight line to the next", held)
    for height, until in ((value, end), (whole, 8)):
        exact = mean(until)
        require(close(height, exact), f"the mean height up to step {until:.0f} is {exact:.4f}, not {height:.4f}")
