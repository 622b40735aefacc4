"""Checks that are written down as they end, and what they measure: time and memory."""

from __future__ import annotations

import json
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from curvlib.curvature.memory import LiveTensors, device_peak
from curvlib.report import device_name, installed_versions

Values = dict[str, Any]


class Record:
    """Checks, written to a file as they end: a run that is stopped keeps what it has."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.end, self.checks = path, time.monotonic() + seconds, list[Values]()
        path.parent.mkdir(parents=True, exist_ok=True)

    def check(self, name: str, work: Callable[[], Values], **limits: float) -> None:
        """Run one check; it is good where each value named in ``limits`` is at most its limit."""
        begin = time.monotonic()
        row: Values = {"name": name, "good": False, "values": {}, "limits": limits, "error": ""}
        try:
            if begin > self.end:
                raise TimeoutError("no time is left")
            row["values"] = work()
            row["good"] = all(row["values"][key] <= most for key, most in limits.items())
        except Exception as error:  # any failure is a finding, and the next check goes on
            row["error"] = f"{type(error).__name__}: {error}"[:300]
            row["where"] = traceback.format_tb(error.__traceback__)[-2:]
        row["seconds"] = round(time.monotonic() - begin, 2)
        self.checks.append(row)
        head = {"device": device_name(), "versions": installed_versions("accelerate"), "checks": self.checks}
        self.path.write_text(json.dumps(head, indent=1, default=str), "utf-8")
        print("good" if row["good"] else "BAD ", row["seconds"], name, row["error"] or row["values"], flush=True)


def milliseconds(work: Callable[[], object], device: str, repeats: int = 3) -> float:
    """Return the median time of a call, after one to warm up."""
    wait, spent = torch.cuda.synchronize if device == "cuda" else int, list[float]()
    for _ in range(1 + repeats):
        wait()
        begin = time.perf_counter()
        work()
        wait()
        spent.append(1000 * (time.perf_counter() - begin))
    return round(statistics.median(spent[1:] or spent), 1)


def peak(work: Callable[[], object], device: str) -> float:
    """Return the most GB that a call held: on CUDA by the allocator, on a CPU as counted."""
    if device == "cuda":
        return device_peak(work) / 1e9
    with LiveTensors() as live:
        work()
    return live.peak / 1e9
