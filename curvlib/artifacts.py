"""Stages (models and adapters) that are made once, under a key of all they depend on, and shared by the notebooks."""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from curvlib.cache import cache_dir, disk_is_full, locked
from curvlib.errors import CurvlibError

MANIFEST = "manifest.json"
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def artifact_key(config: Mapping[str, Any]) -> str:
    """Return 12 hexadecimal digits that stand for the configuration, whatever the order of its entries.

    >>> artifact_key({"rank": 8, "seed": 0}) == artifact_key({"seed": 0, "rank": 8})
    True
    """
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def code_digest(files: Iterable[Path]) -> str:
    """Return 12 hexadecimal digits that stand for what source files do, for the key of a stage that they make.

    Comments, docstrings and layout do nothing: to mend a sentence throws no result away.
    """
    return hashlib.sha256("\n".join(_bare(file.read_bytes()) for file in sorted(files)).encode()).hexdigest()[:12]


@cache
def _bare(source: bytes) -> str:
    """Return source code without comments and docstrings, in one layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def artifact(stage: str, config: Mapping[str, Any], build: Callable[[Path], None]) -> Path:
    """Return the folder of a stage; make it with ``build(folder)`` if it does not exist yet.

    The folder appears under its name only when ``build`` has ended and a manifest of all its files is written. Until
    then it is ``NAME.partial``, where ``build`` may keep checkpoints and from where a killed run goes on. One process
    builds, others that want the same stage wait.

    Args:
        stage: name of the stage, such as ``fine-tune``.
        config: everything that the result depends on, as JSON values.
        build: writes the files of the stage into the folder that it is given.

    Raises:
        CurvlibError: a file of the stage is missing, damaged or foreign, or the disk is full.
    """
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
