r"""How many bytes a gradient or a curvature product needs: counted as they are made, or told before the work.

Storages are counted, so views cost nothing. A storage *lives* from the operation that makes it until its last reference
goes; autograd *retains* it while a graph keeps it for a backward pass. The peak of the first is what an allocator must
provide beside the model, that of the second is the share of the graphs in it.

A forecast runs the product once on tensors with shapes and no data (torch's ``FakeTensorMode``). Nothing is fitted or
extrapolated: each operation of the real product is counted at its real shape, whatever the architecture.
"""

from __future__ import annotations

import weakref
from collections import Counter
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from curvlib.batches import Batch, answer_loss
from curvlib.curvature.batched import BatchedOperator
from curvlib.curvature.forward import flat_gradient
from curvlib.errors import CurvlibError
from curvlib.nf4 import four_bit_layers, is_installed
from curvlib.parameters import tensor_list, trainable

Product = Callable[[Tensor], Tensor]
Kind = Literal["gradient"] | BatchedOperator[Batch] | Callable[..., BatchedOperator[Batch]]
NOTHING = "aten::_efficientzerotensor"  # stands for zeros and holds no memory, whatever its storage says
COPIES = ("aten::_to_copy", "aten::clone")  # a dequantised weight stays one in another dtype or layout


class LiveTensors(TorchDispatchMode):
    """Count the bytes of tensors made inside the ``with`` block, on any device and at any order of derivative.

    Memory that an operation takes and frees within itself is not seen. Cost: some 20 microseconds an operation.

    Attributes:
        peak: most bytes alive at once.
        retained: most bytes kept by autograd's graphs at once.
        retained_weights: most bytes of dequantised 4-bit weights kept by them at once.

    >>> x = torch.ones(1000, requires_grad=True)
    >>> with LiveTensors() as live:
    ...     y = x.exp().sum()
    >>> live.peak, live.retained
    (4004, 4000)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.retained = self.retained_weights = 0
        self._now = self._kept = self._kept_weights = 0
        self._alive: dict[int, tuple[Any, int]] = {}  # storage -> weak reference, bytes
        self.before: set[int] = set()  # storages that are never counted
        self._saved: Counter[int] = Counter()  # storage -> number of graph nodes that keep it
        self._weights: set[int] = set()
        self._hooks: Any = torch.autograd.graph.saved_tensors_hooks(lambda t: _Saved(self, t), lambda kept: kept.tensor)

    def __enter__(self) -> LiveTensors:
        self._hooks.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hooks.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and register the storages that it made."""
        result = self.call(func, args, kwargs or {})
        inputs = {storage_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        is_weight = func.name() == "bitsandbytes::dequantize_4bit" or (
            func.name() in COPIES and not inputs.isdisjoint(self._weights)
        )
        for leaf in tree_leaves(result) if func.name() != NOTHING else ():
            if isinstance(leaf, Tensor) and storage_key(leaf) not in inputs:  # an input's is known, or not ours
                self._born(leaf, is_weight)
        return result

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run one operation."""
        return func(*args, **kwargs)

    def _born(self, tensor: Tensor, is_weight: bool) -> None:
        storage, key = tensor.untyped_storage(), storage_key(tensor)
        if key in self._alive or key in self.before:
            return
        self._alive[key] = weakref.ref(storage, lambda _: self._dead(key)), storage.nbytes()
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        if is_weight:
            self._weights.add(key)

    def _dead(self, key: int) -> None:
        self._now -= self._alive.pop(key)[1]
        self._weights.discard(key)

    def keep(self, key: int, by: int) -> None:
        """Count one graph node more or less that keeps a storage."""
        if key not in self._alive:
            return
        size, before = self._alive[key][1], self._saved[key]
        self._saved[key] += by
        change = size * (bool(before + by) - bool(before))
        self._kept += change
        self._kept_weights += change * (key in self._weights)
        self.retained = max(self.retained, self._kept)
        self.retained_weights = max(self.retained_weights, self._kept_weights)


class _Saved:
    """A tensor kept by a graph, which reports its beginning and its end."""

    def __init__(self, record: LiveTensors, tensor: Tensor) -> None:
        self.record, self.tensor, self.key = record, tensor, storage_key(tensor)
        record.keep(self.key, 1)

    def __del__(self) -> None:
        self.record.keep(self.key, -1)


def storage_key(tensor: Tensor) -> int:
    """Return a number that two tensors share if and only if they share their bytes; valid while either is alive."""
    return int(tensor.untyped_storage()._cdata)


def device_peak(work: Callable[[], object]) -> int:
    """Return the most bytes that CUDA's allocator held at once during ``work()``, above what it held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated()) - before


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
