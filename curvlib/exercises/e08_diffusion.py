"""Checks of notebook 08: a sampling step, EraseDiff's weight, and gradients of a loss after a fine-tune."""

from math import sqrt

import torch
from torch import Tensor

from curvlib.exercises.core import Answer, Draw, Probe, close, parts, refuse, require, tensor


def noised(image: Tensor, noise: Tensor, share: float) -> Tensor:
    """An image under noise, of which this share of the variance is the image's."""
    return sqrt(share) * image + sqrt(1 - share) * noise


def ddim_step(answer: Answer, draw: Draw) -> None:
    """Images whose noise is known, and one whose implied image is too bright."""
    a, b = draw.uniform(0.3, 0.5), draw.uniform(0.7, 0.9)
    image, noise = torch.tanh(draw.normal(3, 4)), draw.normal(3, 4)
    x, glaring = noised(image, noise, a), noised(3 * image, noise, a)
    cases = ((x, b), (x, 1.0), (glaring, b), (glaring, 1.0))
    value, last, clipped, bright = (tensor(answer(before, noise, a, to), 3, 4) for before, to in cases)
    refuse(value, "that is x itself: the noise must become less", x)
    refuse(value, "the image is not noised again: add √(1 - b) of the noise", sqrt(b) * image)
    refuse(value, "noising takes the roots of b and 1 - b", b * image + (1 - b) * noise)
    require(close(last, image), "b = 1 must give the image that the noise implies: (x - √(1 - a) noise) / √a")
    right = close(value, noised(image, noise, b))
    require(right, "an image and a noise that are known must be mixed anew with √b and √(1 - b)")
    require(bright.abs().max() <= 1 + 1e-9, "the implied image left [-1, 1]: clip its pixels", earned=2)
    stale = "after clipping, the noise that leads to x is another one: compute it again from x and the clipped image"
    refuse(clipped, stale, noised(bright, noise, b), earned=3)
    implied = (clipped - sqrt(b) * bright) / sqrt(1 - b)
    require(close(noised(bright, implied, a), glaring), "the clipped image and the new noise must give x at a")


def erase_gradient(answer: Answer, draw: Draw) -> None:
    """Gradients that agree, that are opposed, and that meet at a known angle."""
    eta, (u, v) = draw.uniform(0.1, 0.3), torch.linalg.qr(draw.normal(6, 2)).Q.T
    retain, forget = 2 * u, 5 * (-0.6 * u + 0.8 * v)  # their cosine is -0.6
    pairs = ((retain, 3 * retain), (retain, forget), (retain, 7 * forget))
    results = [parts(answer(*pair, eta), gradient=(6,), weight=()) for pair in pairs]
    (_, agreeing), (gradient, weight), (_, longer) = results
    require(agreeing >= 0, f"gradients that agree get the weight {agreeing:.2f}: it must not fall below 0")
    require(agreeing == 0, "gradients that agree need no weight: mind the sign of the cosine")
    barrier = eta - retain @ forget / (forget @ forget)
    refuse(weight, "divided by |g_forget|², as in BOME: the code divides by both norms", barrier)
    require(close(weight, longer), "the weight depends on the gradients' lengths: divide by both norms")
    require(close(weight, eta + 0.6), f"at a cosine of -0.6 the weight is {eta + 0.6:.2f}, not {weight:.2f}")
    refuse(gradient, "the weight belongs to the forgetting gradient", weight * retain + forget, earned=1)
    require(close(gradient, retain + weight * forget), "the gradient is g_retain + weight · g_forget", earned=1)


def hypergradient(answer: Answer, draw: Draw) -> None:
    """Against central differences of the loss after a proximal fine-tune, which are exact for a quadratic."""
    A, (b, theta, goal) = draw.positive(5), draw.normal(3, 5)
    rho, eye = draw.uniform(0.3, 0.7), torch.eye(5, dtype=torch.float64)

    value, starts = tensor(answer(A, b, theta, rho, goal), 5), torch.cat([theta + eye, theta - eye, theta[None]])
    misses = [torch.linalg.solve(A + each * eye, b + each * starts, left=False) - goal for each in (rho, 1.0)]
    slope, other = ((each[:5].square().sum(1) - each[5:10].square().sum(1)) / 4 for each in misses)
    early = rho * torch.linalg.solve(A + rho * eye, theta - goal)
    refuse(value, "that is ∇f at θ*, which pretends that θ* moves as θ does: solve with A + ρI", misses[0][10])
    refuse(value, "the factor ρ is missing: (A + ρI) dθ* = ρ dθ", slope / rho)
    refuse(value, "the sign is turned", -slope)
    refuse(value, "take ∇f at the tuned weights θ*, not at θ", early)
    refuse(value, "that is ρ = 1: use the ρ that is passed in", other)
    error = float((value - slope).norm() / slope.norm())
    require(error < 1e-6, f"it differs from a central difference of f(θ*(θ)) by {error:.0e} of its length")


def unrolled_gradient(answer: Answer, draw: Draw) -> None:
    """Against n steps of descent from neighbouring starts; the products are counted."""
    A, g, n, a = draw.positive(5), draw.normal(5), draw.integer(4, 8), draw.uniform(0.1, 0.2)
    eye = torch.eye(5, dtype=torch.float64)
    moves = torch.linalg.matrix_power(eye - a * A, n)  # how the end of a descent on ½uᵀAu moves with each start
    raw, (matvec, *_) = answer.run(Probe(torch.mv, A), g, n, a)
    value, count = tensor(raw, 5), len(matvec.log)
    refuse(value, "that is g itself: go back through the n steps", g)
    refuse(value, "(I + naA)⁻¹ g is near, but not the gradient", torch.linalg.solve(eye + n * a * A, g))
    refuse(value, "all steps at once: each step multiplies what the next one left", g - n * a * A @ g)
    require(count == n, f"{count} products for {n} steps: one step, one product")
    require(close(value, moves.T @ g), "each step back is v - a A v")
