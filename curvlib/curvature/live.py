r"""Bytes of the tensors that a computation makes, counted as they are made and dropped.

Storages are counted, so views cost nothing. A storage *lives* from the operation that makes it until its last reference
goes; autograd *retains* it while a graph keeps it for a backward pass. The peak of the first is what an allocator must
provide beside the model, that of the second is the share of the graphs in it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
