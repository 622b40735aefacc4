"""Time, memory and error of the contestants on one setup, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.curvature.contestants import (
    Contestant,
    Product,
    gradient,
    matmul,
    plain_fisher,
    plain_ggn,
    plain_hessian,
)
from benchmarks.curvature.setups import Setup
from curvlib.batches import Batch
from curvlib.curvature.memory import LiveTensors, device_peak
from tests.cases import Twin, relative_error

ORACLES = {"gradient": gradient, "hessian": plain_hessian, "ggn": plain_ggn, "fisher": plain_fisher}
ANOTHER = 0.05  # rounding stays far below it, even in bfloat16; another matrix is above


@dataclass
class Row:
    """What one contestant needed; None where it was not or could not be measured.

    Attributes:
        package: who multiplies.
        kind: what is multiplied.
        seconds: one number a round.
        gradients: median, least and most over the rounds of seconds over those of curvlib's gradient.
        peak_bytes: most bytes of live tensors, the model and the vector not counted.
        retained_bytes: most bytes in autograd's graphs.
        retained_weight_bytes: dequantised 4-bit weights among them.
        device_peak_bytes: what CUDA's allocator held.
        relative_error: to the float64 dequantised twin, on a small batch.
        error: why it has no numbers, in one line.
    """

    package: str
    kind: str
    seconds: list[float] = field(default_factory=list)
    gradients: tuple[float, float, float] | None = None
    peak_bytes: int | None = None
    retained_bytes: int | None = None
    retained_weight_bytes: int | None = None
    device_peak_bytes: int | None = None
    relative_error: float | None = None
    error: str | None = None

    def json(self) -> dict[str, Any]:
        """Return the row for results.json, numbers rounded to what can be told."""
        fields = asdict(self)
        fields["seconds"] = [round(second, 5) for second in self.seconds]
        fields["gradients"] = self.gradients and [round(value, 4) for value in self.gradients]
        return fields


class OnlyPeak(LiveTensors):
    """Counts live bytes alone: torch.func refuses to run under the hooks that see graphs."""

    def __init__(self) -> None:
        super().__init__()
        self._hooks = nullcontext()


def compare(setup: Setup, entrants: Sequence[Contestant], batch: Batch, repeats: int, small: Batch | None) -> list[Row]:
    """Return one row a contestant: error on ``small``, then memory, then time in interleaved rounds on ``batch``."""
    rows = {entrant: Row(entrant.package, entrant.kind) for entrant in entrants}
    v = setup.vector()
    if small is not None:
        measure_errors(setup, rows, small, v)
    products: dict[Contestant, Product] = {}
    for entrant, row in rows.items():
        if row.error is None:
            attempt(
                row, lambda entrant=entrant, row=row: products.update({entrant: prepare(setup, entrant, row, batch, v)})
            )
    for _ in range(repeats):
        for entrant, product in products.items():
            with matmul(setup.model, entrant.installed):
                rows[entrant].seconds.append(seconds(product, v))
    unit = next(row.seconds for entrant, row in rows.items() if entrant.kind == "gradient")
    for row in rows.values():
        ratios = [own / one for own, one in zip(row.seconds, unit, strict=False)]
        row.gradients = (statistics.median(ratios), min(ratios), max(ratios)) if ratios else None
    return list(rows.values())


def attempt(row: Row, work: Any) -> None:
    """Do the work, or record why it failed in one line: a peer may fail in any way."""
    try:
        work()
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        row.error = f"{type(error).__name__}: {first}"[:120]


def measure_errors(setup: Setup, rows: dict[Contestant, Row], small: Batch, v: Tensor) -> None:
    """Fill in each relative error; a contestant that fails, or that computes another matrix, gets its error."""
    twin = Twin(setup.model)
    exact = {kind: oracle(twin, small)(v.double()) for kind, oracle in ORACLES.items()}
    del twin
    for entrant, row in rows.items():

        def check(entrant: Contestant = entrant, row: Row = row) -> None:
            with matmul(setup.model, entrant.installed):
                row.relative_error = relative_error(entrant.make(setup.model, small)(v), exact[entrant.measures])
            if not row.relative_error < ANOTHER:
                raise ValueError(f"another matrix: {row.relative_error:.2g} away from the float64 oracle")

        attempt(row, check)


def prepare(setup: Setup, entrant: Contestant, row: Row, batch: Batch, v: Tensor) -> Product:
    """Make a product, count its memory, which also warms it up, and return it."""
    with matmul(setup.model, entrant.installed):
        product = entrant.make(setup.model, batch)
        row.peak_bytes, row.retained_bytes, row.retained_weight_bytes = counted(product, v)
        if v.is_cuda:
            row.device_peak_bytes = device_peak(lambda: product(v))
    return product


def counted(product: Product, v: Tensor) -> tuple[int, int | None, int | None]:
    """Return peak, retained and retained weight bytes; the last two are None where hooks are refused."""
    try:
        with LiveTensors() as live:
            product(v)
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
        with OnlyPeak() as peak:
            product(v)
        return peak.peak, None, None
    return live.peak, live.retained, live.retained_weights


def seconds(product: Product, v: Tensor) -> float:
    """Return the wall time of one product."""
    wait = torch.cuda.synchronize if v.is_cuda else (lambda: None)
    wait()
    start = time.perf_counter()
    product(v)
    wait()
    return time.perf_counter() - start
