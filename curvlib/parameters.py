"""The trainable parameters of a model as one flat vector, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from curvlib.errors import CurvlibError

Tensors = Mapping[str, Tensor] | Iterable[Tensor]


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Return name -> parameter for every parameter that requires a gradient, in the model's order.

    Raises:
        CurvlibError: the model has none.
    """
    parameters: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise CurvlibError("no parameter of the model is trainable, expected at least one: add adapters to it")
    return parameters


def tensor_list(tensors: Tensors) -> list[Tensor]:
    """Return the tensors of a mapping or an iterable, in order."""
    return list(tensors.values() if isinstance(tensors, Mapping) else tensors)


def flatten(tensors: Tensors) -> Tensor:
    """Concatenate tensors into one detached copy of shape (P,).

    >>> flatten([torch.zeros(2, 1), torch.ones(1)])
    tensor([0., 0., 1.])
    """
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensor_list(tensors)])


def unflatten(vector: Tensor, like: Tensors) -> list[Tensor]:
    """Cut a vector (P,) into pieces with the shapes and dtypes of ``like``; views where the dtype is the same.

    Raises:
        CurvlibError: the sizes differ.
    """
    tensors = tensor_list(like)
    sizes = [tensor.numel() for tensor in tensors]
    if vector.shape != (sum(sizes),):
        raise CurvlibError(
            f"a vector of shape {tuple(vector.shape)} was given, expected ({sum(sizes)},) for these parameters"
        )
    pieces = vector.split(sizes)
    return [piece.view(tensor.shape).to(tensor) for piece, tensor in zip(pieces, tensors, strict=True)]


@torch.no_grad()
def assign(parameters: Tensors, vector: Tensor) -> None:
    """Copy a vector (P,) into the parameters, in place."""
    for parameter, piece in zip(targets := tensor_list(parameters), unflatten(vector, targets), strict=True):
        parameter.copy_(piece)


@contextmanager
def shifted(parameters: Tensors, vector: Tensor) -> Iterator[None]:
    """Add a vector (P,) to the parameters inside the ``with`` block; always restore them bit by bit."""
    targets = tensor_list(parameters)
    before = [parameter.detach().clone() for parameter in targets]
    pieces = unflatten(vector, targets)
    try:
        with torch.no_grad():
            for parameter, piece in zip(targets, pieces, strict=True):
                parameter.add_(piece)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(targets, before, strict=True):
                parameter.copy_(value)
