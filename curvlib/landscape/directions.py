r"""Directions in effective-weight space, and steps along them that leave every parameter as it is.

The effective weight of an adapted layer is :math:`W = \mathrm{deq}(q) + s\,BA`. A direction gives each layer a
:math:`\Delta W` (out, in), never a change of A and B: (A/c, cB) is the same model, and a slice must not tell the two
apart. A step adds :math:`c\,x\,\Delta W^\top` to a layer's output by a forward hook, so a 4-bit weight is neither
copied nor written. Normalisation: Li et al., arXiv 1712.09913.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from curvlib import nf4
from curvlib.errors import CurvlibError

Chain = tuple[Tensor, ...]  # matrices whose product is ΔW: (ΔW,) or (left (out, r), right (r, in))


@dataclass(frozen=True)
class Direction:
    r"""A :math:`\Delta W` for each layer: name -> (:math:`\Delta W`,) dense, or (left (out, r), right (r, in)).

    >>> step = Direction({"layer": (torch.ones(2, 1), torch.ones(1, 3))})
    >>> (step + 2 * step).delta("layer")
    tensor([[3., 3., 3.],
            [3., 3., 3.]])
    """

    chains: dict[str, Chain]

    def delta(self, name: str) -> Tensor:
        r"""Return the dense :math:`\Delta W` (out, in) of one layer."""
        first, *rest = self.chains[name]
        return first @ rest[0] if rest else first

    def norm(self, name: str) -> float:
        r"""Return the Frobenius norm of one layer's :math:`\Delta W`, without forming it where it is low-rank."""
        return float(_row_norms(self.chains[name]).norm())

    @property
    def size(self) -> float:
        """The Frobenius norm over all layers together."""
        return float(torch.tensor([self.norm(name) for name in self.chains]).norm())

    def map(self, factor: Callable[[str], Tensor | float]) -> Direction:
        """Return the direction with each layer's left matrix multiplied by ``factor(name)``: a number or (out, 1)."""
        return Direction({name: (factor(name) * first, *rest) for name, (first, *rest) in self.chains.items()})

    def __rmul__(self, factor: float) -> Direction:
        return self.map(lambda _: factor)

    def __add__(self, other: Direction) -> Direction:
        chains = {**self.chains, **other.chains}
        for name in self.chains.keys() & other.chains.keys():
            first, second = self.chains[name], other.chains[name]
            thin = len(first) == len(second) == 2
            joined = (torch.cat((first[0], second[0]), 1), torch.cat((first[-1], second[-1]))) if thin else ()
            chains[name] = joined or (self.delta(name) + other.delta(name),)
        return Direction(chains)

    def __sub__(self, other: Direction) -> Direction:
        return self + -1.0 * other


def _row_norms(chain: Chain) -> Tensor:
    r"""Return the norm of each row of :math:`\Delta W`, (out,); cost: one product of left with an r × r matrix."""
    left, *right = chain
    squares = (left @ (right[0] @ right[0].T) * left).sum(1) if right else left.square().sum(1)
    return squares.clamp(min=0).sqrt()


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return name -> layer for every linear layer but the output layer, adapted or not.

    The names are those of the model without adapters, so that directions fit the model with and without them.

    Raises:
        CurvlibError: there is none.
    """
    core: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    head = getattr(core, "get_output_embeddings", lambda: None)()
    found: dict[str, Any] = {}
    for name, module in core.named_modules():
        parent = name.rpartition(".")[0]
        inside = any(parent == outer or parent.startswith(f"{outer}.") for outer in found)
        if isinstance(module, (LoraLayer, nn.Linear)) and module is not head and not inside:
            found[name] = module
    if not found:
        raise CurvlibError(f"{type(model).__name__} has no linear layer, expected a model made of nn.Linear layers")
    return found


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Return name -> linear layer, of those that an adapter is around."""
    return {name: layer for name, layer in linear_layers(model).items() if hasattr(layer, "lora_B")}


@torch.no_grad()
def effective_weight(layer: nn.Module) -> Tensor:
    r"""Return :math:`\mathrm{deq}(q) + s\,BA` (out, in) of a layer in float32 or wider; a new tensor at each call."""
    adapted: Any = layer
    inner: Any = adapted.base_layer if isinstance(layer, LoraLayer) else layer
    weight: Tensor = nf4.dequantise(inner) if isinstance(inner, Linear4bit) else inner.weight
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if isinstance(layer, LoraLayer) and not adapted.disable_adapters:
        weight = weight + adapted.get_delta_weight(adapted.active_adapters[0])
    return weight.clone()


def random_direction(
    model: nn.Module, *, seed: int, rank: int = 8, normalise: Literal["row", "layer"] = "row"
) -> Direction:
    r"""Return a random direction of the given rank, as large as the model's own weights.

    Left and right are standard normal; then each row of :math:`\Delta W` (``row``), or each whole layer (``layer``),
    gets the norm of the same row or layer of the effective weight. So the direction does not change when LoRA factors
    are rescaled, and follows where a layer is. A full-rank direction of SmolLM2 would take 425 MB, this one 11 MB.
    """
    generator = torch.Generator().manual_seed(seed)
    chains: dict[str, Chain] = {}
    for name, layer in linear_layers(model).items():
        weight = effective_weight(layer)
        draws = (
            torch.randn(weight.shape[0], rank, generator=generator),
            torch.randn(rank, weight.shape[1], generator=generator),
        )
        left, right = (draw.to(weight) for draw in draws)
        wanted, given = weight.norm(dim=1), _row_norms((left, right))
        scale = wanted / given if normalise == "row" else wanted.norm() / given.norm()
        chains[name] = (left * scale.reshape(-1, 1), right)
    return Direction(chains)


def random_like(direction: Direction, *, seed: int, rank: int = 8) -> Direction:
    r"""Return a random direction with the same norm in every layer: the null control for a fine-tuning step."""
    generator = torch.Generator().manual_seed(seed)
    chains: dict[str, Chain] = {}
    for name, (left, *right) in direction.chains.items():
        inputs = right[0].shape[1] if right else left.shape[1]
        draws = (torch.randn(len(left), rank, generator=generator), torch.randn(rank, inputs, generator=generator))
        chains[name] = tuple(draw.to(left) for draw in draws)
    drawn = Direction(chains)
    return drawn.map(lambda name: direction.norm(name) / drawn.norm(name))


@torch.no_grad()
def adapter_direction(model: PeftModel) -> Direction:
    r"""Return the active adapter's :math:`\Delta W = s\,BA` of each adapted layer, as (s B, A)."""
    chains: dict[str, Chain] = {}
    for name, layer in adapted_layers(model).items():
        adapter = layer.active_adapters[0]
        down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        chains[name] = (layer.scaling[adapter] * up.detach(), down.detach().clone())
    return Direction(chains)


@torch.no_grad()
def multiply_adapter(model: PeftModel, factor: Callable[[str], float | Tensor]) -> None:
    r"""Multiply each layer's :math:`\Delta W = s\,BA` by ``factor(name)`` from the left: a number or (out, out)."""
    for name, layer in adapted_layers(model).items():
        up, by = layer.lora_B[layer.active_adapters[0]].weight, factor(name)
        up.copy_(by.to(up) @ up if isinstance(by, Tensor) else by * up)


def weight_difference(before: nn.Module, after: nn.Module) -> Direction:
    """Return the dense step from one model to another of the same shape, such as a full fine-tune.

    Norms and embeddings are not part of effective-weight space; what they changed is left out.
    """
    start = linear_layers(before)
    return Direction(
        {
            name: (effective_weight(layer) - effective_weight(start[name]),)
            for name, layer in linear_layers(after).items()
        }
    )


@contextmanager
def moved(model: nn.Module, steps: Sequence[tuple[Direction, float]]) -> Iterator[None]:
    """Move the model along directions by the factors given, inside the ``with`` block only.

    Each layer's output gets ``factor * x @ ΔW.T`` by a forward hook; no parameter is written, and the hooks go when the
    block ends, however it ends. Blocks nest. Cost: two thin products a layer and low-rank direction, or a dense one.

    Raises:
        CurvlibError: a direction names a layer that the model does not have.
    """
    layers = linear_layers(model)
    unknown = [name for direction, _ in steps for name in direction.chains if name not in layers]
    if unknown:
        raise CurvlibError(f"the model has no layer '{unknown[0]}': make the direction from a model of the same shape")
    handles = []
    try:
        for direction, factor in steps:
            for name, chain in direction.chains.items() if factor else ():
                handles.append(layers[name].register_forward_hook(partial(_add, chain, factor)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add(chain: Chain, factor: float, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    x, (left, *right) = inputs[0], chain
    for matrix in reversed(right):
        x = x @ matrix.to(x).T
    return output + (x * factor) @ left.to(x).T
