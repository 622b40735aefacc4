"""The solved notebooks' functions, and those of learners who made a mistake."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat

from curvlib.exercises.release import split
from tests.exercises.mistakes import MISTAKES

ROOT = Path(__file__).resolve().parents[2]
SOLVED = sorted((ROOT / "notebooks/solutions").glob("*.ipynb"))
PARAMETERS = [(name, *mistake) for name, mistakes in MISTAKES.items() for mistake in mistakes]


def code(path: Path) -> list[str]:
    """The code cells of a notebook, without markers."""
    return [split(cell.source)[1] for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def sources() -> dict[str, str]:
    """The source of each function of the solved notebooks, with the imports of its notebook before it."""
    functions = {}
    for path in SOLVED:
        nodes = [(node, cell) for cell in code(path) for node in ast.parse(cell).body]
        imports = "\n".join(ast.unparse(node) for node, _ in nodes if isinstance(node, ast.Import))
        for node, cell in nodes:
            if isinstance(node, ast.FunctionDef):
                body = textwrap.dedent(str(ast.get_source_segment(cell, node)))
                functions[node.name] = f"{imports}\n\n\n{body}\n"
    return functions


SOURCES = sources()


def function(name: str, old: str = "", new: str = "") -> Callable[..., Any]:
    """The solution's function, or the one with a mistake (see mistakes.py)."""
    names: dict[str, Any] = {}
    exec(SOURCES["flat"], names)
    exec(wrong_source(name, old, new), names)
    result: Callable[..., Any] = names[name]
    return result


def wrong_source(name: str, old: str, new: str) -> str:
    """The source of the solution, or of the function with a mistake."""
    source = SOURCES[name]
    if old:
        assert old in source, f"{name}: the solution has no {old!r}"
        return source.replace(old, new)
    head = source[: source.index(":\n", source.index(f"def {name}")) + 2]
    return head + textwrap.indent(new.replace("; ", "\n"), "    ") + "\n" if new else source
