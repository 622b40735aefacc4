r"""Merge the models before and after fine-tuning along an arc, layer by layer (in arXiv 2412.19512).

With Ω the angle between the two weight matrices of a layer, seen as vectors,

.. math:: \theta = \frac{\sin((1-t)\,\Omega)}{\sin\Omega}\,\theta_\text{base}
    + \frac{\sin(t\,\Omega)}{\sin\Omega}\,\theta_\text{ft},

which keeps the norm where both have the same; t is the share λ of the linear merge. The formula is the textbook's
(Shoemake 1985); of the paper we know only that it uses it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from curvlib.defenses.layers import patch, scaled
from curvlib.defenses.method import Defended, Method, Setting
from curvlib.landscape.directions import adapter_direction, effective_weight, linear_layers, multiply_adapter

FLAT = 1e-6  # radians: below, both coefficients agree with the linear ones to rounding


def coefficients(angle: float, t: float) -> tuple[float, float]:
    """Return the weights of the first and the second end.

    >>> [round(c, 4) for c in coefficients(math.pi / 2, 0.5)]
    [0.7071, 0.7071]
    """
    if angle < FLAT:
        return 1 - t, t
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def angle_between(first: Tensor, second: Tensor) -> float:
    """Return the angle between two matrices of the same shape, from half chords: exact where it is small."""
    a, b = (matrix.double() / matrix.double().norm() for matrix in (first, second))
    return 2 * math.atan2(float((a - b).norm()), float((a + b).norm()))


@torch.no_grad()
def slerp(setting: Setting, t: float) -> Defended:
    """Go the share t of the arc in each layer; cost: one pass over all weights.

    A layer becomes a·base + b·(base + ΔW) = (a + b)·(base + b/(a + b)·ΔW): its adapter and its output are scaled.
    """
    model = setting.tuned()
    step, ends = adapter_direction(model), dict[str, tuple[float, float]]()
    for name, layer in linear_layers(model).items():
        tuned = effective_weight(layer)
        ends[name] = coefficients(angle_between(tuned - step.delta(name).to(tuned), tuned), t)
    multiply_adapter(model, lambda name: ends[name][1] / sum(ends[name]))
    patch(model, {name: scaled(sum(pair)) for name, pair in ends.items()})
    return Defended(model)


SLERP = Method("SLERP", "after", "2412.19512", slerp, ({"t": 0.6}, {"t": 0.4}, {"t": 0.8}))
