"""Products summed over data-parallel processes."""

from __future__ import annotations

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]  # it publishes no annotations
from torch import Tensor

from curvlib.curvature.batched import BatchedOperator, BatchT
from curvlib.curvature.operator import Operator


class DistributedOperator(Operator):
    r"""The weighted mean :math:`\sum_r w_r A_r / \sum_r w_r` over the processes r of an ``accelerate`` run.

    Every process builds the operator of its own batches, with the same parameters, and calls ``matvec`` with the same
    vector; each gets the same result as one process with all the batches would, up to rounding. Cost: one product of
    the own batches and one all-reduce of (size,).
    """

    def __init__(self, operator: BatchedOperator[BatchT], accelerator: Accelerator) -> None:
        self.operator, self.accelerator = operator, accelerator
        self.size, self.dtype, self.device = operator.size, operator.dtype, operator.device
        weight = torch.tensor(operator.weight, dtype=torch.float64, device=operator.device)
        self.share = operator.weight / float(self._sum(weight))

    def matvec(self, v: Tensor) -> Tensor:
        """Return the weighted mean over all processes of their products with v; both (size,)."""
        return self._sum(self.share * self.operator.matvec(v))

    def _sum(self, tensor: Tensor) -> Tensor:
        result: Tensor = self.accelerator.reduce(tensor, reduction="sum")
        return result
