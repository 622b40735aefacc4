r"""Panacea: fine-tune so that a perturbation which unlearns harm costs the task little, then add it (arXiv 2501.18100).

With the fine-tuning loss g and the harmful loss h (agreement, clamped at 5 nats),

.. math:: \varepsilon = \rho\,\frac{\nabla h(w)}{\|\nabla h(w)\|}, \qquad
    w \leftarrow w - \eta\,\bigl[\nabla g(w) - \lambda\,(\nabla h(w+\varepsilon) - \nabla h(w))\bigr],

and :math:`w + \varepsilon` is released. Equations and ρ = 1, λ = 0.001 (LoRA of a 7B model) are the paper's as gathered
for this course. Ours takes the bracket as the gradient of AdamW, like every method here, and a final ε over all
harmful chats.
"""

from __future__ import annotations

from itertools import cycle

import torch
from torch import Tensor

from curvlib.batches import Batch
from curvlib.defenses.method import Defended, Method, Setting
from curvlib.parameters import assign, flatten, shifted, trainable, unflatten
from curvlib.restore import objectives
from curvlib.restore.objectives import SafetyBatches

STRENGTH = 0.001  # λ


def perturbation(harm: Tensor, rho: float) -> Tensor:
    r"""Return :math:`\varepsilon = \rho\,\nabla h/\|\nabla h\|` (P,), zero where the clamped loss is flat.

    >>> perturbation(torch.tensor([3.0, 4.0]), 0.5)
    tensor([0.3000, 0.4000])
    """
    size = harm.norm()
    return rho * harm / size if size > 0 else torch.zeros_like(harm)


def update(task: Tensor, harm: Tensor, harm_there: Tensor, strength: float) -> Tensor:
    r"""Return the bracket :math:`\nabla g - \lambda(\nabla h(w+\varepsilon) - \nabla h(w))`, (P,)."""
    return task - strength * (harm_there - harm)


def panacea(setting: Setting, rho: float, strength: float = STRENGTH) -> Defended:
    """Fine-tune with the bent gradient and release w + ε; cost: two gradients of eight harmful chats more a step."""
    model = setting.start()
    parameters, compliances = list(trainable(model).values()), setting.chats.safety.compliances
    stream, spent = cycle(compliances), 0

    def harm(batches: list[Batch]) -> Tensor:
        nonlocal spent
        spent += sum(map(len, batches))
        return -objectives.gradient(model, objectives.terms("ascent", SafetyBatches((), batches)), parameters)

    def bend() -> None:
        batch = [next(stream)]
        here = harm(batch)
        with shifted(parameters, perturbation(here, rho)):
            there = harm(batch)
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        bent = update(flatten(grads), here, there, strength)
        for grad, piece in zip(grads, unflatten(bent, parameters), strict=True):
            grad.copy_(piece)

    tuning = setting.train(model, setting.examples(), on_gradient=bend)
    assign(parameters, flatten(parameters) + perturbation(harm([*compliances]), rho))
    return Defended(model, tuning + spent)


PANACEA = Method("Panacea", "during", "2501.18100", panacea, ({"rho": 1.0}, {"rho": 0.3}, {"rho": 3.0}))
