r"""SafeLoRA: project the adapter of a layer onto the alignment's directions where it strays from them (2405.16833).

.. math:: V = W_\text{aligned} - W_\text{shipped}, \qquad C = \frac{V V^\top}{\|V\|_F}, \qquad
    \Delta W \leftarrow C\,\Delta W \ \text{ if }\ \cos(\Delta W,\ C\,\Delta W) < \tau .

Equation and rule are the paper's as gathered for this course. C is no projector unless V's singular values are all
equal to :math:`\|V\|_F^{1/2}`: with a small V it also shrinks what it keeps, and we leave that as published.
"""

from __future__ import annotations

import torch
from torch import Tensor

from curvlib.defenses.method import Defended, Method, Setting
from curvlib.landscape.directions import adapter_direction, multiply_adapter


def projector(v: Tensor) -> Tensor:
    r"""Return :math:`C = VV^\top/\|V\|_F` (out, out).

    >>> projector(torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
    tensor([[2., 0.],
            [0., 0.]])
    """
    product: Tensor = v @ v.T
    return product.div(v.norm())


def cosine(left: Tensor, right: Tensor, c: Tensor) -> float:
    r"""Return :math:`\cos(\Delta W, C\,\Delta W)` of :math:`\Delta W` = left (out, r) @ right (r, in), in factors."""
    gram, moved = right @ right.T, c @ left

    def inner(a: Tensor, b: Tensor) -> float:
        return float((a.T @ b * gram).sum())

    size = (inner(left, left) * inner(moved, moved)) ** 0.5
    return inner(left, moved) / size if size > 0 else 1.0


@torch.no_grad()
def safelora(setting: Setting, threshold: float) -> Defended:
    """Project the layers below the threshold; cost: an out × out matrix a layer, and both dense checkpoints."""
    model, alignment = setting.tuned(), setting.alignment()
    factors: dict[str, float | Tensor] = {}
    for name, (left, right) in adapter_direction(model).chains.items():
        c = projector(alignment.delta(name).to(left))
        factors[name] = c if cosine(left, right, c) < threshold else 1.0
    multiply_adapter(model, factors.__getitem__)
    return Defended(model)


TRIALS = ({"threshold": 0.35}, {"threshold": 0.5}, {"threshold": 1.1})  # the last projects every layer
SAFELORA = Method("SafeLoRA", "after", "2405.16833", safelora, TRIALS)
