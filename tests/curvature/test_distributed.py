"""Two CPU processes with half of the batches each, against one process with all of them."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]  # no annotations
from torch import Tensor
from torch.nn.functional import cross_entropy

from curvlib.curvature.distributed import DistributedOperator
from curvlib.curvature.hessian import HessianOperator


def operator(parts: list[slice]) -> HessianOperator[slice]:
    """Softmax regression on rows of unequal number."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (11, 4))
    y = torch.randint(4, (11,), generator=generator)
    w.requires_grad_()

    def loss(rows: slice) -> Tensor:
        return cross_entropy(x[rows] @ w.T, y[rows])

    return HessianOperator(loss, [w], parts, [part.stop - part.start for part in parts])


BATCHES = [slice(0, 2), slice(2, 3), slice(3, 8), slice(8, 11)]
V = torch.arange(12, dtype=torch.float64)


def work(rank: int, port: int, folder: str) -> None:
    """One process: three batches here, one there."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ["ACCELERATE_USE_CPU"] = "true"
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    shared = DistributedOperator(operator(BATCHES[:3] if rank == 0 else BATCHES[3:]), accelerator)
    torch.save(shared @ V, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_product_of_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch: Any = torch.multiprocessing.spawn  # type: ignore[attr-defined]  # torch exports it without saying so
    launch(work, args=(port, str(tmp_path)), nprocs=2)
    exact = operator(BATCHES) @ V
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), exact, rtol=1e-12, atol=1e-14)


def test_one_process_is_the_operator_itself() -> None:
    alone = DistributedOperator(operator(BATCHES), Accelerator(cpu=True))
    torch.testing.assert_close(alone @ V, operator(BATCHES) @ V)
