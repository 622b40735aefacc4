r"""Forward-mode derivatives along a direction in parameter space.

A tangent v is put on the parameters themselves, so any function that reads them (a whole language model, called as
usual) carries the derivative :math:`\dot f = J_f\,v` along with its value at about the cost of a second evaluation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from curvlib.parameters import Tensors, tensor_list, unflatten


@contextmanager
def tangents(parameters: Tensors, v: Tensor) -> Iterator[None]:
    """Let each parameter carry its piece of v (P,) as forward-mode tangent inside the ``with`` block.

    The values are written over themselves, in place, since this is how a tangent gets onto an existing tensor; they do
    not change, and the tangents vanish at the end of the block. Blocks do not nest.
    """
    targets = tensor_list(parameters)
    pieces = unflatten(v, targets)
    with forward_ad.dual_level():
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit.script`", DeprecationWarning)  # torch 2.13's own first use
            for parameter, piece in zip(targets, pieces, strict=True):
                parameter.copy_(forward_ad.make_dual(parameter.detach(), piece.contiguous()))
        yield


def tangent_of(value: Tensor) -> Tensor:
    """Return the tangent that a value carries inside :func:`tangents`; zeros if it depends on no parameter."""
    tangent = forward_ad.unpack_dual(value).tangent
    return torch.zeros_like(value) if tangent is None else tangent


class FrozenLinear(TorchFunctionMode):
    r"""Inside the ``with`` block, carry a tangent through a frozen linear map as :math:`\dot y = \dot x\,W^\top` alone.

    torch's own rule adds :math:`x\,\dot W^\top` with a W of zeros: half as much work again, and a dense copy of the
    zeros inside the kernel, once for each chat where x is a slice, as at a language model's output layer.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace ``linear`` where neither weight nor bias is trained; leave everything else."""
        if func is linear and not kwargs and not any(map(_moves, args[1:])):
            value, tangent = forward_ad.unpack_dual(args[0])
            if tangent is not None:
                return forward_ad.make_dual(linear(value, *args[1:]), linear(tangent, args[1]))
        return func(*args, **(kwargs or {}))


def _moves(weight: Tensor | None) -> bool:
    """Tell whether a weight is trained, or made of one that is (peft adapts a router's weight so)."""
    return weight is not None and (weight.requires_grad or forward_ad.unpack_dual(weight).tangent is not None)


@torch.no_grad()
def jacobian_vector_product(function: Callable[[], Tensor], parameters: Tensors, v: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return :math:`f(\theta)` and :math:`J_f v`, of the same shape, from one pass that stores no graph."""
    with tangents(parameters, v), FrozenLinear():
        value = function()
        return forward_ad.unpack_dual(value).primal.clone(), tangent_of(value).clone()


def vector_jacobian_product(function: Callable[[], Tensor], parameters: Tensors, u: Tensor) -> Tensor:
    r"""Return :math:`J_f^\top u` as one vector (P,), for u of the shape of the function's value: one gradient."""
    targets = tensor_list(parameters)
    with torch.enable_grad():
        value = function()
    return flat_gradient(value, targets, u)


def flat_gradient(
    value: Tensor | Sequence[Tensor], parameters: list[Tensor], u: Tensor | Sequence[Tensor] | None = None
) -> Tensor:
    """Return the gradient of value, or of the sum of value * u, as one vector (P,); zeros where there is none."""
    grads = torch.autograd.grad(value, parameters, u, materialize_grads=True)
    return torch.cat([grad.reshape(-1) for grad in grads])
