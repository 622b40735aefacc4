"""Checks of notebook 08: a sampling step, EraseDiff's weight, and gradients of a loss after a fine-tune."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Generator, Tensor

from curvlib.exercises.core import Answer, Matvec, close, exercise, number, parts, require, tensor
from curvlib.exercises.draws import integer, positive, randn, uniform


@exercise(points=4)
def ddim_step(answer: Answer, generator: Generator) -> None:
    """Images whose noise is known, and one whose implied image is too bright."""
    a, b = uniform(generator, 0.3, 0.5), uniform(generator, 0.7, 0.9)
    image, noise = torch.tanh(randn(generator, 3, 4)), randn(generator, 3, 4)

    def at(share: float, pixels: Tensor) -> Tensor:
        return sqrt(share) * pixels + sqrt(1 - share) * noise

    def step(x: Tensor, target: float) -> Tensor:
        return tensor(answer(x, noise, a, target), 3, 4)

    value, last = step(at(a, image), b), step(at(a, image), 1.0)
    require(not close(value, at(a, image)), "that is x itself: the noise must become less")
    require(not close(value, sqrt(b) * image), "the image is not noised again: add √(1 - b) of the noise")
    require(not close(value, b * image + (1 - b) * noise), "noising takes the roots of b and 1 - b")
    require(close(last, image), "b = 1 must give the image that the noise implies: (x - √(1 - a) noise) / √a")
    require(close(value, at(b, image)), "an image and a noise that are known must be mixed anew with √b and √(1 - b)")
    bright = step(at(a, 3 * image), 1.0)
    require(float(bright.abs().max()) <= 1 + 1e-9, "the implied image left [-1, 1]: clip its pixels", earned=2)
    value = step(at(a, 3 * image), b)
    stale = sqrt(b) * bright + sqrt(1 - b) * noise
    message = "after clipping, the noise that leads to x is another one: compute it again from x and the clipped image"
    require(not close(value, stale), message, earned=3)
    implied = (value - sqrt(b) * bright) / sqrt(1 - b)
    whole = sqrt(a) * bright + sqrt(1 - a) * implied
    require(close(whole, at(a, 3 * image)), "the clipped image and the new noise must give x at a")


@exercise(points=3)
def erase_gradient(answer: Answer, generator: Generator) -> None:
    """Gradients that agree, that are opposed, and that meet at a known angle."""
    eta, (u, v) = uniform(generator, 0.1, 0.3), torch.linalg.qr(randn(generator, 6, 2)).Q.T
    retain, forget = 2 * u, 5 * (-0.6 * u + 0.8 * v)  # their cosine is -0.6

    def parted(first: Tensor, second: Tensor) -> tuple[Tensor, float]:
        gradient, weight = parts(answer(first, second, eta), "gradient", "weight")
        return tensor(gradient, 6), number(weight)

    agreeing = parted(retain, 3 * retain)[1]
    require(agreeing >= 0, f"gradients that agree get the weight {agreeing:.2f}: it must not fall below 0")
    require(agreeing == 0, "gradients that agree need no weight: mind the sign of the cosine")
    gradient, weight = parted(retain, forget)
    barrier = eta - float(retain @ forget / (forget @ forget))
    require(not close(weight, barrier), "divided by |g_forget|², as in BOME: the code divides by both norms")
    steady = close(weight, parted(retain, 7 * forget)[1])
    require(steady, "the weight depends on the gradients' lengths: divide by both norms")
    require(close(weight, eta + 0.6), f"at a cosine of -0.6 the weight is {eta + 0.6:.2f}, not {weight:.2f}")
    require(not close(gradient, weight * retain + forget), "the weight belongs to the forgetting gradient", earned=1)
    require(close(gradient, retain + weight * forget), "the gradient is g_retain + weight · g_forget", earned=1)


@exercise(points=5)
def hypergradient(answer: Answer, generator: Generator) -> None:
    """Against central differences of the loss after a proximal fine-tune, which are exact for a quadratic."""
    A, (b, theta, goal) = positive(generator, 5), randn(generator, 3, 5)
    rho, eye = uniform(generator, 0.3, 0.7), torch.eye(5, dtype=torch.float64)

    def tuned(start: Tensor, weight: float) -> Tensor:
        end: Tensor = torch.linalg.solve(A + weight * eye, b + weight * start)
        return end

    def slope(weight: float) -> Tensor:
        ends = [[(tuned(theta + sign * e, weight) - goal).square().sum() / 2 for sign in (1, -1)] for e in eye]
        return torch.stack([(up - down) / 2 for up, down in ends])

    value, g = tensor(answer(A, b, theta, rho, goal), 5), tuned(theta, rho) - goal
    require(not close(value, g), "that is ∇f at θ*, which pretends that θ* moves as θ does: solve with A + ρI")
    require(not close(value, slope(rho) / rho), "the factor ρ is missing: (A + ρI) dθ* = ρ dθ")
    require(not close(value, -slope(rho)), "the sign is turned")
    early = rho * torch.linalg.solve(A + rho * eye, theta - goal)
    require(not close(value, early), "take ∇f at the tuned weights θ*, not at θ")
    require(not close(value, slope(1.0)), "that is ρ = 1: use the ρ that is passed in")
    error = float((value - slope(rho)).norm() / slope(rho).norm())
    require(error < 1e-6, f"it differs from a central difference of f(θ*(θ)) by {error:.0e} of its length")


@exercise(points=4)
def unrolled_gradient(answer: Answer, generator: Generator) -> None:
    """Against n steps of descent from neighbouring starts; the products are counted."""
    A, g, n, a = positive(generator, 5), randn(generator, 5), integer(generator, 4, 8), uniform(generator, 0.1, 0.2)
    moves = torch.eye(5, dtype=torch.float64)  # how the end of a descent on ½uᵀAu moves with each start
    for _ in range(n):
        moves = moves - a * A @ moves
    raw, (matvec, *_) = answer.run(Matvec(A), g, n, a)
    value, eye = tensor(raw, 5), torch.eye(5, dtype=torch.float64)
    require(not close(value, g), "that is g itself: go back through the n steps")
    require(not close(value, torch.linalg.solve(eye + n * a * A, g)), "(I + naA)⁻¹ g is near, but not the gradient")
    require(not close(value, g - n * a * A @ g), "all steps at once: each step multiplies what the next one left")
    require(len(matvec.log) == n, f"{len(matvec.log)} products for {n} steps: one step, one product")
    require(close(value, moves.T @ g), "each step back is v - a A v")
