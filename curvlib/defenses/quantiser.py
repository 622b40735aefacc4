r"""Fake quantisation with learnable clipping and an equivalent transformation, as a linear layer in plain torch.

.. math:: Q_b(w) = \Delta\,\mathrm{clamp}\bigl(\mathrm{round}(w/\Delta), -T, T\bigr), \qquad T = 2^{b-1}-1, \qquad
    \Delta = \sigma(\gamma)\,\max|w|\,/\,T,

one Δ for each group of 64 weights and, with quantised activations, for each token. The transformation s leaves the
full-precision layer as it is, :math:`(x / s)\,(W \odot s)^\top = x\,W^\top`, and moves outliers from x to W. Rounding
passes gradients straight through. γ and s are learnt, weights are not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

GROUP = 64
OPEN = 4.0  # γ at first: σ(4) = 0.98 of the largest weight is kept


def fake_quantise(values: Tensor, bits: int, clip: Tensor | float = 1.0) -> Tensor:
    """Round (..., n) to signed ``bits``-bit levels, one scale for each row of n.

    Args:
        values: what is rounded.
        bits: at least 2.
        clip: share of the largest magnitude that the top level stands for, (..., 1) or a number.

    >>> fake_quantise(torch.tensor([[-3.0, 0.9, 1.6, 3.0]]), bits=3)
    tensor([[-3.,  1.,  2.,  3.]])
    """
    top = 2 ** (bits - 1) - 1
    step: Tensor = (clip * values.abs().amax(-1, keepdim=True) / top).clamp(min=torch.finfo(values.dtype).tiny)
    exact = values / step
    rounded: Tensor = exact + (exact.round() - exact).detach()
    return step * rounded.clamp(-top, top)


class QuantisedLinear(nn.Module):
    """A linear layer that computes with quantised weights, and with quantised inputs where ``input_bits`` is given."""

    def __init__(self, weight: Tensor, bias: Tensor | None, bits: int, input_bits: int | None = None) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.weight, self.bias, self.bits, self.input_bits = weight, bias, bits, input_bits
        self.group = GROUP if inputs % GROUP == 0 else inputs
        self.clip = nn.Parameter(weight.new_full((outputs, inputs // self.group, 1), OPEN))
        self.scale = nn.Parameter(weight.new_zeros(inputs))  # log s
        self.frozen: Tensor | None = None

    def quantised(self) -> Tensor:
        """Return the weight (out, in) that is multiplied with."""
        groups = (self.weight * self.scale.exp()).view(*self.clip.shape[:2], self.group)
        return fake_quantise(groups, self.bits, self.clip.sigmoid()).view_as(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply (..., in) to (..., out)."""
        weight = self.quantised() if self.frozen is None else self.frozen
        given = x.to(weight.dtype) / self.scale.exp()
        given = given if self.input_bits is None else fake_quantise(given, self.input_bits)
        return linear(given, weight, self.bias).to(x.dtype)

    @torch.no_grad()
    def freeze(self) -> None:
        """Keep the quantised weight in place of the one it came from: nothing is learnt from here on."""
        self.frozen, self.weight = self.quantised(), self.weight.new_empty(0)  # a slice would keep it
        self.requires_grad_(False)
