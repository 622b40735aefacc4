"""What a notebook claims, with its uncertainty, its null control and its cost, written as results.json."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from curvlib import __version__
from curvlib.errors import CurvlibError
from curvlib.rows import read

if TYPE_CHECKING:
    from curvlib.evaluate.stats import Estimate

ROOT = Path(__file__).resolve().parents[1]
DISTRIBUTIONS = ("torch", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Claim:
    """One finding of a notebook, with its uncertainty and its null control.

    Args:
        id: Lower-case name that checks and readers rely on, such as ``compliance_rise_points``.
        statement: The finding in one sentence, with the unit of the numbers.
        value: The measured quantity.
        low: Lower end of its interval, in the unit of ``value``.
        high: Upper end of its interval.
        control: The same quantity under the null control (random direction, shuffled labels, benign data ...).
        n: Number of independent units (prompts, seeds) behind the value.
        holds: Whether the measurement supports the statement; a False is reported, not hidden.
        unit: Of ``value``, such as ``points``; empty for a ratio or where the statement tells it.

    Raises:
        CurvlibError: A number is missing or not finite, the interval is reversed, or the id is not an identifier.
    """

    id: str
    statement: str
    value: float
    low: float
    high: float
    control: float
    n: int
    holds: bool
    unit: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.id):
            raise CurvlibError(f"claim id {self.id!r}: expected lower-case letters, digits and underscores")
        for name in ("value", "low", "high", "control"):
            number = getattr(self, name)
            if not isinstance(number, float) or not math.isfinite(number):
                raise CurvlibError(f"claim {self.id}: {name} is {number}, expected a finite number; measure it first")
        if self.low > self.high or self.n < 1:
            raise CurvlibError(f"claim {self.id}: expected low <= high and n >= 1, got {self}")

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "DOES NOT HOLD"
        value = f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]{self.unit and ' '}{self.unit}"
        numbers = f"{value}, control {self.control:.4g}, n = {self.n}"
        return f"{verdict}: {self.statement}: {numbers} ({self.id})"


@dataclass(frozen=True)
class Record:
    """The content of one ``results.json``: a notebook's run, its cost, its claims and the rows they follow from."""

    notebook: str
    tier: str
    seed: int
    device: str
    versions: dict[str, str]
    wall_s: float
    peak_memory_mb: float
    claims: tuple[Claim, ...]
    rows: Sequence[Mapping[str, Any]] = ()
    date: str = ""  # of the run, such as 2026-01-31


class Results:
    """Collects a notebook's claims and writes them with the run's cost.

    Args:
        notebook: The notebook's file name without its ending.
        tier: ``ci``, ``cpu`` or ``gpu``.
        seed: The run's seed.
        output_dir: Where ``save`` writes; empty, as in a run by hand, means ``runs/manual/<tier>/seed<seed>``.

    The wall time counts from construction, so construct it in the notebook's first code cell after the parameters.
    """

    def __init__(self, notebook: str, tier: str, seed: int, output_dir: str = "") -> None:
        self.notebook, self.tier, self.seed = notebook, tier, seed
        by_hand = ROOT / "runs" / "manual" / tier / f"seed{seed}"
        self.path = (Path(output_dir) if output_dir else by_hand) / f"{notebook}.results.json"
        self.claims: dict[str, Claim] = {}
        self._start = time.monotonic()

    def claim(
        self,
        id: str,  # noqa: A002  the results.json key
        statement: str,
        estimate: Estimate | None = None,
        *,
        holds: bool,
        control: float | None = None,
        unit: str = "",
        **numbers: float,
    ) -> None:
        """Record one claim and print it as one line; the arguments are those of `Claim`.

        ``estimate`` gives value, low, high and n at once; without one they are named: ``value=…, low=…, high=…, n=…``.

        Raises:
            CurvlibError: As for `Claim`; also for an id used before, numbers that lack or are too many, and a claim
                without a null control.
        """
        if id in self.claims:
            raise CurvlibError(f"claim {id} is made twice in {self.notebook}: give each claim its own id")
        if control is None:
            raise CurvlibError(f"claim {id} has no null control: measure the same quantity where it should vanish")
        if estimate is not None:
            numbers |= {name: getattr(estimate, name) for name in ("value", "low", "high", "n")}
        if numbers.keys() != {"value", "low", "high", "n"}:
            raise CurvlibError(f"claim {id} has {', '.join(numbers)}: give an Estimate, or value, low, high and n")
        n, ends = int(numbers.pop("n")), {name: float(number) for name, number in numbers.items()}
        self.claims[id] = Claim(id, statement, **ends, control=float(control), n=n, holds=bool(holds), unit=unit)
        print(self.claims[id])

    def save(self, rows: Sequence[Mapping[str, Any]] = ()) -> Path:
        """Write ``<output_dir>/<notebook>.results.json`` in one step (no half file) and return its path.

        ``rows`` are the measurements that the claims follow from, one flat mapping of JSON values each.
        """
        record = Record(
            notebook=self.notebook,
            tier=self.tier,
            seed=self.seed,
            device=_where(self.tier),
            versions=installed_versions(),
            wall_s=round(time.monotonic() - self._start, 1),
            peak_memory_mb=round(peak_memory_mb(), 1),
            claims=tuple(self.claims.values()),
            rows=list(rows),
            date=datetime.now(UTC).date().isoformat(),
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(asdict(record), indent=1, allow_nan=False) + "\n")
        held = sum(claim.holds for claim in record.claims)
        cost = f"{record.wall_s:.0f} s, peak memory {record.peak_memory_mb:.0f} MB"
        print(f"{held} of {len(record.claims)} claims hold; {cost}")
        return self.path


def load_record(path: Path) -> Record:
    """Read one ``results.json``.

    Raises:
        CurvlibError: The file is damaged or of another form.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return Record(**{**fields, "claims": tuple(Claim(**claim) for claim in fields["claims"])})
    except (ValueError, TypeError, KeyError) as error:
        raise CurvlibError(f"{path} is no results file ({error}): delete it and run its notebook again") from error


def load_study(name: str) -> Record:
    """Return a study's committed record, ``data/studies/NAME.json``, with its rows from ``NAME.jsonl`` beside it.

    Raises:
        CurvlibError: There is none of this name, or it is damaged.
    """
    path = ROOT / "data" / "studies" / f"{name}.json"
    if not path.exists():
        raise CurvlibError(f"{path} is not there: make study NAME={name} measures it")
    return replace(load_record(path), rows=read(path.with_suffix(".jsonl")))


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` to a temporary file beside ``path`` and rename it, so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def markdown_table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table.

    >>> print(markdown_table(("a", "b"), [("1", "2")]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    rows = ["| " + " | ".join(cells) + " |" for cells in (heads, *lines)]
    return "\n".join([rows[0], "|" + "---|" * len(heads), *rows[1:]])


def installed_versions(*more: str) -> dict[str, str]:
    """Versions of Python, curvlib and the libraries that the numbers depend on, and of ``more`` distributions."""
    found = {"python": platform.python_version(), "curvlib": __version__}
    for name in (*DISTRIBUTIONS, *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def device_name() -> str:
    """The accelerator's name, or ``cpu`` where there is none or PyTorch was never loaded."""
    torch = sys.modules.get("torch")
    return str(torch.cuda.get_device_name()) if torch and torch.cuda.is_available() else "cpu"


def _where(tier: str) -> str:
    """What a tier computes on; of a GPU also the memory that it took and the types of its numbers."""
    if tier != "gpu" or device_name() == "cpu":
        return "cpu"
    peak = sys.modules["torch"].cuda.max_memory_allocated() / 1e9
    return f"{device_name()}, {peak:.1f} GB at most, float32 products, bfloat16 answers"


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far, in MiB, host memory only; macOS tells only that of now."""
    memory, status = psutil.Process().memory_info(), Path("/proc/self/status")  # the file of Linux
    peak = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(peak[1]) / 1024 if peak else float(getattr(memory, "peak_wset", memory.rss)) / 2**20
