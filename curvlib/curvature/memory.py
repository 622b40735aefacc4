r"""How many bytes a gradient or a curvature product will need, told before the work.

The product runs once on tensors with shapes and no data (torch's ``FakeTensorMode``), while
:mod:`curvlib.curvature.live` counts what it makes. Nothing is fitted or extrapolated: each operation of the real
product is counted at its real shape, whatever the architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._pytree import tree_leaves

from curvlib.batches import Batch, answer_loss
from curvlib.curvature.batched import BatchedOperator
from curvlib.curvature.forward import flat_gradient
from curvlib.curvature.live import LiveTensors, storage_key
from curvlib.errors import CurvlibError
from curvlib.nf4 import four_bit_layers, is_installed
from curvlib.parameters import tensor_list, trainable

Product = Callable[[Tensor], Tensor]
Kind = Literal["gradient"] | BatchedOperator[Batch] | Callable[..., BatchedOperator[Batch]]


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes on the model's device.

    Attributes:
        weights: the model's parameters, buffers and 4-bit states, which are there already.
        vector: the vector that is multiplied; 0 for a gradient.
        peak: the most that the product itself holds at once, its result and the graphs among it.
        retained: the most that autograd's graphs keep at once, a part of ``peak``.
        retained_weights: dequantised 4-bit weights among them; 0 with :func:`curvlib.nf4.install`.

    Not counted: what a kernel takes within itself (such as cuBLAS's workspace), and the allocator's rounding.
    """

    weights: int
    vector: int
    peak: int
    retained: int
    retained_weights: int

    @property
    def total(self) -> int:
        """Weights, vector and peak: what the device must hold."""
        return self.weights + self.vector + self.peak

    def __str__(self) -> str:
        parts = (self.total, self.weights, self.vector, self.peak, self.retained)
        return "{:.0f} MiB in all: weights {:.0f}, vector {:.1f}, product {:.0f} (graphs {:.0f})".format(
            *(part / 2**20 for part in parts)
        )


def forecast_memory(model: nn.Module, operator: Kind, batch: Batch) -> MemoryForecast:
    """Return the bytes of one product, or one gradient, of the mean answer loss over one batch.

    Cost: as many operations as the product, on shapes alone, at about a tenth of a millisecond each; no memory to
    speak of. No parameter is touched.

    Args:
        model: a causal language model, dense or 4-bit, on any device.
        operator: the maker :func:`~curvlib.curvature.hessian.hessian`, :func:`~curvlib.curvature.ggn.ggn` or
            :func:`~curvlib.curvature.fisher.fisher` (with options as in ``partial(hessian, rows=2)``), an operator
            that one of them made (its ``batch_product``, on the batch in one piece), or ``"gradient"``.
        batch: chats of the shape to come.

    Raises:
        CurvlibError: the model's shapes depend on its values, as with routed experts; or a 4-bit layer without
            ``nf4.install`` is in evaluation mode, where its first pass repacks the weight.
    """
    for name, layer in four_bit_layers(model).items():
        if not (is_installed(layer) or layer.training):
            raise CurvlibError(f"layer '{name}' is 4-bit and repacks itself in eval(): call curvlib.nf4.install(model)")
    before = resident(model)
    rehearsal = Rehearsal(before)
    product, size, dtype = _product(model, operator, batch)
    v = rehearsal.zeros(size, dtype, before[0].device)
    try:
        with rehearsal:
            product(v)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise CurvlibError(f"the model's shapes depend on its values ({error}): measure one small batch") from error
    return MemoryForecast(
        sum({storage_key(tensor): tensor.untyped_storage().nbytes() for tensor in before}.values()),
        size * dtype.itemsize,
        rehearsal.peak,
        rehearsal.retained,
        rehearsal.retained_weights,
    )


def _product(model: nn.Module, operator: Kind, batch: Batch) -> tuple[Product, int, torch.dtype]:
    """Return the product as a function, and the size and dtype of its vector."""
    if isinstance(operator, str):
        targets = tensor_list(trainable(model))
        return lambda _: flat_gradient(answer_loss(model, batch), targets), 0, targets[0].dtype
    if isinstance(operator, BatchedOperator):
        single: BatchedOperator[Batch] = operator
        return lambda v: single.batch_product(batch, v), single.size, single.dtype
    made = operator(model, [batch], check=False)
    return made.matvec, made.size, made.dtype


def resident(model: nn.Module) -> list[Tensor]:
    """Return the tensors that a model is made of: parameters, buffers and the scales and codes of 4-bit weights."""
    own = [*model.parameters(), *model.buffers()]
    states = [getattr(parameter, "quant_state", None) for parameter in own]
    return own + [tensor for state in states for tensor in _state_tensors(state)]


def _state_tensors(state: Any) -> Iterator[Tensor]:
    for value in vars(state).values() if state is not None else ():
        if isinstance(value, Tensor):
            yield value
        elif type(value) is type(state):  # the scales of the scales
            yield from _state_tensors(value)


class Rehearsal(LiveTensors):
    """Count without computing: what the model's own tensors touch gets a shape and no data.

    Operations on the batch alone (its mask, its positions) run in earnest, since shapes depend on them.
    """

    def __init__(self, own: list[Tensor]) -> None:
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._own = {storage_key(tensor) for tensor in own}
        self._stand_ins = [self._fake.from_tensor(tensor) for tensor in own]  # the mode keeps one for each
        self.before = {storage_key(tensor) for tensor in self._stand_ins}

    def zeros(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a vector without data, counted as made before."""
        with self._fake:
            return torch.zeros(size, dtype=dtype, device=device)

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run one operation, on shapes alone if it reads the model."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(isinstance(leaf, FakeTensor) or storage_key(leaf) in self._own for leaf in tensors):
            return func(*args, **kwargs)
        with self._fake:
            return func(*args, **kwargs)
