r"""Second derivatives of SiLU, softmax and cross-entropy in closed form, for reverse-over-reverse products.

Under ``create_graph`` torch takes the derivative of SiLU, and differentiates that of the log-softmax, operation by
operation: some twenty passes over arrays as large as the layer's output, most of them kept in the graph. With
:math:`\sigma` the logistic function and :math:`p = \mathrm{softmax}(z)`,

.. math::
    \mathrm{silu}''(x) = \sigma(1-\sigma)\bigl(2 + x(1-2\sigma)\bigr), \qquad
    \nabla^2_z \,\overline{\mathrm{CE}} = \tfrac1N (\mathrm{diag}(p_n) - p_n p_n^\top),

so that first and second derivative need one kernel each and keep nothing but their inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, silu, softmax
from torch.overrides import TorchFunctionMode

CHUNK = 1 << 17  # numbers worked on at once: 512 kB in float32 stay in a core's own cache


class ClosedForm(TorchFunctionMode):
    """Inside the ``with`` block, give ``silu``, ``softmax`` and the mean ``cross_entropy`` their closed forms."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace a call of one of these functions with default options; run any other call as it is."""
        options = kwargs or {}
        if not args:  # all are named: not how models call them
            return func(**options)
        if func is silu and not options.get("inplace") and args[0].requires_grad:
            return _Silu.apply(args[0])  # type: ignore[no-untyped-call]  # torch's apply
        if func is cross_entropy and _is_plain(args, options):
            return _CrossEntropy.apply(*args)  # type: ignore[no-untyped-call]
        if func is softmax and _is_last(args, options):
            return _Softmax.apply(args[0])  # type: ignore[no-untyped-call]
        return func(*args, **options)


def _is_plain(args: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Tell whether a cross-entropy is the mean over rows of logits that all have a target."""
    usual = {"size_average": None, "ignore_index": -100, "reduce": None, "reduction": "mean", "label_smoothing": 0.0}
    if len(args) != 2 or any(options[name] != value for name, value in usual.items() if name in options):
        return False
    logits, targets = args
    whole = logits.ndim == 2 and targets.ndim == 1 and not targets.is_floating_point() and bool((targets >= 0).all())
    return whole and logits.requires_grad and options.get("weight") is None


def _is_last(args: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Tell whether a softmax is over the last dimension, its input's format kept."""
    x, dim = args[0], args[1] if len(args) > 1 else options.get("dim")
    kept = len(args) < 3 and options.get("dtype") in (None, x.dtype)
    return bool(kept and x.requires_grad and dim in (-1, x.ndim - 1))


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        p = softmax(x, -1)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        result: Tensor = _SoftmaxSlope.apply(grads[0], *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return result


class _SoftmaxSlope(torch.autograd.Function):
    r"""The product :math:`p \odot (u - \langle p, u\rangle)` of softmax's symmetric Jacobian with u, linear in u."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, p: Tensor) -> Tensor:
        ctx.save_for_backward(u, p)
        result: Tensor = torch._softmax_backward_data(u, p, -1, p.dtype)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (u, p), w = ctx.saved_tensors, grads[0]
        first, second = (torch.linalg.vecdot(p, other)[..., None] for other in (u, w))
        return torch._softmax_backward_data(w, p, -1, p.dtype), (u - first).mul_(w).addcmul_(u, second, value=-1)


class _Silu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return silu(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        result: Tensor = _SiluSlope.apply(grads[0], x)  # type: ignore[no-untyped-call]
        return result


class _SiluSlope(torch.autograd.Function):
    """The product of u with silu'(x), linear in u."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(u, x)
        result: Tensor = torch.ops.aten.silu_backward(u, x)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        u, x = ctx.saved_tensors
        w = grads[0]
        return torch.ops.aten.silu_backward(w, x), silu_curvature(w, u, x)


def silu_curvature(w: Tensor, u: Tensor, x: Tensor) -> Tensor:
    """Return w · u · silu''(x), elementwise, all of one shape.

    >>> one = torch.ones(1, dtype=torch.float64)
    >>> silu_curvature(one, one, 0 * one)
    tensor([0.5000], dtype=torch.float64)
    """
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    flat = (t.contiguous().view(-1) for t in (w, u, x, result))
    for w_part, u_part, x_part, out in zip(*(t.split(CHUNK) for t in flat), strict=True):
        s = torch.sigmoid(x_part)
        torch.mul(s, -2, out=out).add_(1).mul_(x_part).add_(2).mul_(s)
        out.mul_(s.neg_().add_(1)).mul_(u_part).mul_(w_part)
    return result


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        total = torch.logsumexp(logits, dim=1)
        ctx.save_for_backward(logits, targets, total)
        return (total - logits.gather(1, targets[:, None])[:, 0]).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        result: Tensor = _CrossEntropySlope.apply(grads[0], *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return result, None


class _CrossEntropySlope(torch.autograd.Function):
    """The product of the scalar u with (p - one-hot) / N, linear in u."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, logits: Tensor, targets: Tensor, total: Tensor) -> Tensor:
        ctx.save_for_backward(u, logits, targets, total)
        slope = (logits - total[:, None]).exp_()
        slope[torch.arange(len(targets), device=targets.device), targets] -= 1
        return slope.mul_(u / len(targets))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        u, logits, targets, total = ctx.saved_tensors
        w = grads[0]
        along = logits.new_zeros(())
        result = torch.empty_like(logits)
        rows = max(1, CHUNK // logits.shape[1])
        parts = (t.split(rows) for t in (w, logits, targets, total, result))
        for w_part, z, target, sums, out in zip(*parts, strict=True):
            torch.sub(z, sums[:, None], out=out).exp_().mul_(w_part)
            mean = out.sum(dim=1, keepdim=True)
            along += (mean - w_part.gather(1, target[:, None])).sum()
            torch.sub(z, sums[:, None], out=out).exp_().mul_(w_part - mean)
        return along / len(targets), result.mul_(u / len(targets)), None, None
