"""Put functions around adapted linear layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from peft import PeftModel
from torch import Tensor

from curvlib.errors import CurvlibError
from curvlib.landscape.directions import Chain, adapted_layers

Below = Callable[[Tensor], Tensor]  # what the layer did before
Around = Callable[[Tensor, Below], Tensor]  # (input, below) -> output


def patch(model: PeftModel, around: Mapping[str, Around]) -> None:
    """Let each named layer compute ``around(x, below)``, for good; patches stack.

    With the adapter switched off a layer does what it did unpatched, so the aligned model stays reachable.

    Raises:
        CurvlibError: the model has no adapted layer of that name.
    """
    layers = adapted_layers(model)
    for name, function in around.items():
        if name not in layers:
            raise CurvlibError(f"the model has no adapted layer {name!r}: adapt all linear layers")
        layers[name].forward = partial(_patched, layers[name], function, layers[name].forward)


def _patched(layer: Any, function: Around, below: Below, x: Tensor, *_: Any, **__: Any) -> Tensor:
    return below(x) if layer.disable_adapters else function(x, below)


def added(chain: Chain, factor: float = 1.0) -> Around:
    r"""Return the patch that adds ``factor`` · :math:`x\,\Delta W^\top` for a ΔW given as one or two matrices."""

    def around(x: Tensor, below: Below) -> Tensor:
        moved = x.to(chain[0].dtype)
        for matrix in reversed(chain):
            moved = moved @ matrix.T
        y = below(x)
        return y + factor * moved.to(y)

    return around


def instead(function: Below) -> Around:
    """Return the patch that computes ``function(x)`` in the layer's place."""
    return lambda x, _: function(x)


def scaled(factor: float) -> Around:
    """Return the patch that multiplies a layer's output."""
    return lambda x, below: factor * below(x)
