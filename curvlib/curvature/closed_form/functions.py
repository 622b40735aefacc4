r"""Softmax, cross-entropy, RMS norm and gated unit whose first and second derivative are one step each.

Torch differentiates their derivatives operation by operation, in some twenty passes over arrays as large as the output,
most of them kept in the graph. Here each derivative is one kernel and keeps nothing but its inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, silu, softmax
from torch.overrides import TorchFunctionMode

CHUNK = 1 << 17  # numbers worked on at once: 512 kB in float32 stay in a core's own cache
Tensors = tuple[Tensor, ...]
Slopes = tuple[Tensor | None, ...]


class Differentiable:
    """A function f of tensors that can be differentiated twice, in reverse mode, by three steps on plain tensors.

    ``_value(*inputs)`` returns f and ``saved``: inputs, outputs, and numbers made of them.
    ``_slope(g, *saved)`` returns the gradients of <g, f> for the leading inputs, and more numbers to save.
    ``_bend(c, g, *saved, *more)`` returns those of <c, slope> for g and the leading ones of ``saved``; it counts what
    the numbers owe to the inputs.
    """

    def __call__(self, *inputs: Any) -> Any:
        """Return f(*inputs)."""
        return _First.apply(self, *inputs)  # type: ignore[no-untyped-call]  # torch's apply


class _First(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Any, *inputs: Tensor) -> Any:
        y, saved = function._value(*inputs)
        ctx.save_for_backward(*saved)
        ctx.function, ctx.count = function, len(inputs)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Slopes:
        slopes: Slopes = _Second.apply(ctx.function, grads[0], *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return None, *slopes, *[None] * (ctx.count - len(slopes))


class _Second(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Any, g: Tensor, *saved: Tensor) -> Any:
        slopes, more = function._slope(g, *saved)
        ctx.save_for_backward(g, *saved, *more)
        ctx.function, ctx.count = function, 1 + len(saved)
        return slopes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Slopes:
        bends: Slopes = ctx.function._bend(cotangents, *ctx.saved_tensors)
        return None, *bends, *[None] * (ctx.count - len(bends))


class Softmax(Differentiable):
    r"""Softmax over the last dimension; its slope is :math:`p \odot (g - \langle p, g\rangle)`."""

    def _value(self, x: Tensor) -> tuple[Tensor, Tensors]:
        return (p := softmax(x, -1)), (p,)

    def _slope(self, g: Tensor, p: Tensor) -> tuple[Slopes, Tensors]:
        return (torch._softmax_backward_data(g, p, -1, p.dtype),), ()

    def _bend(self, cotangents: Tensors, g: Tensor, p: Tensor) -> Slopes:
        c, first, second = cotangents[0], *(torch.linalg.vecdot(p, x)[..., None] for x in (g, cotangents[0]))
        return torch._softmax_backward_data(c, p, -1, p.dtype), (g - first).mul_(c).addcmul_(g, second, value=-1)


class CrossEntropy(Differentiable):
    r"""The mean over N rows of logits; the slope is :math:`(p_n - \text{one-hot}_n)/N`, in pieces that stay cached."""

    def _value(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensors]:
        total = torch.logsumexp(logits, dim=1)
        return (total - logits.gather(1, targets[:, None])[:, 0]).mean(), (logits, targets, total)

    def _slope(self, g: Tensor, logits: Tensor, targets: Tensor, total: Tensor) -> tuple[Slopes, Tensors]:
        slope = (logits - total[:, None]).exp_()
        slope[torch.arange(len(targets), device=targets.device), targets] -= 1
        return (slope.mul_(g / len(targets)),), ()

    def _bend(self, cotangents: Tensors, g: Tensor, logits: Tensor, targets: Tensor, total: Tensor) -> Slopes:
        along, result = logits.new_zeros(()), torch.empty_like(logits)
        rows = max(1, CHUNK // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
        parts = (t.split(rows) for t in (cotangents[0], logits, targets, total, result))
        for c, z, target, sums, out in zip(*parts, strict=True):
            torch.sub(z, sums[:, None], out=out).exp_().mul_(c)
            mean = out.sum(dim=1, keepdim=True)
            along += (mean - c.gather(1, target[:, None])).sum()
            torch.sub(z, sums[:, None], out=out).exp_().mul_(c - mean)
        return along / len(targets), result.mul_(g / len(targets))


class Norm(Differentiable):
    r"""The RMS norm :math:`w \odot x\,r` with :math:`r = (\tfrac1d x^\top x + \epsilon)^{-1/2}` and a frozen w.

    With :math:`g' = w \odot g` and :math:`m = \tfrac1d\langle x, g'\rangle` its slope is :math:`r\,g' - r^3 m\,x`.
    """

    def _value(self, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensors]:
        r: Tensor = (torch.linalg.vecdot(x, x) / x.shape[-1] + epsilon).rsqrt_()[..., None]
        return (x * r).mul_(weight), (x, weight, r)

    def _slope(self, g: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> tuple[Slopes, Tensors]:
        inner = g * weight
        m = torch.linalg.vecdot(x, inner)[..., None] / x.shape[-1]
        return (inner.mul_(r).addcmul_(x, r.pow(3) * m, value=-1),), (m,)

    def _bend(self, cotangents: Tensors, g: Tensor, x: Tensor, weight: Tensor, r: Tensor, m: Tensor) -> Slopes:
        (c,), inner, cube = cotangents, g * weight, r.pow(3)
        a, b = (torch.linalg.vecdot(c, other)[..., None] / x.shape[-1] for other in (inner, x))
        along = (c * r).addcmul_(x, cube * b, value=-1).mul_(weight)
        inward = (x * (3 * r.pow(5) * m * b - cube * a)).addcmul_(c, cube * m, value=-1)
        return along, inward.addcmul_(inner, cube * b, value=-1)


class Gated(Differentiable):
    r"""The unit :math:`\mathrm{silu}(x) \odot u`, with :math:`\mathrm{silu}'' = \sigma(1-\sigma)(2 + x(1-2\sigma))`."""

    def _value(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensors]:
        return silu(x).mul_(u), (x, u)

    def _slope(self, g: Tensor, x: Tensor, u: Tensor) -> tuple[Slopes, Tensors]:
        slopes = x.new_empty(x.shape), x.new_empty(x.shape)
        for g_, x_, u_, out_x, out_u in _pieces(g, x, u, *slopes):
            torch.ops.aten.silu_backward.grad_input(g_ * u_, x_, grad_input=out_x)
            torch.mul(silu(x_), g_, out=out_u)
        return slopes, ()

    def _bend(self, cotangents: Tensors, g: Tensor, x: Tensor, u: Tensor) -> Slopes:
        bends = x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape)
        for a, b, g_, x_, u_, out_g, out_x, out_u in _pieces(*cotangents, g, x, u, *bends):
            s = torch.sigmoid(x_)
            f, rest = x_ * s, 1 - s
            slope = (f * rest).add_(s)
            curve = (x_ * (rest - s)).add_(2).mul_(s).mul_(rest)
            steep = a * u_
            torch.mul(steep, slope, out=out_g).addcmul_(b, f)
            torch.mul(a, g_, out=out_u).mul_(slope)
            torch.mul(steep, curve, out=out_x).addcmul_(b, slope).mul_(g_)
        return bends


def _pieces(*tensors: Tensor) -> Iterator[Tensors]:
    """Yield the tensors' elements side by side, as many at once as stay in a CPU's cache; on a GPU all at once."""
    size = CHUNK if tensors[0].device.type == "cpu" else tensors[0].numel()
    return zip(*(tensor.contiguous().view(-1).split(size) for tensor in tensors), strict=True)


class ClosedForm(TorchFunctionMode):
    """Inside the ``with`` block, give ``softmax`` and the mean ``cross_entropy`` their closed forms."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace a call of one of these functions with default options; run any other call as it is."""
        options = kwargs or {}
        if func is cross_entropy and len(args) == 2 and _is_mean(args[0], args[1], options):
            return CrossEntropy()(*args)
        if func is softmax and args and _is_last(args, options):
            return Softmax()(args[0])
        return func(*args, **options)


def _is_mean(logits: Tensor, targets: Tensor, options: dict[str, Any]) -> bool:
    """Tell whether a cross-entropy is the mean over rows of logits that all have a target."""
    usual = {"size_average": None, "ignore_index": -100, "reduce": None, "reduction": "mean", "label_smoothing": 0.0}
    if options.get("weight") is not None or any(options.get(name, value) != value for name, value in usual.items()):
        return False
    whole = logits.ndim == 2 and targets.ndim == 1 and not targets.is_floating_point()
    return whole and logits.requires_grad and bool((targets >= 0).all())


def _is_last(args: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Tell whether a softmax is over the last dimension, its input's format kept."""
    x, dim = args[0], args[1] if len(args) > 1 else options.get("dim")
    same = len(args) < 3 and options.get("dtype") in (None, x.dtype)
    return bool(same and x.requires_grad and dim in (-1, x.ndim - 1))
