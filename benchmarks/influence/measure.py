"""One row: a contestant's time, memory and scores on one setup, in a process of its own.

A process of its own, because packages change the model, may crash the interpreter (``torch.func`` on bitsandbytes'
layers does) or run out of memory, and because the peak of a process is all that counts every byte.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.influence.check import agreement
from benchmarks.influence.contestants import Contestant, contestants, has_four_bit
from benchmarks.influence.setups import SETUPS, Setup, repeated
from benchmarks.influence.work import Work
from curvlib import nf4
from curvlib.curvature.memory import device_peak
from curvlib.influence.validate import rank_correlations
from curvlib.report import peak_memory_mb, write_atomically

MIB = 2**20


@dataclass
class Row:
    """What one contestant needed; None where it was not or could not be measured.

    Attributes:
        package: who scores.
        method: how.
        seconds: from chats and a loaded model to the scores.
        peak_memory_mb: most resident memory of its process while it scored, model and interpreter included, in MiB; on
            CUDA what the allocator held at once, the model included.
        before_mb: the same before scoring began.
        check: agreement with exact scores on a tiny model.
        correlation: rank correlation of its scores with curvlib's EK-FAC ones, mean over queries.
        error: why it has no numbers, in one line.
    """

    package: str
    method: str
    seconds: float | None = None
    peak_memory_mb: float | None = None
    before_mb: float | None = None
    check: dict[str, float] | None = None
    correlation: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Order:
    """What a row's process is told: the setup by name, sizes, where to write, and the most minutes it may take."""

    case: str
    device: str
    queries: int
    examples: int
    folder: Path
    minutes: float | None = None

    def json(self) -> str:
        """Return the order as text."""
        return json.dumps({**asdict(self), "folder": str(self.folder)})

    @classmethod
    def read(cls, text: str) -> Order:
        """Return the order that :meth:`json` wrote."""
        fields = json.loads(text)
        return cls(**{**fields, "folder": Path(fields["folder"])})


def prepare(order: Order) -> None:
    """Write λ, which all rows share."""
    setup = SETUPS[order.case](order.device)
    found: dict[str, Any] = {"title": setup.title, "damping": setup.damping(setup.load())}
    write_atomically(order.folder / "prepared.json", json.dumps(found))


def score(order: Order, entrant: Contestant) -> None:
    """Check a contestant on a tiny model, then measure it on the setup; write ``row.json`` and its scores."""
    row = Row(entrant.package, entrant.method)
    attempt(row, lambda: measure(order, entrant, row))
    write_atomically(order.folder / "row.json", json.dumps(asdict(row)))


def attempt(row: Row, work: Callable[[], object]) -> None:
    """Do the work, or record why it failed in one line: a peer may fail in any way."""
    try:
        work()
    except Exception as error:
        row.error = one_line(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")


def one_line(text: str, most: int = 140) -> str:
    """Return the beginning of a text, without line breaks."""
    return " ".join(text.split())[:most]


def measure(order: Order, entrant: Contestant, row: Row) -> None:
    """Fill in the row, and write the scores.

    Raises:
        ValueError: the contestant computes something else on the tiny model.
    """
    setup = SETUPS[order.case](order.device)
    model = on_layers(setup.load(), entrant.installed)
    found = agreement(entrant, order.folder, four_bit=has_four_bit(model), device=order.device)
    row.check = {name: round(value, 5) for name, value in asdict(found).items()}
    if found.fault:
        raise ValueError(found.fault)
    scores = timed(row, lambda: entrant.score(model, work_of(setup, order)), next(model.parameters()).device)
    save_file({"scores": scores.contiguous()}, order.folder / "scores.safetensors")


def work_of(setup: Setup, order: Order) -> Work:
    """Return what the contestants are asked: the setup's chats, repeated to the sizes of the order."""
    damping = json.loads((order.folder.parent / "prepared.json").read_text("utf-8"))["damping"]
    chats, asked = repeated(setup.examples, order.examples), repeated(setup.queries, order.queries)
    place = order.folder / "work"
    place.mkdir()
    return Work(chats, asked, setup.seen, damping, place)


def timed(row: Row, work: Callable[[], Tensor], device: torch.device) -> Tensor:
    """Do the work and write its seconds and memory into the row."""
    found: list[Tensor] = []
    cuda = device.type == "cuda"
    forget_peak()
    row.before_mb = round((torch.cuda.memory_allocated() if cuda else psutil.Process().memory_info().rss) / MIB, 1)
    start = time.perf_counter()
    if cuda:
        row.peak_memory_mb = round(device_peak(lambda: found.append(work())) / MIB + row.before_mb, 1)
    else:
        found.append(work())
        row.peak_memory_mb = round(peak_since(), 1)
    row.seconds = round(time.perf_counter() - start, 3)
    return found[0]


def forget_peak() -> bool:
    """Begin the process's high-water mark anew, so that loading and checking do not count; False where Linux is not.

    What the allocator keeps of freed memory goes back first: work that fits into it would seem to need none.
    """
    with suppress(OSError, AttributeError):  # only glibc has malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def peak_since() -> float:
    """Return the most resident memory since :func:`forget_peak`, in MiB; elsewhere than on Linux that of all time."""
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    return peak_memory_mb()


def on_layers(model: nn.Module, installed: bool) -> nn.Module:
    """Let a model's 4-bit layers run on :mod:`curvlib.nf4` or on bitsandbytes' own product, and return it."""
    if has_four_bit(model):
        handle = nf4.install(model)
        if not installed:
            handle.remove()
    return model


def in_own_process(script: Path, order: Order, name: str) -> str | None:
    """Run ``script --own NAME --order …`` and return why it failed in one line, or None."""
    command = [sys.executable, str(script), "--own", name, "--order", order.json()]
    limit = order.minutes and 60 * order.minutes
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if order.device == "cpu" else {}  # a peer takes a GPU that it sees
    told = os.environ | hidden
    try:
        ended = subprocess.run(command, timeout=limit, env=told, capture_output=True, text=True, check=False)
    except subprocess.TimeoutExpired:
        return f"stopped after {order.minutes:g} minutes"
    if ended.returncode < 0:
        return f"its process was ended by signal {-ended.returncode}"
    lines = [line for line in ended.stderr.splitlines() if line.strip()]
    return one_line(lines[-1] if lines else f"status {ended.returncode}") if ended.returncode else None


def run_own(order: Order, name: str) -> None:
    """Do in this process what :func:`in_own_process` asks: ``prepare``, or the contestant of that name."""
    if name == "prepare":
        prepare(order)
        return
    score(order, next(entrant for entrant in contestants(four_bit=True) if entrant.name == name))


def row_of(script: Path, order: Order, entrant: Contestant) -> tuple[Row, Tensor | None]:
    """Return a contestant's row and its scores (m, n), None where it failed; what it wrote to disk is removed."""
    row, scores = Row(entrant.package, entrant.method), None
    with tempfile.TemporaryDirectory(dir=order.folder) as name:
        place = Path(name)
        row.error = in_own_process(script, Order(**{**vars(order), "folder": place}), entrant.name)
        if row.error is None:
            row = Row(**json.loads((place / "row.json").read_text("utf-8")))
        if (file := place / "scores.safetensors").exists() and row.error is None:
            scores = load_file(file)["scores"]
        shutil.rmtree(place / "work", ignore_errors=True)
    return row, scores


def correlate(rows: Sequence[tuple[Row, Tensor]]) -> None:
    """Fill in the rank correlation of each row's scores with those of curvlib's EK-FAC, if they are there."""
    same = [scores for row, scores in rows if (row.package, row.method) == ("curvlib", "ekfac")]
    for row, scores in rows if same else ():
        row.correlation = round(float(rank_correlations(scores.numpy(), same[0].numpy()).mean()), 4)


def packages(entrants: Sequence[Contestant], only: Sequence[str]) -> list[Contestant]:
    """Return the contestants of the packages named, or all.

    >>> packages([], ["dattri"])
    []
    """
    return [entrant for entrant in entrants if not only or entrant.package.split()[0] in only]
