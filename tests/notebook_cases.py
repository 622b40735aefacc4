"""Tiny notebooks for the tests of the runner, the report and the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from curvlib.notebook_file import code_cells, read

HEADER = 'tier: str = "ci"  # ci | cpu | gpu\nseed: int = 0\noutput_dir: str = ""'
CLAIM = (
    'results.claim(id="rise", statement="Compliance rises, points", value=60, low=50, high=70, control=2, n=48,'
    " holds={holds})"
)
FIGURE = "import matplotlib.pyplot as plt\n\nplt.plot([0, 1])\nplt.show()"


def markdown(source: str) -> NotebookNode:
    """A Markdown cell."""
    cell: NotebookNode = nbformat.v4.new_markdown_cell(source)
    return cell


def code(source: str, *tags: str) -> NotebookNode:
    """A code cell."""
    cell: NotebookNode = nbformat.v4.new_code_cell(source, metadata={"tags": [*tags]})
    return cell


def save(path: Path, *cells: NotebookNode) -> Path:
    """Write a Python notebook of these cells."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[*cells], metadata=metadata), path)
    return path


def lesson(path: Path, *cells: str, header: str = HEADER, holds: bool = True) -> Path:
    """A notebook with a title, the parameters cell, the given code, one claim and its results."""
    start = f"from curvlib.report import Results\n\nresults = Results({path.stem!r}, tier, seed, output_dir)"
    end = f"{CLAIM.format(holds=holds)}\nresults.save()"
    sources = [start, *cells, end]
    return save(path, markdown("# A lesson"), code(header, "parameters"), *map(code, sources))


def executed(path: Path, **parameters: object) -> dict[str, Any]:
    """The names that a notebook's cells leave, run in this process without those that measure."""
    names: dict[str, Any] = {}
    for cell in code_cells(read(path)):
        tags = cell.metadata.get("tags", [])
        if "measure" not in tags:
            exec(compile(cell.source, f"{path.name}, {cell.id}", "exec"), names)
        if "parameters" in tags:
            names |= parameters
    return names
