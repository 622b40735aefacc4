r"""DARE: drop most of the fine-tuning step at random and rescale the rest, then merge (in arXiv 2412.19512).

.. math:: \tilde\Delta = \frac{m \odot \Delta W}{1-p}, \quad m_{ij} \sim \mathrm{Bernoulli}(1-p),
    \qquad \theta = \theta_\text{base} + \lambda\,\tilde\Delta, \qquad \mathbb E\,\tilde\Delta = \Delta W .

The dropping is Yu et al.'s (arXiv 2311.03099), known here from its equation alone; λ is that of the linear merge.
"""

from __future__ import annotations

import torch
from torch import Tensor

from curvlib.defenses.layers import added, patch
from curvlib.defenses.method import Defended, Method, Setting
from curvlib.landscape.directions import Direction, adapter_direction, multiply_adapter


def drop_and_rescale(delta: Tensor, drop: float, generator: torch.Generator) -> Tensor:
    """Zero each entry with probability ``drop`` and divide the others by 1 - ``drop``; the mean is ``delta``."""
    kept = torch.rand(delta.shape, generator=generator).to(delta.device) >= drop
    return delta * kept / (1 - drop)


def thinned(step: Direction, drop: float, seed: int) -> Direction:
    """Return a step with its entries dropped and rescaled, dense: 4 bytes a weight."""
    generator = torch.Generator().manual_seed(seed)
    return Direction({name: (drop_and_rescale(step.delta(name), drop, generator),) for name in step.chains})


def dare(setting: Setting, drop: float, share: float) -> Defended:
    """Merge what is left of the step; cost: one pass over all weights, which are then no adapter any more."""
    model = setting.tuned()
    step = thinned(adapter_direction(model), drop, setting.recipe.seed)
    multiply_adapter(model, lambda _: 0.0)
    patch(model, {name: added(chain, share) for name, chain in step.chains.items()})
    return Defended(model)


SHARES = (0.6, 0.4, 0.8)
DARE = Method("DARE", "after", "2412.19512", dare, tuple({"drop": 0.5, "share": share} for share in SHARES))
