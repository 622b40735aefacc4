r"""StableUN: unlearn at several perturbed points at once, without hurting what is retained (arXiv 2509.20230).

The forgetting gradient :math:`g_f` is the mean over points around θ: sharpness-aware, Gaussian, gradient-aligned and
historical ones. The remembering gradient :math:`g_r` is taken on retained data at θ. Where they conflict,

.. math:: g_f \leftarrow g_f - \frac{g_f^\top g_r}{\|g_r\|^2}\,g_r \quad\text{if}\quad g_f^\top g_r < 0,

and the step is taken with :math:`g_f + g_r`. Projection and kinds of points are the paper's as gathered for this
course; how each point is made is our reading, see :func:`points`. What is forgotten is the agreement to harmful
requests, by ascent bounded at 5 nats.
"""

from __future__ import annotations

from itertools import cycle

import torch
from torch import Tensor

from curvlib.defenses.method import Defended, Method, Setting
from curvlib.parameters import flatten, shifted, trainable, unflatten
from curvlib.restore import objectives
from curvlib.restore.objectives import SafetyBatches, Term

STEPS = 6
RADIUS = 0.02  # of a point around θ, as a share of the adapter's norm


def points(theta: Tensor, before: Tensor, gradient: Tensor, radius: float, generator: torch.Generator) -> list[Tensor]:
    r"""Return the displacements (P,) of the points, each of length ``radius``; one that has no direction is left out.

    Args:
        theta: where the model is.
        before: where it was one step ago; the historical point lies towards it.
        gradient: of the forgetting loss; the sharpness-aware point lies along it, where that loss rises most, and the
            gradient-aligned one along Gaussian magnitudes with the gradient's signs.
        radius: of all points.
        generator: of the Gaussian point and of those magnitudes.
    """
    noise, magnitudes = (torch.randn(len(theta), generator=generator).to(theta) for _ in range(2))
    rows = [gradient, noise, magnitudes.abs() * gradient.sign(), before - theta]
    return [radius * row / row.norm() for row in rows if row.norm() > 0]


def without_conflict(forget: Tensor, remember: Tensor) -> Tensor:
    """Return the forgetting gradient without the part that works against remembering.

    >>> without_conflict(torch.tensor([1.0, -2.0]), torch.tensor([0.0, 3.0]))
    tensor([1., 0.])
    """
    along, square = forget @ remember, remember @ remember
    return forget - along / square * remember if along < 0 and square > 0 else forget


def stableun(setting: Setting, rate: float, refusals: bool = False) -> Defended:
    """Take six AdamW steps; cost of one: six gradients of eight chats.

    Retained are task and benign chats, and with ``refusals`` also those, so that all safety data are used.
    """
    model, safety = setting.tuned(), setting.chats.safety
    parameters, generator = list(trainable(model).values()), torch.Generator().manual_seed(setting.recipe.seed)
    kept = cycle([*setting.chats.task, *setting.chats.benign, *(safety.refusals if refusals else ())])
    optimiser, spent, before = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0), 0, flatten(parameters)

    def gradient(parts: list[Term]) -> Tensor:
        nonlocal spent
        spent += sum(len(batch) for part in parts for batch in part.batches)
        return objectives.gradient(model, parts, parameters)

    for _, compliance in zip(range(setting.steps(STEPS)), cycle(safety.compliances), strict=False):
        forgetting, theta = objectives.terms("ascent", SafetyBatches((), [compliance])), flatten(parameters)
        found = [gradient(forgetting)]
        for step in points(theta, before, found[0], RADIUS * float(theta.norm()), generator):
            with shifted(parameters, step):
                found.append(gradient(forgetting))
        remember = gradient([Term([next(kept)])])
        total = without_conflict(torch.stack(found).mean(0), remember) + remember
        for parameter, piece in zip(parameters, unflatten(total, parameters), strict=True):
            parameter.grad = piece
        before = theta
        optimiser.step()
    optimiser.zero_grad()
    return Defended(model, spent)


TRIALS = ({"rate": 5e-4}, {"rate": 1e-3}, {"rate": 5e-4, "refusals": True})
STABLEUN = Method("StableUN", "after", "2509.20230", stableun, TRIALS)
