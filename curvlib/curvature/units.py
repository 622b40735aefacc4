r"""RMS norms and gated units whose first and second derivative are one step each.

They are :math:`y = w \odot x\,r` with :math:`r = (\tfrac1d x^\top x + \epsilon)^{-1/2}` and frozen w, and
:math:`y = \mathrm{silu}(x) \odot u`, whose derivatives work on pieces that stay in the cache; see
:mod:`curvlib.curvature.fused`, which puts them in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from curvlib.curvature.closed_form import CHUNK


def own_forward(module: Any, x: Tensor) -> Tensor:
    """Run the forward pass of the module's class, whatever stands in its place."""
    forward: Any = type(module).forward
    result: Tensor = forward(module, x)
    return result


def norm(module: Any, x: Tensor) -> Tensor:
    """Run an RMS norm in closed form; what has another form runs its own."""
    if x.dtype not in (torch.float32, torch.float64) or module.weight.requires_grad or not x.requires_grad:
        return own_forward(module, x)
    y: Tensor = _Norm.apply(x, module.weight, module.variance_epsilon)  # type: ignore[no-untyped-call]
    return y


def _inverse_root(x: Tensor, epsilon: float) -> Tensor:
    """Return 1 / √(mean x² + ε) over the last dimension, (…, 1)."""
    root: Tensor = (torch.linalg.vecdot(x, x) / x.shape[-1] + epsilon).rsqrt_()
    return root[..., None]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        r = _inverse_root(x, epsilon)
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        result: Tensor = _NormSlope.apply(grads[0], *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return result, None, None


class _NormSlope(torch.autograd.Function):
    r""":math:`g_x = r\,g' - r^3 m\,x` with :math:`g' = w \odot g` and :math:`m = \tfrac1d\langle x, g'\rangle`."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> Tensor:
        inner = g * weight
        m = torch.linalg.vecdot(x, inner)[..., None] / x.shape[-1]
        ctx.save_for_backward(g, x, weight, r, m)
        return inner.mul_(r).addcmul_(x, r.pow(3) * m, value=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (g, x, weight, r, m), c = ctx.saved_tensors, grads[0]
        inner, cube, d = g * weight, r.pow(3), x.shape[-1]
        a, b = (torch.linalg.vecdot(c, other)[..., None] / d for other in (inner, x))
        along = (c * r).addcmul_(x, cube * b, value=-1).mul_(weight)
        inward = (x * (3 * r.pow(5) * m * b - cube * a)).addcmul_(c, cube * m, value=-1)
        return along, inward.addcmul_(inner, cube * b, value=-1), None, None


def gated(module: Any, x: Tensor) -> Tensor:
    """Run a feed-forward block ``down(silu(gate(x)) * up(x))`` with its gated unit in closed form."""
    y: Tensor = _Gated.apply(module.gate_proj(x), module.up_proj(x))  # type: ignore[no-untyped-call]
    out: Tensor = module.down_proj(y)
    return out


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors' elements side by side, as many at once as stay in the cache."""
    return zip(*(tensor.contiguous().view(-1).split(CHUNK) for tensor in tensors), strict=True)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, u: Tensor) -> Tensor:
        ctx.save_for_backward(x, u)
        return silu(x).mul_(u)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = _GatedSlope.apply(grads[0], *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return found


class _GatedSlope(torch.autograd.Function):
    """The gradients c u f' and c f, with f = silu(x)."""

    @staticmethod
    def forward(ctx: Any, c: Tensor, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(c, x, u)
        first, second = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
        for c_, x_, u_, out, other in _pieces(c, x, u, first, second):
            torch.ops.aten.silu_backward.grad_input(c_ * u_, x_, grad_input=out)
            torch.mul(silu(x_), c_, out=other)
        return first, second

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c, x, u = ctx.saved_tensors
        found = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(3))
        for a, b, c_, x_, u_, out_c, out_x, out_u in _pieces(*cotangents, c, x, u, *found):
            s = torch.sigmoid(x_)
            f, rest = x_ * s, 1 - s
            slope = (f * rest).add_(s)
            bend = (x_ * (rest - s)).add_(2).mul_(s).mul_(rest)  # the second derivative of silu
            steep = a * u_
            torch.mul(steep, slope, out=out_c).addcmul_(b, f)
            torch.mul(a, c_, out=out_u).mul_(slope)
            torch.mul(steep, bend, out=out_x).addcmul_(b, slope).mul_(c_)
        return found[0], found[1], found[2]
