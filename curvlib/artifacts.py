"""Stages (models and adapters) that are made once, under a key of all they depend on, and shared by the notebooks."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from curvlib.cache import cache_dir, disk_is_full, locked
from curvlib.errors import CurvlibError

MANIFEST = "manifest.json"
VERSIONS = {  # raise a stage's number when its output changes; tests/expected/stages.toml tells when it did
    "adapter": 1,
    "aligned": 1,
    "fine-tune": 1,
    "nf4": 1,
    "own-answers": 1,
    "restore": 4,
    "score": 2,
    "smollm2": 1,
}


def artifact_key(config: Mapping[str, Any]) -> str:
    """Return 12 hexadecimal digits that stand for the configuration, whatever the order of its entries.

    >>> artifact_key({"rank": 8, "seed": 0}) == artifact_key({"seed": 0, "rank": 8})
    True
    """
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def artifact(stage: str, config: Mapping[str, Any], build: Callable[[Path], None]) -> Path:
    """Return the folder of a stage; make it with ``build(folder)`` if it does not exist yet.

    The folder appears under its name only when ``build`` has ended and a manifest of all its files is written. Until
    then it is ``NAME.partial``, where ``build`` may keep checkpoints and from where a killed run goes on. One process
    builds, others that want the same stage wait.

    Args:
        stage: name of the stage, such as ``fine-tune``; its number in :data:`VERSIONS` (1 for others) joins the key.
        config: everything else that the result depends on, as JSON values; a model by :func:`curvlib.models.identity`.
        build: writes the files of the stage into the folder that it is given.

    Raises:
        CurvlibError: a file of the stage is missing, damaged or foreign, or the disk is full.
    """
    config = {**config, "version": VERSIONS.get(stage, 1)}
    final = cache_dir() / "artifacts" / f"{stage}-{artifact_key(config)}"
    with locked(final):
        if not final.exists():
            _build(final, config, build)
        _verify(final, config)
    return final


def _build(final: Path, config: Mapping[str, Any], build: Callable[[Path], None]) -> None:
    partial = final.with_name(f"{final.name}.partial")
    partial.mkdir(exist_ok=True)
    try:
        build(partial)
        manifest = {"config": dict(config), "files": {name: _digest(partial / name) for name in _files(partial)}}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True), "utf-8")
    except Exception as error:
        if not disk_is_full(error):
            raise
        shutil.rmtree(partial, ignore_errors=True)
        advice = "free some space there, or set CURVLIB_CACHE to another disk"
        raise CurvlibError(f"the disk that holds {final.parent} is full: {advice}") from error
    partial.replace(final)


def _verify(folder: Path, config: Mapping[str, Any]) -> None:
    """Compare the folder with its manifest; sizes and hashes are read every time (0.3 s for a 270 MB model)."""
    advice = f"remove it (rm -r '{folder}') and run again to rebuild it"
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        known, files = manifest["config"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CurvlibError(f"{folder / MANIFEST} is not a manifest of curvlib: {advice}") from error
    if known != json.loads(json.dumps(config)):
        raise CurvlibError(f"{folder} was made with another configuration: {advice}")
    for name in sorted(files.keys() | set(_files(folder))):
        if not (folder / name).is_file() or files.get(name) != _digest(folder / name):
            raise CurvlibError(f"{folder / name} is missing, damaged or foreign: {advice}")


def _files(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
