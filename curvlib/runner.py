"""Run the notebooks of one tier and seed: in order, resumable, checked, and gathered in one report."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import psutil
from filelock import FileLock, Timeout

from curvlib import notebook_file
from curvlib.errors import CurvlibError
from curvlib.notebook_file import code_cells, find_fault, read, shorten
from curvlib.report import ROOT, load_record
from curvlib.tiers import get_tier

LAST = "09"  # the report: it gathers what the others wrote
HOURS = 3.0  # for one notebook: the limit is to stop what hangs, not what is slow
# Large tensors come from huge pages that stay with the kernel: fresh small pages cost a sixth of the time on Linux.
HUGE_PAGES = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8000000000:glibc.malloc.trim_threshold=20000000000"


@dataclass(frozen=True)
class Outcome:
    """What became of one notebook: newly run, kept from an earlier run, or failed for the reason in ``fault``."""

    notebook: str
    state: Literal["ran", "kept", "failed"]
    seconds: float = 0.0
    fault: str = ""

    def __str__(self) -> str:
        if self.state == "kept":
            return f"{self.notebook}: its code is unchanged since its last run, kept (--fresh runs it again)"
        end = f"FAILED: {self.fault}" if self.fault else "done"
        return f"{self.notebook}: {timedelta(seconds=round(self.seconds))} {end}"


def run(
    tier: str,
    seed: int,
    only: Sequence[str] = (),
    *,
    parameters: Mapping[str, object] | None = None,
    fresh: bool = False,
    keep_outputs: bool = False,
    hours: float = HOURS,
    notebooks: Path = ROOT / "notebooks",
    runs: Path = ROOT / "runs",
) -> list[Outcome]:
    """Run the notebooks, print and return an outcome of each, and write ``<runs>/<tier>/seed<seed>/report.html``.

    A notebook that fails does not stop the others.

    Args:
        tier: ``ci``, ``cpu`` or ``gpu``.
        seed: Given to every notebook.
        only: Numbers such as ``"01"`` or ``"A1"``, or words of names; empty means all.
        parameters: Further values for the cell tagged ``parameters``.
        fresh: Run also what an earlier run completed.
        keep_outputs: Copy the outputs back into the source notebooks, for committing.
        hours: Wall-clock limit of one notebook.
        notebooks: Folder of the sources.
        runs: Folder of all runs.

    Raises:
        CurvlibError: Before any notebook starts: an unknown tier or notebook, no GPU at tier gpu, a parameter that a
            notebook lacks, or another run in the same folder.
    """
    get_tier(tier)  # raises for a tier that is unknown or impossible here
    sources = select(notebooks, only)
    for source in sources:
        check_parameters(source, {"tier": tier, "seed": seed, **(parameters or {})}, keep_outputs)
    run_dir = runs.resolve() / tier / f"seed{seed}"
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(run_dir / ".lock").acquire(timeout=0)
    except Timeout as error:
        raise CurvlibError(f"another run is at work in {run_dir}: wait for it or stop it") from error
    outcomes = []
    with lock:
        for source in sources:
            outcome = run_notebook(source, run_dir, tier, seed, parameters, fresh=fresh, hours=hours)
            outcomes.append(outcome)
            print(outcome, flush=True)
            if keep_outputs and not outcome.fault:
                notebook_file.keep_outputs(source, run_dir / source.name)
        print(f"report: {notebook_file.write_page(run_dir, LAST)}")
    return outcomes


def select(notebooks: Path, only: Sequence[str] = ()) -> list[Path]:
    """The notebooks with these numbers or words in their names, or all; the report last. CurvlibError if none fits."""
    known = sorted(notebooks.glob("[0-9A-Z]*_*.ipynb"), key=lambda path: (path.name.startswith(LAST), path.name))
    if not known:
        raise CurvlibError(f"no notebook NN_*.ipynb in {notebooks}: run from a clone of the repository")
    chosen: set[Path] = set()
    for word in only:
        number = word.strip().upper().zfill(2)
        matches = [path for path in known if path.stem.split("_")[0] == number or (word[2:] and word in path.stem)]
        if not matches or not word.strip():
            raise CurvlibError(f"unknown notebook {word!r}: {notebooks} has {', '.join(path.stem for path in known)}")
        chosen.update(matches)
    return [path for path in known if not only or path in chosen]


def check_parameters(source: Path, values: Mapping[str, object], keep_outputs: bool) -> None:
    """Raise a CurvlibError where papermill would only log: the notebook lacks a parameter that the run sets."""
    import papermill  # here, since it is slow to load and only a run needs it

    try:
        cell = papermill.inspect_notebook(_literal(source))
        defaults = {name: ast.literal_eval(entry["default"]) for name, entry in cell.items()}
    except (ValueError, SyntaxError) as error:
        raise CurvlibError(f"{source}: its parameters cannot be read ({shorten(error)})") from error
    if missing := sorted({*values, "output_dir"} - set(defaults)):
        have = ", ".join(defaults) or "nothing"
        raise CurvlibError(f"{source}: its cell tagged 'parameters' sets {have}, expected also {', '.join(missing)}")
    if keep_outputs and any(defaults[name] != value for name, value in values.items()):
        usual = ", ".join(f"{name}={defaults[name]!r}" for name in values)
        raise CurvlibError(f"{source}: --keep-outputs wants the notebook's own parameters: run it with {usual}")


def run_notebook(
    source: Path,
    run_dir: Path,
    tier: str,
    seed: int,
    parameters: Mapping[str, object] | None = None,
    *,
    fresh: bool = False,
    hours: float = HOURS,
) -> Outcome:
    """Run one notebook into ``run_dir`` unless one of the same code completed there before; the report runs each time.

    A success leaves ``NAME.ipynb`` and the notebook's ``NAME.results.json``, a failure ``NAME.failed.ipynb`` alone.
    """
    name, start, notebook = source.stem, time.monotonic(), read(source)
    values = {"tier": tier, "seed": seed, "output_dir": str(run_dir), **(parameters or {})}
    key = notebook_file.fingerprint(notebook, {**values, "sizes": repr(get_tier(tier))})
    executed, failed, results = (run_dir / f"{name}{end}" for end in (".ipynb", ".failed.ipynb", ".results.json"))
    if not (fresh or name.startswith(LAST)) and is_current(executed, results, key):
        return Outcome(name, "kept")
    working = run_dir / f".{name}.running.ipynb"
    for stale in (executed, failed, results, working):
        stale.unlink(missing_ok=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    for cell in code_cells(notebook):  # it stands in for a run that ends before papermill writes
        cell.execution_count, cell.outputs = None, []
    try:
        stop = execute(source, working, values, 3600 * hours)
        with suppress(CurvlibError, OSError):
            notebook = read(working)
        fault = find_fault(notebook, results, stop)
        notebook.metadata["curvlib"] = {"fault": fault} if fault else {"fingerprint": key}
        notebook_file.write(notebook, failed if fault else executed)
    finally:
        working.unlink(missing_ok=True)
    if fault:
        results.unlink(missing_ok=True)
    return Outcome(name, "failed" if fault else "ran", time.monotonic() - start, fault)


def is_current(executed: Path, results: Path, key: str) -> bool:
    """Whether an earlier run of the same code and parameters completed."""
    try:
        load_record(results)
        return bool(read(executed).metadata.get("curvlib", {}).get("fingerprint") == key)
    except (CurvlibError, OSError):
        return False


def execute(source: Path, target: Path, values: Mapping[str, object], limit_s: float) -> str:
    """Execute ``source`` by papermill in a child process, saved to ``target``; return what ended it early, or nothing.

    papermill limits single cells only, and a kernel that hangs in native code ignores interrupts. So the child is
    killed with its kernel after ``limit_s`` seconds and at an interrupt, and it kills itself when this process dies.
    """
    job = json.dumps([str(source.resolve()), str(target.resolve()), dict(values), os.getpid()])
    environment = {
        **({} if values.get("tier") == "gpu" else {"GLIBC_TUNABLES": HUGE_PAGES}),  # a checkpoint of 7 B would stay
        **os.environ,
        "TQDM_DISABLE": "1",  # a bar on stderr would be a fault
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "JUPYTER_PATH": str(Path(sys.prefix) / "share" / "jupyter"),  # its kernel goes before one that the user has
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "curvlib.runner", job],
            stdin=subprocess.DEVNULL,
            stdout=log,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the child
        )
        try:
            child.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"stopped at its limit of {timedelta(seconds=round(limit_s))}"
        finally:
            _kill(child.pid)
            child.wait()
        log.seek(0)
        return (shorten(log.read().strip().split("\n")[-1]) or "papermill died") if child.returncode else ""


def _kill(pid: int) -> None:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for member in [*process.children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                member.kill()


def _end_with(parent: int) -> None:
    with suppress(psutil.NoSuchProcess):
        psutil.Process(parent).wait()
    _kill(os.getpid())


def _child(source: str, target: str, values: dict[str, Any], parent: int) -> int:
    """Execute a notebook; where papermill cannot, print why in one line."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    import papermill

    screen = os.fdopen(os.dup(2), "w")
    os.dup2(1, 2)  # only the bar is shown; what a kernel writes outside its cells joins the log
    bar = {"desc": Path(source).stem, "leave": False, "file": screen, "disable": None}  # None: not without a terminal
    options = {
        "cwd": str(Path(source).parent),
        "progress_bar": bar,
        "start_timeout": 180,
    }  # s; a loaded machine is slow
    try:
        papermill.execute_notebook(_literal(source), _literal(target), values, kernel_name="python3", **options)
    except papermill.PapermillExecutionError:
        pass  # the notebook holds the error
    except Exception as error:
        kind = type(error).__name__
        memory = " (out of memory, as a rule)" if kind == "DeadKernelError" else ""
        print(f"papermill stopped: {kind}: {shorten(error)}{memory}")
        return 1
    return 0


def _literal(path: Path | str) -> str:
    return str(path).replace("{", "{{").replace("}", "}}")  # papermill formats every path with the parameters


if __name__ == "__main__":
    sys.exit(_child(*json.loads(sys.argv[1])))
