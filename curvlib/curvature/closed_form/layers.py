r"""Adapted 4-bit layers, RMS norms and gated units of a model, run in closed form.

For an adapted layer, :math:`y = xW^\top + s\,(xA^\top)B^\top`, with :math:`u = gB` and :math:`h = xA^\top` the gradient
for a cotangent g is

.. math:: g_x = gW + s\,uA, \qquad g_A = s\,u^\top x, \qquad g_B = s\,g^\top h,

and the gradient of :math:`\langle c, g_x\rangle + \langle C_A, g_A\rangle + \langle C_B, g_B\rangle`, with
:math:`p = cA^\top + xC_A^\top` and :math:`q = gC_B`, is

.. math::
    g: cW^\top + s\,(pB^\top + hC_B^\top), \quad x: s\,(uC_A + qA), \quad
    A: s\,(u^\top c + q^\top x), \quad B: s\,g^\top p,

in which every sum is the last step of a matrix product, where autograd makes a pass over the layer's output.
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

from curvlib.curvature.closed_form.functions import Differentiable, Gated, Norm, Slopes, Tensors
from curvlib.nf4 import is_installed, transposable_matmul

WIDE = (torch.float32, torch.float64)
Watch = Callable[[nn.Linear, Tensor, Tensor], None]


@contextmanager
def fused(model: nn.Module, watch: Watch | None = None) -> Iterator[None]:
    """Run the model's adapted 4-bit layers, RMS norms and gated units in closed form, inside the ``with`` block only.

    What has another form (dropout, DoRA, several adapters, a bias, a trained norm, 16-bit numbers) stays as it is, and
    so does a model under gradient checkpointing. Graphs that are made inside may be differentiated outside.

    With ``watch``, an adapted layer's backward pass calls ``watch(map, inputs, output gradients)`` for each of LoRA's
    two maps, with s counted among the inputs of B, and gives their weights no gradient. First derivatives only.
    """
    checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    changed = []  # nothing if what is computed again outside the block must be what it was inside
    for module in model.modules() if not checkpointed else ():
        closed = _NORMS_AND_UNITS.get(type(module).__name__)
        if isinstance(module, LoraLayer) and _is_plain(module):
            closed = partial(_adapted, watch)
        if closed and "forward" not in vars(module):
            vars(module)["forward"] = partial(closed, module)
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del vars(module)["forward"]


def _is_plain(module: Any) -> bool:
    """Tell whether a layer is a bias-free 4-bit one under a single, active, unmerged LoRA adapter in float32."""
    base, active = module.base_layer, module.active_adapters
    if module.disable_adapters or module.merged or len(active) != 1 or active[0] not in module.lora_A:
        return False
    name = active[0]
    plain = isinstance(module.lora_dropout[name], nn.Identity) and name not in module.lora_variant
    pair = (module.lora_A[name], module.lora_B[name])
    single = all(layer.bias is None and layer.weight.dtype == torch.float32 for layer in pair)
    return bool(plain and single and isinstance(base, Linear4bit) and is_installed(base) and base.bias is None)


def _norm(module: Any, x: Tensor) -> Any:
    if x.dtype not in WIDE or module.weight.requires_grad or not x.requires_grad:
        return type(module).forward(module, x)
    return Norm()(x, module.weight, module.variance_epsilon)


def _gated(module: Any, x: Tensor) -> Any:
    if type(module.act_fn).__name__ not in ("SiLU", "SiLUActivation") or x.dtype not in WIDE:
        return type(module).forward(module, x)
    return module.down_proj(Gated()(module.gate_proj(x), module.up_proj(x)))


_NORMS_AND_UNITS: dict[str, Callable[..., Any]] = {  # transformers' classes of those formulas
    **dict.fromkeys(("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm"), _norm),
    **dict.fromkeys(("LlamaMLP", "MistralMLP", "Qwen2MLP"), _gated),
}


def _adapted(watch: Watch | None, module: Any, x: Tensor) -> Any:
    exact = module.base_layer.compute_dtype in (None, torch.float32)  # as a curvature product needs it
    if x.dtype != torch.float32 or not (watch or exact):
        return type(module).forward(module, x)
    name, shape = module.active_adapters[0], x.shape[:-1]
    pair = module.lora_A[name], module.lora_B[name]

    def tell(*tensors: Tensor) -> None:
        x, u, h, g = (tensor.reshape(*shape, -1) for tensor in tensors)
        watch(pair[0], x, u)  # type: ignore[misc]  # called where there is one
        watch(pair[1], h, g)  # type: ignore[misc]

    layer = Adapted(module.base_layer, module.scaling[name], inward=x.requires_grad, tell=tell if watch else None)
    return layer(x.flatten(0, -2), pair[0].weight, pair[1].weight).view(*shape, -1)


class Adapted(Differentiable):
    """An adapted layer of x (T, in), A (r, in) and B (out, r), with scale s; x gets a gradient if ``inward``.

    ``tell`` is called with x, s u, s h and g in the backward pass, in place of gradients for A and B. A product such as
    gᵀh is written (hᵀg)ᵀ: with a tall g it is two to four times as fast on a CPU.
    """

    def __init__(self, layer: Linear4bit, s: float, *, inward: bool, tell: Callable[..., None] | None = None) -> None:
        self.layer, self.s, self.inward, self.tell = layer, s, inward, tell

    def _frozen(self, x: Tensor, *, transposed: bool = False) -> Tensor:
        return transposable_matmul(x.to(self.layer.compute_dtype or x.dtype), self.layer, transposed).to(x.dtype)

    def _value(self, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensors]:
        h = x @ a.T
        return self._frozen(x).addmm_(h, b.T, alpha=self.s), (x, a, b, h)

    def _slope(self, g: Tensor, x: Tensor, a: Tensor, b: Tensor, h: Tensor) -> tuple[Slopes, Tensors]:
        u = g @ b
        back = self._frozen(g, transposed=True).addmm_(u, a, alpha=self.s) if self.inward else None
        if self.tell:
            self.tell(x, self.s * u, self.s * h, g)
            return (back, None, None), ()
        return (back, (u.T @ x).mul_(self.s), (h.T @ g).mul_(self.s).T), (u,)

    def _bend(self, cotangents: Any, g: Tensor, x: Tensor, a: Tensor, b: Tensor, h: Tensor, u: Tensor) -> Slopes:
        (c, ca, cb), s = cotangents, self.s
        p, q = x @ ca.T if c is None else (x @ ca.T).addmm_(c, a.T), g @ cb
        pair = torch.cat((p, h), 1), torch.cat((b, cb), 1).T
        along = (pair[0] @ pair[1]).mul_(s) if c is None else self._frozen(c).addmm_(*pair, alpha=s)
        inward = torch.addmm(x.new_zeros(()), torch.cat((u, q), 1), torch.cat((ca, a)), beta=0, alpha=s)
        down = q.T @ x if c is None else (q.T @ x).addmm_(u.T, c)
        return along, inward, down.mul_(s), (p.T @ g).mul_(s).T
