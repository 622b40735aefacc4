"""One cache directory: work happens in folders that vanish, and results appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from curvlib.errors import CurvlibError


def cache_dir() -> Path:
    """Return the cache directory, created if absent: ``$CURVLIB_CACHE``, or ``~/.cache/curvlib``.

    Raises:
        CurvlibError: the directory cannot be made.
    """
    folder = Path(os.environ.get("CURVLIB_CACHE") or "~/.cache/curvlib").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        advice = "set CURVLIB_CACHE to a folder you can write to"
        raise CurvlibError(f"cannot make the cache directory {folder} ({error.strerror}): {advice}") from error
    return folder.resolve()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time make ``path``; the others wait. The system frees the lock of a killed process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        yield


@contextmanager
def workspace(beside: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder on the file system of ``beside`` (default: of the cache), for an atomic rename out of it.

    The folder is removed at the end. What killed runs left behind is removed first: a living process holds
    a lock on its folder, and the system frees the lock when the process dies.

    Raises:
        CurvlibError: the disk became full meanwhile.
    """
    root = (beside.parent if beside else cache_dir()) / ".tmp"
    with locked(root / "sweep"):  # nobody sweeps between the making of a folder and its locking
        _sweep(root)
        folder = Path(tempfile.mkdtemp(dir=root))
        lock = FileLock(folder.with_suffix(".lock"))
        lock.acquire()
    try:
        yield folder
    except Exception as error:
        if disk_is_full(error):
            advice = "free some space there, or set CURVLIB_CACHE to another disk"
            raise CurvlibError(f"the disk that holds {root.parent} is full: {advice}") from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()
        folder.with_suffix(".lock").unlink(missing_ok=True)


def publish(new: Path, final: Path) -> None:
    """Rename the finished ``new`` (file or folder) in a workspace to ``final``; it replaces what stood there."""
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.is_dir():  # a folder in use cannot be renamed over: it leaves with the workspace
        final.replace(new.with_name(f"{new.name}.old"))
    new.replace(final)


def disk_is_full(error: BaseException) -> bool:
    """Tell whether ``error`` says that no space is left; safetensors says so in words, without an ``errno``."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)


def _sweep(root: Path) -> None:
    for path in root.glob("[!.]*.lock"):
        with suppress(Timeout, OSError):  # its owner lives, or has just finished
            with FileLock(path, timeout=0):
                shutil.rmtree(path.with_suffix(""), ignore_errors=True)
            path.unlink()
