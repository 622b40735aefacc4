r"""Adapted 4-bit layers, RMS norms and gated units whose first and second derivative are one step each.

Hessian products differentiate the gradient's graph. For an adapted layer, :math:`y = xW^\top + s\,(xA^\top)B^\top`,
autograd writes that graph operation by operation: each scaling and each sum of the two paths is a pass over an array
as large as the layer's output, and so is each of their derivatives. With :math:`u = gB` and :math:`h = xA^\top` the
gradient for a cotangent g is

.. math:: g_x = gW + s\,uA, \qquad g_A = s\,u^\top x, \qquad g_B = s\,g^\top h,

and the gradient of :math:`\langle c, g_x\rangle + \langle C_A, g_A\rangle + \langle C_B, g_B\rangle`, with
:math:`p = cA^\top + xC_A^\top` and :math:`q = gC_B`, is

.. math::
    g: cW^\top + s\,(pB^\top + hC_B^\top), \quad x: s\,(uC_A + qA), \quad
    A: s\,(u^\top c + q^\top x), \quad B: s\,g^\top p,

in which every sum is the last step of a matrix product. The same is done for :math:`y = w \odot x\,r`,
:math:`r = (\tfrac1d x^\top x + \epsilon)^{-1/2}`, with frozen w, and for the gated unit
:math:`y = \mathrm{silu}(x) \odot u`, whose derivatives work on pieces that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from curvlib.curvature.closed_form import CHUNK
from curvlib.nf4 import is_installed, transposable_matmul

NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm")  # transformers' classes of that formula
GATED = ("LlamaMLP", "MistralMLP", "Qwen2MLP")  # those that return down(act(gate(x)) * up(x))
Watch = Callable[[nn.Linear, Tensor, Tensor], None]


@contextmanager
def fused(model: nn.Module, watch: Watch | None = None) -> Iterator[None]:
    """Run the model's adapted 4-bit layers, RMS norms and gated units in closed form, inside the ``with`` block only.

    What has another form (dropout, DoRA, several adapters, a bias, a trained norm, 16-bit numbers) stays as it is, and
    so does a model under gradient checkpointing.
    Graphs that are made inside the block may be differentiated outside it. Only reverse mode is supported.

    With ``watch``, an adapted layer's backward pass calls ``watch(map, inputs, output gradients)`` for each of LoRA's
    two maps, with s counted among the inputs of B, and gives their weights no gradient. First derivatives only.
    """
    changed, modules = [], list(model.modules())
    if any(getattr(module, "gradient_checkpointing", False) for module in modules):
        modules = []  # what is computed again outside the block must be what it was inside
    for module in modules:
        replacement = _replacement(module, watch)
        if replacement and "forward" not in vars(module):
            vars(module)["forward"] = replacement
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del vars(module)["forward"]


def _replacement(module: nn.Module, watch: Watch | None) -> Any:
    if type(module).__name__ in NORMS:
        return partial(_norm, module)
    if type(module).__name__ in GATED and type(module.act_fn).__name__ in ("SiLU", "SiLUActivation"):
        return partial(_gated, module)
    if not isinstance(module, LoraLayer) or not _is_plain(module):
        return None
    if watch:
        return partial(_watched, module, watch)
    return partial(_adapted, module) if module.base_layer.compute_dtype in (None, torch.float32) else None


def _is_plain(module: Any) -> bool:
    """Tell whether a layer is a bias-free 4-bit one under a single, active, unmerged LoRA adapter in float32."""
    base, active = module.base_layer, module.active_adapters
    if module.disable_adapters or module.merged or len(active) != 1 or active[0] not in module.lora_A:
        return False
    name = active[0]
    plain = isinstance(module.lora_dropout[name], nn.Identity) and name not in module.lora_variant
    pair = (module.lora_A[name], module.lora_B[name])
    single = all(layer.bias is None and layer.weight.dtype == torch.float32 for layer in pair)
    fits = isinstance(base, Linear4bit) and is_installed(base) and base.bias is None
    return bool(plain and single and fits)


def _adapted(module: Any, x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        return _original(module, x)
    name = module.active_adapters[0]
    weights = module.lora_A[name].weight, module.lora_B[name].weight
    y: Tensor = _Adapted.apply(x.flatten(0, -2), *weights, module.base_layer, module.scaling[name])  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


def _original(module: Any, x: Tensor) -> Tensor:
    forward: Any = type(module).forward
    result: Tensor = forward(module, x)
    return result


def _watched(module: Any, watch: Watch, x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        return _original(module, x)
    name = module.active_adapters[0]
    pair, shape = (module.lora_A[name], module.lora_B[name]), x.shape[:-1]

    def seen(*inputs_and_gradients: Tensor) -> None:
        x, u, h, g = (tensor.reshape(*shape, -1) for tensor in inputs_and_gradients)
        watch(pair[0], x, u)
        watch(pair[1], h, g)

    weights = (layer.weight for layer in pair)
    y: Tensor = _Watched.apply(x.flatten(0, -2), *weights, module.base_layer, module.scaling[name], seen)  # type: ignore[no-untyped-call]
    return y.view(*shape, -1)


def _product(x: Tensor, layer: Linear4bit, transposed: bool) -> Tensor:
    """Multiply by a frozen weight in the layer's own dtype; the result has that of x."""
    return transposable_matmul(x.to(layer.compute_dtype or x.dtype), layer, transposed).to(x.dtype)


class _Watched(torch.autograd.Function):
    """An adapted layer that tells what LoRA's maps read and receive, and has no gradient for their weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, layer: Linear4bit, s: float, seen: Any) -> Tensor:
        h = (x @ a.T).mul_(s)
        ctx.save_for_backward(x, a, b, h)
        ctx.rest = layer, s, seen
        return _product(x, layer, False).addmm_(h, b.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, a, b, h), (layer, s, seen), g = ctx.saved_tensors, ctx.rest, grads[0]
        u = (g @ b).mul_(s)
        seen(x, u, h, g)
        back = _product(g, layer, True).addmm_(u, a) if ctx.needs_input_grad[0] else None
        return back, None, None, None, None, None


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, layer: Linear4bit, s: float) -> Tensor:
        h = x @ a.T
        ctx.save_for_backward(x, a, b, h)
        ctx.rest = layer, s
        return transposable_matmul(x, layer).addmm_(h, b.T, alpha=s)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        found = _AdaptedSlope.apply(grads[0], *ctx.saved_tensors, *ctx.rest, ctx.needs_input_grad[0])  # type: ignore[no-untyped-call]
        return *found, None, None


class _AdaptedSlope(torch.autograd.Function):
    """The gradient of an adapted layer with respect to x (None if it is not wanted), A and B.

    ``h`` is given as a number that was computed before; its own dependence on x and A is in the derivatives.
    A product such as gᵀh is written (hᵀg)ᵀ: with a tall g it is two to four times as fast on a CPU.
    """

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, a: Tensor, b: Tensor, h: Tensor, layer: Linear4bit, s: float, wanted: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        u = g @ b
        ctx.save_for_backward(g, x, a, b, u, h)
        ctx.rest = layer, s
        back = transposable_matmul(g, layer, transposed=True).addmm_(u, a, alpha=s) if wanted else None
        return back, (u.T @ x).mul_(s), (h.T @ g).mul_(s).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        (g, x, a, b, u, h), (layer, s) = ctx.saved_tensors, ctx.rest
        c, ca, cb = cotangents
        assert ca is not None
        assert cb is not None
        p, q = x @ ca.T, g @ cb
        if c is not None:
            p.addmm_(c, a.T)
        pair = torch.cat((p, h), 1), torch.cat((b, cb), 1).T
        along = transposable_matmul(c, layer).addmm_(*pair, alpha=s) if c is not None else (pair[0] @ pair[1]).mul_(s)
        inward = torch.addmm(x.new_zeros(()), torch.cat((u, q), 1), torch.cat((ca, a)), beta=0, alpha=s)
        down = q.T @ x if c is None else (q.T @ x).addmm_(u.T, c)
        return along, inward, down.mul_(s), (p.T @ g).mul_(s).T, None, None, None, None


def _norm(module: Any, x: Tensor) -> Tensor:
    if x.dtype not in (torch.float32, torch.float64) or module.weight.requires_grad or not x.requires_grad:
        return _original(module, x)
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


def _gated(module: Any, x: Tensor) -> Tensor:
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
