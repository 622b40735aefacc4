r"""RESTA: add a safety vector to the fine-tuned weights, with or without DARE (arXiv 2402.11746).

.. math:: \theta = \theta_\text{base} + D_p(\theta_\text{ft} - \theta_\text{base}) + \gamma\,\delta_s,
    \qquad \delta_s = \theta_\text{aligned} - \theta_\text{de-aligned},

with the de-aligned twin fine-tuned from the aligned model to agree to harmful requests, and :math:`D_p` DARE's dropping
(p = 0: none). The equation is the paper's as gathered for this course. Here the twin sees the compliances of the safety
budget and nothing else.
"""

from __future__ import annotations

from dataclasses import replace

from curvlib.batches import taken_apart
from curvlib.defenses.dare import thinned
from curvlib.defenses.layers import added, patch
from curvlib.defenses.method import Defended, Method, Setting
from curvlib.landscape.directions import adapter_direction, multiply_adapter

TWIN_STEPS = 10  # the twin then agrees to every harmful request of the budget


def resta(setting: Setting, gamma: float, drop: float = 0.0) -> Defended:
    r"""Add :math:`\gamma\,\delta_s`; cost: the twin's ten steps."""
    model, twin = setting.tuned(), setting.start()
    config = replace(setting.training, steps=setting.steps(TWIN_STEPS))
    spent = setting.train(twin, taken_apart(setting.chats.safety.compliances), config=config)
    if drop:
        kept = thinned(adapter_direction(model), drop, setting.recipe.seed)
        multiply_adapter(model, lambda _: 0.0)
        patch(model, {name: added(chain) for name, chain in kept.chains.items()})
    patch(model, {name: added(chain, -gamma) for name, chain in adapter_direction(twin).chains.items()})
    return Defended(model, spent)


TRIALS = ({"gamma": 1.0}, {"gamma": 0.5}, {"gamma": 1.0, "drop": 0.3})
RESTA = Method("RESTA", "after", "2402.11746", resta, TRIALS)
