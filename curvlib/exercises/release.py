"""Student notebooks from the solved ones: stubs where solutions stood, and a refusal where a solution would show."""

import ast
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from curvlib import __version__
from curvlib.errors import CurvlibError
from curvlib.exercises.core import load

REPOSITORY = "OWNER/curvlib"  # on GitHub; whoever publishes puts the owner here, runs make release and tags the version

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
TAGS = {"parameters", "solution", "answer"}  # solution: a cell that no student sees; answer: a model answer in words
FOLD = "<details>\n<summary>{}</summary>\n\n{}\n\n</details>"
BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    f"(https://colab.research.google.com/github/{REPOSITORY}/blob/v{__version__}/notebooks/exercises/{{}})"
)
DOOR = f"""import importlib.util
import sys

if "google.colab" in sys.modules and importlib.util.find_spec("curvlib") is None:
    %pip install --quiet --no-deps git+https://github.com/{REPOSITORY}@v{__version__}"""
CALL = re.compile(r"\bcheck\((\w+)\)")
REGION = re.compile(rf"^( *){BEGIN}\n.*?\n *{END}$", re.DOTALL | re.MULTILINE)
MARKERS = re.compile(rf"^ *({BEGIN}|{END})\n?", re.MULTILINE)
TRACE = re.compile(r"^\s*#.*\b(begin|end|start|stop)\b.*\bsol|^\s*#+\s*solution", re.IGNORECASE)


def split(source: str) -> tuple[str, str]:
    """A cell's stub, with one raise for each marked region, and its solved text without the markers."""
    name = CALL.findall(source)[-1] if CALL.search(source) else "this cell"
    return REGION.sub(rf'\1raise NotImplementedError("{name} is not written yet")', source), MARKERS.sub("", source)


def student(solved: NotebookNode, *, fold: bool) -> NotebookNode:
    """The notebook without solutions and outputs; with ``fold`` each solution follows its stub, folded."""
    cells = []
    for cell in solved.cells:
        tags, source, folded = cell.metadata.get("tags", []), cell.source, ""
        if unknown := set(tags) - TAGS:
            raise CurvlibError(f"cell {cell.id}: unknown tag {', '.join(unknown)}, expected {', '.join(sorted(TAGS))}")
        if "solution" in tags:
            continue
        if "answer" in tags:
            source, folded = "*Your answer:*", FOLD.format("Model answer and rubric", source)
        elif cell.cell_type == "code":
            source, full = split(source)
            if source != full:
                folded = FOLD.format("Solution", f"```python\n{CALL.split(full)[0].strip()}\n```")
        make: Any = new_code_cell if cell.cell_type == "code" else new_markdown_cell
        cells.append(make(source, id=cell.id, metadata={"tags": tags} if tags else {}))
        if fold and folded:
            cells.append(new_markdown_cell(folded, id=f"{cell.id}-solution"))
    notebook: NotebookNode = new_notebook(cells=cells, metadata={"kernelspec": solved.metadata.kernelspec})
    return notebook


def leaks(solved: NotebookNode, number: str) -> Iterator[str]:
    """One line for each reason not to hand out what :func:`student` makes of a notebook."""
    bare = student(solved, fold=False)
    code = "\n".join(cell.source for cell in bare.cells if cell.cell_type == "code")
    functions = {node.name: ast.unparse(node) for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)}
    names, lines = load(number), {line.strip() for line in code.splitlines()}
    for name in names:
        if name not in functions:
            yield f"{name}: there is a check, but no such function in a cell"
        elif "raise NotImplementedError" not in functions[name]:
            yield f"{name}: nothing was taken out of it: is its {BEGIN} … {END} spelt right?"
    yield from (f"check({name}): notebook {number} has no such exercise" for name in set(CALL.findall(code)) - {*names})
    yield from (f"a marker is left: {line}" for line in lines if TRACE.search(line))
    for cell in solved.cells:
        stub, full = ({line.strip() for line in text.splitlines()} for text in split(cell.source))
        yield from (f"a line of a solution is left: {line}" for line in (full - stub) & lines if len(line) > 12)
        if "answer" in cell.metadata.get("tags", []) and any(cell.source in each.source for each in bare.cells):
            yield f"a model answer is left: {cell.source[:40]}"


def build(path: Path, *, fold: bool) -> str:
    """The text of a student notebook, the same each time.

    Raises:
        CurvlibError: a solution would show, or an exercise is missing; the message holds each reason.
    """
    solved = nbformat.read(path, 4)
    try:
        reasons = sorted(leaks(solved, path.name[:2]))
        notebook = student(solved, fold=fold)
    except (CurvlibError, SyntaxError) as error:
        reasons = [str(error)]
    if reasons:
        raise CurvlibError(f"not released: {path.name}: {'; '.join(reasons)}")
    if fold:  # the badge leads to the repository's notebook, whose solutions are folded
        title, _, text = notebook.cells[0].source.partition("\n")
        notebook.cells[0].source = f"{title}\n\n{BADGE.format(path.name)}\n{text}"
    notebook.cells.insert(1, new_code_cell(DOOR, id="colab"))
    return f"{nbformat.writes(notebook)}\n"


def release(notebooks: Path, archive: Path) -> int:
    """Write ``notebooks/exercises`` (solutions folded) and an archive (none), or nothing; return how many."""
    solutions = sorted((notebooks / "solutions").glob("*.ipynb"))
    texts = [(path.name, build(path, fold=True), build(path, fold=False)) for path in solutions]
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w") as out:
        for name, folded, bare in texts:
            (notebooks / "exercises" / name).write_text(folded, "utf-8")
            out.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), bare)
    return len(texts)
