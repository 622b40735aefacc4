"""Run the notebooks of one tier and seed: in order, resumable, checked, and gathered in one report."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout
from nbformat import NotebookNode

from curvlib import notebook_file
from curvlib.errors import CurvlibError
from curvlib.execution import Ending, execute
from curvlib.report import ROOT, load_record
from curvlib.report_page import build_report, duration
from curvlib.tiers import get_tier

LAST = "09"  # the report: it gathers what the others wrote
# Seconds for one notebook; a few times the budget of all of them, since slow laptops exist and hangs are rare.
TIME_LIMITS = {"ci": 1800.0, "cpu": 7200.0, "gpu": 14400.0}


@dataclass(frozen=True)
class Outcome:
    """What became of one notebook: newly run, kept from an earlier run, or failed for the reason in ``fault``."""

    notebook: str
    state: Literal["ran", "kept", "failed"]
    seconds: float = 0.0
    fault: str = ""

    def __str__(self) -> str:
        if self.state == "kept":
            return f"{self.notebook}: unchanged since its last run, kept (--fresh runs it again)"
        if self.state == "failed":
            return f"{self.notebook}: FAILED after {duration(self.seconds)}: {self.fault}"
        return f"{self.notebook}: done in {duration(self.seconds)}"


def run(
    tier: str,
    seed: int,
    only: Sequence[str] = (),
    *,
    fresh: bool = False,
    keep_outputs: bool = False,
    notebooks: Path = ROOT / "notebooks",
    runs: Path = ROOT / "runs",
) -> list[Outcome]:
    """Run the notebooks, print a line for each, and write ``<runs>/<tier>/seed<seed>/report.html``.

    Args:
        tier: ``ci``, ``cpu`` or ``gpu``.
        seed: Given to every notebook.
        only: Notebook numbers such as ``"01"``, or ``"A1"`` for an appendix; empty means all.
        fresh: Run also what an earlier run completed.
        keep_outputs: Copy the outputs back into the source notebooks, for committing.
        notebooks: Folder of the sources, ``NN_*.ipynb`` and ``A1_*.ipynb``.
        runs: Folder of all runs.

    Returns:
        One outcome a notebook; a failed one does not stop the others.

    Raises:
        CurvlibError: An unknown tier or notebook, no GPU at tier gpu, parameters that a notebook does not have,
            or another run at work in the same folder. All are found before the first notebook starts.
    """
    get_tier(tier)  # raises for a tier that is unknown or impossible here
    sources = select(notebooks, only)
    for source in sources:
        check_parameters(source, tier, seed, keep_outputs)
    run_dir = runs.resolve() / tier / f"seed{seed}"
    outcomes = []
    with exclusive(run_dir):
        for source in sources:
            outcome = run_notebook(source, run_dir, tier, seed, fresh=fresh)
            outcomes.append(outcome)
            if keep_outputs and outcome.state != "failed":
                keep(source, run_dir)
        print(f"report: {build_report(run_dir)}")
    return outcomes


def select(notebooks: Path, only: Sequence[str] = ()) -> list[Path]:
    """The notebooks with the given numbers, or all: lessons, then appendices, then the report.

    Raises:
        CurvlibError: There is none, or none of a given number; the known ones are named.
    """
    known = sorted(notebooks.glob("[0-9A-Z][0-9]_*.ipynb"), key=lambda path: (path.name.startswith(LAST), path.name))
    if not known:
        raise CurvlibError(f"no notebook NN_*.ipynb in {notebooks}: run from a clone of the repository")
    numbers = {path.name[:2] for path in known}
    wanted = {number.strip().upper().zfill(2) if number.strip() else number for number in only}
    if unknown := sorted(wanted - numbers):
        raise CurvlibError(f"unknown notebook {', '.join(unknown)}: expected one of {', '.join(sorted(numbers))}")
    return [path for path in known if not wanted or path.name[:2] in wanted]


def check_parameters(source: Path, tier: str, seed: int, keep_outputs: bool) -> None:
    """Raise a CurvlibError where papermill would only log: the notebook lacks a parameter that the run sets."""
    defaults = notebook_file.parameters(source)
    if missing := sorted({"tier", "seed", "output_dir"} - set(defaults)):
        have = ", ".join(defaults) or "nothing"
        raise CurvlibError(f"{source}: its cell tagged 'parameters' sets {have}, expected also {', '.join(missing)}")
    if keep_outputs and (defaults["tier"], defaults["seed"]) != (tier, seed):
        own = f"--tier {defaults['tier']} --seed {defaults['seed']}"
        raise CurvlibError(f"{source}: --keep-outputs wants the notebook's own parameters, run it with {own}")


def run_notebook(
    source: Path, run_dir: Path, tier: str, seed: int, *, fresh: bool = False, limit_s: float | None = None
) -> Outcome:
    """Run one notebook into ``run_dir`` unless an unchanged one completed there before, and print its outcome.

    The report is run each time, since what it gathers changes without it.

    A success leaves ``NAME.ipynb`` and the ``NAME.results.json`` that the notebook wrote; a failure leaves
    ``NAME.failed.ipynb`` alone. ``limit_s`` replaces the tier's time limit.
    """
    name, line = source.stem, LiveLine()
    values = {"tier": tier, "seed": seed, "output_dir": str(run_dir)}
    key = notebook_file.fingerprint(notebook_file.read(source), {**values, "sizes": repr(get_tier(tier))})
    executed, failed, results = (run_dir / f"{name}{end}" for end in (".ipynb", ".failed.ipynb", ".results.json"))
    if not (fresh or name.startswith(LAST)) and is_current(executed, results, key):
        return tell(Outcome(name, "kept"))
    working = run_dir / f".{name}.running.ipynb"
    for stale in (executed, failed, results, working):
        stale.unlink(missing_ok=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    limit_s = TIME_LIMITS[tier] if limit_s is None else limit_s
    start = time.monotonic()
    try:
        line.show(f"{name}: starting")
        ending = execute(
            source,
            working,
            values,
            limit_s,
            lambda: line.show(f"{name}: {position(working)}, {duration(time.monotonic() - start)}"),
        )
        fault = find_fault(ending, working, results, limit_s)
        kept = read_partial(working) or notebook_file.read(source)
        kept.metadata["curvlib"] = {"fault": fault} if fault else {"fingerprint": key}
        notebook_file.write(kept, failed if fault else executed)
    finally:
        line.clear()
        working.unlink(missing_ok=True)
    if fault:
        results.unlink(missing_ok=True)
    return tell(Outcome(name, "failed" if fault else "ran", time.monotonic() - start, fault))


def is_current(executed: Path, results: Path, key: str) -> bool:
    """Whether an earlier run of the same sources and parameters completed."""
    try:
        stored = notebook_file.read(executed).metadata.get("curvlib", {})
        load_record(results)
    except (CurvlibError, OSError):
        return False
    return bool(stored.get("fingerprint") == key)


def find_fault(ending: Ending, working: Path, results: Path, limit_s: float) -> str:
    """Why an ended run must not be trusted, in one line; empty if it may."""
    if ending.timed_out:
        return f"stopped at its time limit of {duration(limit_s)} ({position(working)})"
    notebook = read_partial(working)
    if notebook is None or (ending.returncode and not notebook_file.errors(notebook)):
        hint = " (out of memory, as a rule)" if "DeadKernelError" in ending.last_line else ""
        return f"papermill stopped ({position(working)}): {ending.last_line}{hint}"
    if faults := notebook_file.problems(notebook):
        return faults[0]
    try:
        load_record(results)
    except FileNotFoundError:
        return f"wrote no {results.name}: its last code cell must call Results(...).save()"
    except CurvlibError as error:
        return str(error)
    return ""


def read_partial(working: Path) -> NotebookNode | None:
    """The notebook as far as papermill got, or None where it was stopped before or while it wrote."""
    try:
        return notebook_file.read(working)
    except (CurvlibError, OSError):
        return None


def position(working: Path) -> str:
    """Where papermill is, from the notebook that it saves at every cell: ``code cell 3 of 9``."""
    try:
        cells: list[NotebookNode] = json.loads(working.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError):  # not there yet, or caught between two writes
        return "starting the kernel"
    states = [cell["metadata"].get("papermill", {}).get("status") for cell in cells if cell["cell_type"] == "code"]
    begun = sum(state in ("running", "completed", "failed") for state in states)
    return f"code cell {begun} of {len(states)}"


def keep(source: Path, run_dir: Path) -> None:
    """Copy a run's outputs into its source notebook and warn if that grows too large to commit."""
    notebook_file.keep_outputs(source, run_dir / source.name)
    size = source.stat().st_size
    if size > notebook_file.SIZE_LIMIT:
        print(f"warning: {source} is {size / 1e6:.1f} MB with its outputs, above 1 MB: draw smaller figures")


def tell(outcome: Outcome) -> Outcome:
    """Print an outcome and return it."""
    print(outcome, flush=True)
    return outcome


@contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system frees when this process ends, however it ends."""
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(run_dir / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise CurvlibError(f"another run is at work in {run_dir}: wait for it or stop it") from error


class LiveLine:
    """A status line, rewritten in place on a terminal and repeated every half minute elsewhere."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty()
        self.shown = float("-inf")

    def show(self, text: str) -> None:
        """Show the present state."""
        if self.live:
            print(f"\r\x1b[K{text}", end="", flush=True)
        elif time.monotonic() - self.shown >= 30:
            print(text, flush=True)
            self.shown = time.monotonic()

    def clear(self) -> None:
        """Make room for an outcome or an error."""
        print("\r\x1b[K" if self.live else "", end="", flush=True)
