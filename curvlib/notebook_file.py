"""Notebook files: read, fingerprint, check after a run, and keep a run's outputs in the source."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from curvlib.errors import CurvlibError
from curvlib.report import write_atomically

KEPT_TYPES = ("text/plain", "text/html", "text/markdown", "text/latex", "image/png")
SIZE_LIMIT = 1_000_000  # bytes; larger notebooks are slow to open and to review


def read(path: Path) -> NotebookNode:
    """Read a notebook.

    Raises:
        CurvlibError: The file is not a notebook of format 4.
    """
    try:
        notebook: NotebookNode = nbformat.read(path, as_version=4)
    except (ValueError, nbformat.ValidationError) as error:
        raise CurvlibError(f"{path} is not a readable notebook ({shorten(error)}): restore it from git") from error
    return notebook


def write(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook in one step."""
    write_atomically(path, nbformat.writes(notebook) + "\n")


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The code cells that hold code, in reading order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def parameters(path: Path) -> dict[str, object]:
    """Names and default values in the cell tagged ``parameters``, as papermill sees them.

    Raises:
        CurvlibError: The notebook cannot be read, or a default is not a literal.
    """
    import papermill  # here, since it is slow to load and only a run needs it

    try:
        found = papermill.inspect_notebook(papermill_path(path))
        return {name: ast.literal_eval(entry["default"]) for name, entry in found.items()}
    except (ValueError, SyntaxError) as error:
        raise CurvlibError(f"{path}: its parameters cannot be read ({shorten(error)})") from error


def papermill_path(path: Path) -> str:
    """``path`` with its braces doubled: papermill formats every path with the parameters."""
    return str(path).replace("{", "{{").replace("}", "}}")


def fingerprint(notebook: NotebookNode, values: Mapping[str, object]) -> str:
    """SHA-256 of what a run depends on: the notebook's cells without outputs, the given values and all of curvlib."""
    cells = [[cell.get("id"), cell.cell_type, cell.source, cell.metadata.get("tags")] for cell in notebook.cells]
    digest = hashlib.sha256(json.dumps([cells, dict(values)], sort_keys=True).encode())
    for module in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(module.read_bytes())
    return digest.hexdigest()


def errors(notebook: NotebookNode) -> list[str]:
    """One line for each error output."""
    return [
        f"{_place(number, cell)}: {output.ename}: {shorten(output.evalue)}"
        for number, cell in enumerate(code_cells(notebook), 1)
        for output in cell.outputs
        if output.output_type == "error"
    ]


def problems(notebook: NotebookNode) -> list[str]:
    """One line for each reason not to trust an executed notebook.

    Errors, cells that did not run or ran out of order, and anything on stderr (warnings go there). papermill alone
    accepts the last two: after ``sys.exit(0)`` it leaves the remaining cells unexecuted and reports success.
    """
    found = errors(notebook)
    for number, cell in enumerate(code_cells(notebook), 1):
        if cell.execution_count is None:
            found.append(f"{_place(number, cell)} was not executed")
        elif cell.execution_count != number:
            found.append(f"{_place(number, cell)} ran out of order: its count is {cell.execution_count}")
        written = "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stderr")
        if written:
            found.append(f"{_place(number, cell)} wrote to stderr: {shorten(written)}")
    return found


def keep_outputs(source: Path, executed: Path) -> None:
    """Copy a run's outputs into the source notebook, cell by cell, so that the committed file shows a real run.

    Counts are renumbered (the injected parameters cell stays behind); timings, widgets and every image but PNG go.
    """
    notebook = read(source)
    ran = {cell.id: cell for cell in code_cells(read(executed))}
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        for volatile in ("papermill", "execution"):
            cell.metadata.pop(volatile, None)
    for number, cell in enumerate(code_cells(notebook), 1):
        cell.execution_count = number
        cell.outputs = [_kept(output, number) for output in ran[cell.id].outputs]
    write(notebook, source)


def _kept(output: NotebookNode, number: int) -> NotebookNode:
    kept = deepcopy(output)
    if "data" in kept:
        kept.data = {kind: value for kind, value in kept.data.items() if kind in KEPT_TYPES}
        kept.metadata = {}
    if kept.output_type == "execute_result":
        kept.execution_count = number
    return kept


def _place(number: int, cell: NotebookNode) -> str:
    return f"code cell {number} (`{shorten(cell.source, 40)}`)"


def shorten(text: object, length: int = 160) -> str:
    r"""The first line of ``text`` that is not blank, cut to ``length`` characters.

    >>> shorten("  one two\nthree", 6)
    'one t…'
    """
    line = next((line.strip() for line in str(text).splitlines() if line.strip()), "")
    return line if len(line) <= length else line[: length - 1] + "…"
