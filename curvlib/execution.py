"""Execute one notebook with papermill in a child process that outlives neither its time limit nor its parent.

papermill limits single cells only, changes the process-wide directory, and a kernel that hangs in native code ignores
interrupts. So each notebook gets a child: it holds the other end of a pipe from its parent (the leash), and when that
closes, because of the limit, Ctrl-C or the parent's death, it kills its kernel and itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from curvlib.notebook_file import papermill_path
from curvlib.report import ROOT

# Large tensors come from huge pages that stay with the kernel: fresh small pages cost a sixth of the time on Linux.
HUGE_PAGES = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8000000000:glibc.malloc.trim_threshold=20000000000"


@dataclass(frozen=True)
class Ending:
    """How the child ended: its exit code, whether the limit was reached, and the last line it wrote."""

    returncode: int
    timed_out: bool
    last_line: str


def execute(
    source: Path, target: Path, values: Mapping[str, object], limit_s: float, watch: Callable[[], None]
) -> Ending:
    """Execute ``source`` with the parameters ``values`` in a fresh kernel of the running interpreter.

    Args:
        source: The notebook to read; its folder is the kernel's working directory.
        target: The notebook to write, saved after every cell.
        values: The parameters to inject.
        limit_s: Wall-clock limit of the whole notebook in seconds.
        watch: Called about once a second while the child runs.
    """
    job = json.dumps({"source": str(source.resolve()), "target": str(target.resolve()), "values": dict(values)})
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryFile() as log:
        _write_kernelspec(Path(home))
        child = subprocess.Popen(
            [sys.executable, "-m", "curvlib.execution", job],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(home),
            start_new_session=True,  # Ctrl-C reaches the parent alone, which then lets go of the leash
        )
        try:
            timed_out = not _wait(child, limit_s, watch)
        finally:
            _release(child)
        log.seek(0)
        lines = log.read().decode(errors="replace").split("\n")
    return Ending(child.returncode, timed_out, next((line for line in reversed(lines) if line.strip()), ""))


def _wait(child: subprocess.Popen[bytes], limit_s: float, watch: Callable[[], None]) -> bool:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        try:
            child.wait(min(1.0, limit_s))
            return True
        except subprocess.TimeoutExpired:
            watch()
    return False


def _release(child: subprocess.Popen[bytes]) -> None:
    assert child.stdin is not None
    child.stdin.close()
    try:
        child.wait(10)
    except subprocess.TimeoutExpired:
        child.kill()  # its kernel notices within a second that its parent is gone
        child.wait()


def _write_kernelspec(home: Path) -> None:
    # A "python3" kernel that the user installed may belong to another interpreter; JUPYTER_PATH is searched first.
    folder = home / "kernels" / "python3"
    folder.mkdir(parents=True)
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "Python 3",
        "language": "python",
    }
    (folder / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")


def _environment(home: str) -> dict[str, str]:
    environment = {**os.environ, "TQDM_DISABLE": "1", "JUPYTER_PATH": home}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment.setdefault("GLIBC_TUNABLES", HUGE_PAGES)
    environment.pop("MPLBACKEND", None)  # the kernel's inline backend draws the figures
    return environment


def _work(source: str, target: str, values: Mapping[str, object]) -> None:
    import papermill

    threading.Thread(target=_die_with_parent, daemon=True).start()
    papermill.execute_notebook(
        papermill_path(Path(source)),
        papermill_path(Path(target)),
        parameters=dict(values),
        kernel_name="python3",
        cwd=str(Path(source).parent),
        progress_bar=False,
        start_timeout=180,  # seconds; a loaded machine starts kernels slowly
    )


def _die_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # returns when the parent closes the leash or dies
    for process in psutil.Process().children(recursive=True):
        process.kill()
    os._exit(1)


if __name__ == "__main__":
    _work(**json.loads(sys.argv[1]))
