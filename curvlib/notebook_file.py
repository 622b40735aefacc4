"""Notebook files: read, check after a run, keep a run's outputs in the source, gather a run on one page."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from curvlib.errors import CurvlibError
from curvlib.report import load_record, markdown_table, write_atomically

KEPT_TYPES = ("text/plain", "text/html", "text/markdown", "text/latex", "image/png")
SIZE_LIMIT = 1_000_000  # bytes; larger notebooks are slow to open and to review


def read(path: Path) -> NotebookNode:
    """Read a notebook; CurvlibError if it is none of format 4."""
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


def fingerprint(notebook: NotebookNode, values: Mapping[str, object]) -> str:
    """SHA-256 of what a run depends on: code cells, parameters and curvlib's code, whatever its comments and layout."""
    cells = [[cell.get("id"), cell.source, cell.metadata.get("tags")] for cell in code_cells(notebook)]
    modules = [ast.dump(ast.parse(path.read_bytes())) for path in sorted(Path(__file__).parent.rglob("*.py"))]
    return hashlib.sha256(json.dumps([cells, dict(values), modules], sort_keys=True).encode()).hexdigest()


def problems(notebook: NotebookNode) -> list[str]:
    """One line for each reason not to trust an executed notebook, errors first.

    Errors, cells that did not run or ran out of order, and anything on stderr (warnings go there). papermill alone
    accepts the last two: after ``sys.exit(0)`` it leaves the remaining cells unexecuted and reports success.
    """
    errors, others = [], []
    for number, cell in enumerate(code_cells(notebook), 1):
        place = f"code cell {number} (`{shorten(cell.source, 40)}`)"
        if cell.execution_count is None:
            others.append(f"{place} was not executed")
        elif cell.execution_count != number:
            others.append(f"{place} ran out of order: its count is {cell.execution_count}")
        for output in cell.outputs:
            if output.output_type == "error":
                errors.append(f"{place}: {output.ename}: {shorten(output.evalue)}")
            elif output.get("name") == "stderr" and output.text:
                others.append(f"{place} wrote to stderr: {shorten(output.text)}")
    return errors + others


def find_fault(notebook: NotebookNode, results: Path, stop: str) -> str:
    """Why an ended run must not be trusted, in one line; empty if it may. ``stop`` is what ended it early."""
    if stop:
        begun = [bool(cell.metadata.get("papermill", {}).get("start_time")) for cell in code_cells(notebook)]
        return f"{stop} (code cell {sum(begun)} of {len(begun)})"
    if faults := problems(notebook):
        return faults[0]
    if not results.exists():
        return f"wrote no {results.name}: its last code cell must call Results(...).save()"
    try:
        load_record(results)
    except CurvlibError as error:
        return str(error)
    return ""


def keep_outputs(source: Path, executed: Path) -> None:
    """Copy a run's outputs into the source notebook, cell by cell, so that the committed file shows a real run.

    Counts are renumbered (the injected parameters cell stays behind); timings and every image but PNG go.
    """
    from nbconvert.preprocessors import ClearMetadataPreprocessor  # here, since it is slow to load

    clear = ClearMetadataPreprocessor(clear_notebook_metadata=False, preserve_cell_metadata_mask={"tags", "jupyter"})
    notebook, _ = clear.preprocess(read(source), {})
    notebook.metadata.pop("papermill", None)
    outputs = {cell.id: cell.outputs for cell in code_cells(read(executed))}
    for number, cell in enumerate(code_cells(notebook), 1):
        cell.execution_count, cell.outputs = number, outputs[cell.id]
        for output in cell.outputs:
            if "data" in output:
                output.data = {kind: value for kind, value in output.data.items() if kind in KEPT_TYPES}
                output.metadata = {}
            if output.output_type == "execute_result":
                output.execution_count = number
    write(notebook, source)
    if (size := source.stat().st_size) > SIZE_LIMIT:
        print(f"warning: {source} is {size / 1e6:.1f} MB with its outputs, above 1 MB: draw smaller figures")


def write_page(run_dir: Path, first: str) -> Path:
    """Write ``run_dir/report.html`` with all notebooks in ``run_dir`` and return its path.

    It has a table of outcomes, then each notebook's prose, tables and figures without code, the one whose name begins
    with ``first`` before the others. nbconvert makes it; it is one file, of which only formulas want a network.
    """
    from nbconvert import HTMLExporter

    title, lines, cells = f"curvlib: {run_dir.parent.name}, {run_dir.name}", [], []
    for path in sorted(run_dir.glob("[!.]*.ipynb"), key=lambda path: (not path.name.startswith(first), path.name)):
        notebook, name, heading = read(path), path.name.split(".")[0], ""
        outcome = [notebook.metadata.get("curvlib", {}).get("fault", "").replace("|", " "), "", ""]
        if not outcome[0]:
            record = load_record(path.with_name(f"{name}.results.json"))
            held = f"{sum(claim.holds for claim in record.claims)} of {len(record.claims)} claims hold"
            outcome = [held, f"{record.wall_s / 60:.1f} min on {record.device}", f"{record.peak_memory_mb:.0f} MB"]
        lines.append([f"[{name}](#cell-id={name}-0)", *outcome])
        for number, cell in enumerate(notebook.cells):
            cell.id = f"{name}-{number}"  # notebooks may have the same; nbconvert makes it a place on the page
            if cell.cell_type == "markdown":
                heading = [heading, *re.findall(r"^#+ +(.+)", cell.source, re.MULTILINE)][-1]
            for output in cell.get("outputs", []):
                if png := output.get("data", {}).get("image/png"):  # nbconvert itself gives no alternative text
                    output.data = {"text/html": f'<img src="data:image/png;base64,{png}" alt="{escape(heading)}">'}
        cells += notebook.cells
    table = markdown_table(("notebook", "outcome", "time", "peak memory"), lines)
    whole = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# {title}\n\n{table}"), *cells])
    exporter = HTMLExporter(exclude_input=True, exclude_output_prompt=True, require_js_url="")
    page, _ = exporter.from_notebook_node(whole, {"metadata": {"name": title}})
    write_atomically(run_dir / "report.html", page)
    return run_dir / "report.html"


def shorten(text: object, length: int = 160) -> str:
    r"""The first line of ``text`` that is not blank, cut to ``length`` characters.

    >>> shorten("  one two\nthree", 6)
    'one t…'
    """
    line = str(text).strip().split("\n")[0]
    return line if len(line) <= length else line[: length - 1] + "…"
