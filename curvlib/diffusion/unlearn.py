r"""Makes a denoiser forget a digit: ascent, EraseDiff and ResAlign, which asks what a fine-tune would bring back.

Methods change the denoiser in place and yield after every optimiser step, so that their caller says when to stop.
Sources: EraseDiff, arXiv 2401.05779, and ResAlign, arXiv 2507.16302, both as their released code computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, mse_loss
from torch.optim import SGD, Adam, AdamW

from curvlib.curvature.forward import flat_gradient
from curvlib.curvature.ggn import SquaredErrorGGN
from curvlib.curvature.operator import Operator
from curvlib.curvature.solve import conjugate_gradient
from curvlib.diffusion.model import CODES, Images, Noised, denoising_loss, descend, noised
from curvlib.parameters import assign, flatten, trainable, unflatten

ROWS, RATE = 32, 3e-4  # images and learning rate of a step
Ahead = Callable[[Noised, torch.Generator], Tensor]
Rule = Callable[[Operator, Tensor, float], Tensor]  # curvature and outer gradient after a fine-tune, and its reach
Simulations = Sequence[tuple[Any, float, int]]  # optimiser, learning rate and steps of each
SIMULATIONS: Simulations = ((SGD, 0.01, 5), (SGD, 0.01, 15), (Adam, 3e-4, 15), (Adam, 1e-3, 10))


def imitation_loss(denoiser: nn.Module, batch: Noised, teacher: nn.Module, code: Tensor) -> Tensor:
    """Return the mean squared distance of a prediction to the teacher's under ``code``, which counts as constant."""
    with torch.no_grad():
        target = teacher(batch.x, batch.t, code.expand_as(batch.code))
    return mse_loss(denoiser(batch.x, batch.t, batch.code), target)


def erase(
    denoiser: nn.Module, forget: Images, retain: Images, *, inner: int = 4, weight: float | None = None, seed: int = 0
) -> Iterator[tuple[float, float, float, float]]:
    r"""EraseDiff: rounds of four steps on :math:`L_r + \lambda\,(L_u - \mathrm{sg}[L_u(\theta^K)])`.

    L_u imitates another digit. After ``inner`` steps on it, to :math:`\theta^K`, the weights go back, Adam's moments
    stay. No ``weight`` means :math:`\max(0.1 - \cos(\nabla L_r, \nabla L_u), 0)`. Yields L_r, L_u, that cosine, λ.
    """
    parameters, generator = list(trainable(denoiser).values()), torch.Generator().manual_seed(seed)
    optimiser = Adam(parameters, lr=RATE)

    def forgetting() -> Tensor:
        batch, other = noised(forget.draw(ROWS, generator), generator), retain.draw(1, generator).y
        return imitation_loss(denoiser, batch, denoiser, CODES[other])

    while True:
        start = flatten(parameters)
        for _ in range(inner):
            descend(optimiser, parameters, torch.autograd.grad(forgetting(), parameters))
        assign(parameters, start)
        for _ in range(4):
            losses = denoising_loss(denoiser, noised(retain.draw(ROWS, generator), generator)), forgetting()
            keep, lose = (flat_gradient(loss, parameters) for loss in losses)
            cosine = float(cosine_similarity(keep, lose, dim=0))
            share = max(0.1 - cosine, 0.0) if weight is None else weight
            descend(optimiser, parameters, tuple(unflatten(keep + share * lose, parameters)))
            yield losses[0].item(), losses[1].item(), cosine, share


def ascend(
    denoiser: nn.Module, forget: Images, retain: Images, pull: float | Ahead = 1.0, *, keep: float = 2.0, seed: int = 0
) -> Iterator[float]:
    r"""Ascend the loss on ``forget``, and imitate the model's own start on ``retain`` with weight ``keep``.

    ``pull`` is the ascent's weight, or in ResAlign a function: ``pull(batch, generator)``, the gradient after a
    simulated fine-tune, is then four fifths of the ascent. Yields the weight, a multiple of :math:`|\nabla L|`.
    """
    parameters, generator = list(trainable(denoiser).values()), torch.Generator().manual_seed(seed)
    original, optimiser = deepcopy(denoiser), AdamW(parameters, lr=RATE)
    while True:
        bad, good = (noised(images.draw(ROWS, generator), generator) for images in (forget, retain))
        here = flat_gradient(-denoising_loss(denoiser, bad), parameters)
        up = 0.2 * here + 0.8 * pull(bad, generator) if callable(pull) else pull * here
        stay = flat_gradient(imitation_loss(denoiser, good, original, good.code), parameters)
        descend(optimiser, parameters, tuple(unflatten(up + keep * stay, parameters)))
        yield float(up.norm() / here.norm())


def after_fine_tuning(denoiser: nn.Module, attack: Images, rule: Rule, simulations: Simulations = SIMULATIONS) -> Ahead:
    r"""Return ResAlign's pull: fine-tune on ``attack``, ask ``rule`` for the hypergradient, put the weights back.

    The reach is n a for n steps of descent at rate a, and :math:`|\theta^*-\theta|/|\nabla L(\theta^*)|` for Adam.
    """
    parameters = list(trainable(denoiser).values())

    def ahead(bad: Noised, generator: torch.Generator) -> Tensor:
        kind, rate, steps = simulations[int(torch.randint(len(simulations), (1,), generator=generator))]
        start, optimiser = flatten(parameters), kind(parameters, lr=rate)
        for _ in range(steps):
            optimiser.zero_grad()
            denoising_loss(denoiser, noised(attack.draw(ROWS // 2, generator), generator)).backward()
            optimiser.step()
        batch = noised(attack.draw(ROWS // 2, generator), generator)
        slope = flat_gradient(denoising_loss(denoiser, batch), parameters)
        reach = rate * steps if kind is SGD else float((flatten(parameters) - start).norm() / slope.norm())
        v = rule(gauss_newton(denoiser, [batch]), flat_gradient(-denoising_loss(denoiser, bad), parameters), reach)
        assign(parameters, start)
        return v

    return ahead


def gauss_newton(denoiser: nn.Module, batches: Sequence[Noised]) -> Operator:
    """Return the Gauss-Newton matrix of the denoising loss on frozen batches."""
    return SquaredErrorGGN(lambda b: denoiser(b.x, b.t, b.code), trainable(denoiser), batches, check=False)


def matched(curvature: Operator, gradient: Tensor, reach: float, products: int = 3) -> Tensor:
    r"""Return :math:`\rho\,(H + \rho I)^{-1} g` by conjugate gradients, with :math:`\rho = 1/\text{reach}`."""
    solution = conjugate_gradient(curvature.damped(1 / reach), gradient, max_products=products, tolerance=1e-6)
    return solution.solution / reach


def released(curvature: Operator, gradient: Tensor, reach: float, terms: int = 5) -> Tensor:  # noqa: ARG001  a Rule
    r"""Return ResAlign's Richardson terms for :math:`(H + I)^{-1} g`, with a step that is halved while a term grows."""
    for step in (0.5**halvings for halvings in range(6)):
        v, term = gradient, gradient
        for _ in range(terms - 1):
            if (term := v - step * (curvature @ v + v)).norm() > v.norm():
                break
            v = term + gradient
        else:
            return step * v
    return torch.zeros_like(gradient)
