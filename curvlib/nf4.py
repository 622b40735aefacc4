r"""4-bit linear map closed under transposition, so that every derivative of it is itself.

A frozen 4-bit layer computes :math:`y = x\,W^\top` with :math:`W = \mathrm{deq}(q)`. It is linear in x, hence

.. math:: \text{vjp}: u \mapsto u\,W, \qquad \text{jvp}: \dot x \mapsto \dot x\,W^\top,

and the derivatives of those are the same two maps again. One autograd Function with a ``transposed`` flag therefore
serves derivatives of every order. It dequantises when called and keeps only a reference to the 4-bit weight, whereas
differentiating bitsandbytes' own backward (``create_graph=True``) keeps every dequantised weight alive.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeVar

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from bitsandbytes.nn.modules import _convert_weight_packed_for_cpu_inverse
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from curvlib.errors import CurvlibError

KEPT_BYTES = 2 * 2**30  # dequantised weights that take more are not kept
_KEPT = "_kept_weight"
T = TypeVar("T", bound=nn.Module)


def dequantise(layer: Linear4bit) -> Tensor:
    """Return the weight (out, in) of a 4-bit layer in the dtype it was quantised from; a new tensor at each call."""
    weight: Any = layer.weight  # a Params4bit
    dense: Tensor = dequantize_4bit(weight.data.view(-1, 1), weight.quant_state or layer.quant_state)
    return dense


def four_bit_layers(model: nn.Module) -> dict[str, Linear4bit]:
    """Return name -> layer for every 4-bit linear layer of the model, in its order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def sharing(model: T) -> T:
    """Return a frozen model again, with layers of its own to adapt or to hook, and the very same weights."""
    states = [layer.quant_state for layer in four_bit_layers(model).values()]
    return copy.deepcopy(model, {id(part): part for part in (*model.parameters(), *model.buffers(), *states)})


class TransposableMatmul(torch.autograd.Function):
    r"""Compute :math:`x\,W^\top` (or :math:`x\,W` where ``transposed``) for a frozen 4-bit W of shape (out, in).

    Shapes: x (..., in) gives (..., out); transposed, x (..., out) gives (..., in). Cost: one dequantisation, unless
    :func:`kept_weights` has done it, and one matrix product. Nothing is saved but the reference to the layer; exact
    under grad of grad, jvp, vjp and vmap.
    """

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor, layer: Linear4bit, transposed: bool) -> Tensor:
        """Dequantise, multiply, forget."""
        kept = vars(layer).get(_KEPT)
        weight = (dequantise(layer) if kept is None else kept).to(x.dtype)
        return x @ weight if transposed else nn.functional.linear(x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Linear4bit, bool], output: Tensor) -> None:
        """Keep the layer and the flag; no tensor is saved."""
        _, ctx.layer, ctx.transposed = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Apply the transposed map to the cotangent."""
        return transposable_matmul(grads[0], ctx.layer, not ctx.transposed), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        """Apply the same map to the tangent."""
        return transposable_matmul(tangents[0], ctx.layer, ctx.transposed)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None, None], x: Tensor, layer: Linear4bit, transposed: bool) -> Any:
        """Treat the mapped dimension as one more row dimension."""
        return transposable_matmul(x.movedim(in_dims[0], 0), layer, transposed), 0


def transposable_matmul(x: Tensor, layer: Linear4bit, transposed: bool = False) -> Tensor:
    """Apply :class:`TransposableMatmul`."""
    result: Tensor = TransposableMatmul.apply(x, layer, transposed)  # type: ignore[no-untyped-call]  # torch's apply
    return result


def _forward(layer: Linear4bit, x: Tensor) -> Tensor:
    """Replace ``Linear4bit.forward``: same result and dtypes, and never a repacked weight."""
    dtype = x.dtype if layer.compute_dtype is None else layer.compute_dtype
    y = transposable_matmul(x.to(dtype), layer)
    return (y if layer.bias is None else y + layer.bias.to(dtype)).to(x.dtype)


def _slot(layer: nn.Module) -> str:
    """Name the attribute that holds a layer's own forward: accelerate's hooks on a spread-out model move it aside."""
    return "_old_forward" if "_old_forward" in vars(layer) else "forward"


def is_installed(layer: nn.Module) -> bool:
    """Tell whether :func:`install` has reached this layer."""
    return getattr(vars(layer).get(_slot(layer)), "__func__", None) is _forward


class Handle:
    """Undo an :func:`install`, by ``remove()`` or at the end of a ``with`` block."""

    def __init__(self, layers: list[Linear4bit]) -> None:
        self.layers = layers

    def remove(self) -> None:
        """Give every layer its own forward back; harmless when repeated."""
        for layer in self.layers:
            vars(layer)[_slot(layer)] = MethodType(type(layer).forward, layer)
        self.layers = []

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _check(model: nn.Module) -> list[Linear4bit]:
    """Return the model's 4-bit layers, refusing what this module cannot differentiate."""
    for name, module in model.named_modules():
        if isinstance(module, Linear8bitLt):
            raise CurvlibError(
                f"layer '{name}' is 8-bit (Linear8bitLt), expected 4-bit: load the model with load_in_4bit=True"
            )
    layers = list(four_bit_layers(model).values())
    for layer in layers:
        if getattr(layer.weight, "quant_state", None) is None and layer.quant_state is None:
            raise CurvlibError("a Linear4bit layer is not quantised yet: move the model to its device before install()")
    return layers


def _unpack(layer: Linear4bit) -> None:
    """Undo the in-place AVX512-BF16 repacking that ``Linear4bit`` does in eval(), if it has happened already."""
    weight: Any = layer.weight
    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)


def install(model: nn.Module) -> Handle:
    """Make every ``Linear4bit`` of the model differentiable to any order, in place, on CPU and CUDA.

    The layers' parameters, names and state dict stay as they are; only ``forward`` is replaced on each instance, so
    PEFT adapters may be added before or after. A second call changes nothing. A model without 4-bit layers is accepted.

    Raises:
        CurvlibError: an 8-bit layer, or a 4-bit layer that is not quantised yet.
    """
    layers = _check(model)
    for layer in layers:
        _unpack(layer)
        vars(layer)[_slot(layer)] = MethodType(_forward, layer)
    return Handle(layers)


@contextmanager
def kept_weights(model: nn.Module) -> Iterator[None]:
    """Dequantise the model's 4-bit weights once for the ``with`` block, instead of once a product; same results.

    It pays on a CPU, most where a product has few tokens. Memory: the dense weights, 0.4 GB for SmolLM2; a model that
    needs more than ``KEPT_BYTES`` keeps none, nor does one on CUDA. Inside another such block nothing is done. The
    weights must not be replaced inside.
    """
    layers = [layer for layer in four_bit_layers(model).values() if is_installed(layer) and _KEPT not in vars(layer)]
    layers = [layer for layer in layers if layer.weight.device.type == "cpu"]
    if sum(4 * layer.in_features * layer.out_features for layer in layers) > KEPT_BYTES:
        layers = []
    try:
        for layer in layers:
            vars(layer)[_KEPT] = dequantise(layer)
        yield
    finally:
        for layer in layers:
            vars(layer).pop(_KEPT, None)


@contextmanager
def bfloat16_products(model: nn.Module) -> Iterator[None]:
    """Multiply by the model's 4-bit weights in bfloat16 inside the ``with`` block, where its processor is made for it.

    A product is summed in float32 and rounded to bfloat16 (relative error 0.4 %); all else keeps its dtype. About twice
    as fast for each product on AVX512-BF16 or AMX. On other CPUs, where it would be slower, nothing changes. First
    derivatives only: curvature products in bfloat16 are 4 to 12 % off.
    """
    fast = ("cpu", "cuda") if _multiplies_bfloat16() else ("cuda",)
    layers = [layer for layer in four_bit_layers(model).values() if layer.weight.device.type in fast]
    chosen = [(layer, layer.compute_dtype) for layer in layers]
    for layer, _ in chosen:
        layer.compute_dtype = torch.bfloat16
    try:
        yield
    finally:
        for layer, dtype in chosen:
            layer.compute_dtype = dtype


def _multiplies_bfloat16() -> bool:
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def settings(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the settings of NF4 with double quantisation and products in ``dtype``."""
    options: dict[str, Any] = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **options)  # type: ignore[no-untyped-call]
