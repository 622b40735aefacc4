r"""Forward-mode derivatives along a direction in parameter space.

A tangent v is put on the parameters themselves, so any function that reads them (a whole language model, called as
usual) carries the derivative :math:`\dot f = J_f\,v` along with its value at about the cost of a second evaluation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad

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


@torch.no_grad()
def jacobian_vector_product(function: Callable[[], Tensor], parameters: Tensors, v: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return :math:`f(\theta)` and :math:`J_f v`, of the same shape, from one pass that stores no graph."""
    with tangents(parameters, v):
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
