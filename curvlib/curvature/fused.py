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

in which every sum is the last step of a matrix product. Norms and gated units are in :mod:`curvlib.curvature.units`.
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

from curvlib.curvature.units import gated, norm, own_forward
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
        return partial(norm, module)
    if type(module).__name__ in GATED and type(module.act_fn).__name__ in ("SiLU", "SiLUActivation"):
        return partial(gated, module)
    if not isinstance(module, LoraLayer) or not _is_plain(module):
        return None
    exact = module.base_layer.compute_dtype in (
        None,
        torch.float32,
    )  # as a curvature product needs it
    return partial(_adapted, module, watch) if watch or exact else None


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


def _adapted(module: Any, watch: Watch | None, x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        return own_forward(module, x)
    name, shape = module.active_adapters[0], x.shape[:-1]
    pair = module.lora_A[name], module.lora_B[name]
    given = (x.flatten(0, -2), pair[0].weight, pair[1].weight, module.base_layer, module.scaling[name])

    def seen(*inputs_and_gradients: Tensor) -> None:
        assert watch
        x, u, h, g = (tensor.reshape(*shape, -1) for tensor in inputs_and_gradients)
        watch(pair[0], x, u)
        watch(pair[1], h, g)

    y: Tensor = _Watched.apply(*given, seen) if watch else _Adapted.apply(*given)  # type: ignore[no-untyped-call]
    return y.view(*shape, -1)


class _Watched(torch.autograd.Function):
    """An adapted layer that tells what LoRA's maps read and receive, and has no gradient for their weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, layer: Linear4bit, s: float, seen: Any) -> Tensor:
        h = (x @ a.T).mul_(s)
        ctx.save_for_backward(x, a, b, h)
        ctx.rest = layer, s, seen
        y: Tensor = layer(x)
        return y.addmm_(h, b.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, a, b, h), (layer, s, seen), g = ctx.saved_tensors, ctx.rest, grads[0]
        u = (g @ b).mul_(s)
        seen(x, u, h, g)
        back = None
        if ctx.needs_input_grad[0]:
            back = transposable_matmul(g.to(layer.compute_dtype or g.dtype), layer, transposed=True).to(g.dtype)
            back.addmm_(u, a)
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
