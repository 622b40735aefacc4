"""Student notebooks from the solved ones: stubs where solutions stood, and a refusal where a solution would show."""

import ast
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from curvlib import __version__
from curvlib.errors import CurvlibError
from curvlib.exercises.core import load

REPOSITORY = "OWNER/curvlib"  # on GitHub; whoever publishes puts the owner here, runs make release and tags the version

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
TAGS = {"parameters", "solution", "answer"}  # solution: a cell that no student sees; answer: a model answer in words
FOLD = "<details>\n<summary>Solution</summary>\n\n```python\n{}\n```\n\n</details>"
FOLDED_TEXT = "<details>\n<summary>Model answer and rubric</summary>\n\n{}\n\n</details>"
BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    f"(https://colab.research.google.com/github/{REPOSITORY}/blob/v{__version__}/notebooks/exercises/{{}})"
)
DOOR = f"""import importlib.util
import sys

if "google.colab" in sys.modules and importlib.util.find_spec("curvlib") is None:
    %pip install --quiet --no-deps git+https://github.com/{REPOSITORY}@v{__version__}"""
CALL = re.compile(r"\bcheck\((\w+)\)")
MARK = re.compile(r"^\s*#.*\b(begin|end|start|stop)\b.*\bsol|^\s*#+\s*solution", re.IGNORECASE)


def split(source: str) -> tuple[str, str]:
    """A cell's stub, with one raise for each marked region, and its solved text without the markers."""
    stub: list[str] = []
    solved: list[str] = []
    inside, function = False, "this cell"
    for number, line in enumerate(source.splitlines(), 1):
        mark = line.strip()
        if mark in (BEGIN, END):
            if inside == (mark == BEGIN):
                raise CurvlibError(f"line {number}: {mark} has no partner")
            inside = not inside
            if inside:
                stub.append(line.replace(BEGIN, f'raise NotImplementedError("{function} is not written yet")'))
            continue
        if definition := re.match(r"(?:def|class) (\w+)", line):
            function = definition[1]
        solved.append(line)
        if not inside:
            stub.append(line)
    if inside:
        raise CurvlibError(f"{BEGIN} has no {END}")
    return "\n".join(stub), "\n".join(solved)


def student(solved: NotebookNode, *, fold: bool) -> NotebookNode:
    """The notebook without solutions and outputs; with ``fold`` each solution follows its stub, folded."""
    cells = []
    for cell in solved.cells:
        tags = set(cell.metadata.get("tags", []))
        if unknown := tags - TAGS:
            raise CurvlibError(f"cell {cell.id}: unknown tag {', '.join(unknown)}, expected {', '.join(sorted(TAGS))}")
        if "solution" in tags:
            continue
        bare = nbformat.from_dict({**cell, "metadata": {"tags": sorted(tags)} if tags else {}})
        cells.append(bare)
        folded = ""
        if "answer" in tags:
            bare.source, folded = "*Your answer:*", FOLDED_TEXT.format(cell.source)
        if cell.cell_type == "code":
            bare.outputs, bare.execution_count = [], None
            bare.source, full = split(cell.source)
            if bare.source != full:
                folded = FOLD.format(CALL.split(full)[0].strip())
        if fold and folded:
            cells.append(nbformat.v4.new_markdown_cell(folded, id=f"{cell.id}-solution"))
    notebook: NotebookNode = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": solved.metadata.kernelspec})
    return notebook


def leaks(solved: NotebookNode, bare: NotebookNode, number: str) -> Iterator[str]:
    """One line for each reason not to hand out a notebook without folds."""
    code = [cell.source for cell in bare.cells if cell.cell_type == "code"]
    nodes = [node for source in code for node in ast.parse(source).body]
    functions = {node.name: ast.unparse(node) for node in nodes if isinstance(node, ast.FunctionDef)}
    names = set(load(number))
    for name in sorted(names):
        if name not in functions:
            yield f"{name}: there is a check, but no such function in a cell"
        elif "raise NotImplementedError" not in functions[name]:
            yield f"{name}: nothing was taken out of it: is its {BEGIN} … {END} spelt right?"
    asked = set(CALL.findall("\n".join(code)))
    yield from (f"check({name}): notebook {number} has no such exercise" for name in sorted(asked - names))
    lines = {line.strip() for source in code for line in source.splitlines()}
    yield from (f"a marker is left: {line}" for line in sorted(lines) if MARK.search(line))
    for cell in solved.cells:
        if cell.cell_type == "code":
            stub, full = (text.splitlines() for text in split(cell.source))
            shown = {line.strip() for line in full} - {line.strip() for line in stub}
            yield from (f"a line of a solution is left: {line}" for line in shown & lines if len(line) > 12)
        elif "answer" in cell.metadata.get("tags", []) and any(cell.source in each.source for each in bare.cells):
            yield f"a model answer is left: {cell.source[:40]}"


def build(source: Path, *, fold: bool) -> str:
    """The text of a student notebook, the same each time.

    Raises:
        CurvlibError: a solution would show, or an exercise is missing; the message holds each reason.
    """
    solved = nbformat.read(source, 4)
    try:
        reasons = list(leaks(solved, student(solved, fold=False), source.name[:2]))
        released = student(solved, fold=fold)
    except (CurvlibError, SyntaxError) as error:
        reasons = [str(error)]
    if reasons:
        raise CurvlibError(f"not released: {source.name}: {'; '.join(reasons)}")
    if fold:  # the badge leads to the repository's notebook, whose solutions are folded
        title, _, text = released.cells[0].source.partition("\n")
        released.cells[0].source = f"{title}\n\n{BADGE.format(source.name)}\n{text}"
    released.cells.insert(1, nbformat.v4.new_code_cell(DOOR, id="colab"))
    return f"{nbformat.writes(released)}\n"


def release(notebooks: Path, archive: Path) -> int:
    """Write ``notebooks/exercises`` (solutions folded) and an archive (none), or nothing; return how many."""
    solutions = sorted((notebooks / "solutions").glob("*.ipynb"))
    folded, bare = ([build(source, fold=fold) for source in solutions] for fold in (True, False))
    for source, text in zip(solutions, folded, strict=True):
        (notebooks / "exercises" / source.name).write_text(text, "utf-8")
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w") as out:
        for source, text in zip(solutions, bare, strict=True):
            out.writestr(zipfile.ZipInfo(source.name, (1980, 1, 1, 0, 0, 0)), text)
    return len(solutions)
