"""What students hand in: notebook 05 of the release, filled in, broken and worse; three exercises are graded."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from curvlib.exercises.release import build
from tests.exercises.cases import SOLVED, wrong_source

NAMES = ["natural_step", "weighted_return", "random_control"]  # 6, 4 and 3 points
SOURCE = next(path for path in SOLVED if path.name.startswith("05"))
RIGHT = {name: f"{wrong_source(name, '', '')}\n\ncheck({name})" for name in NAMES}
SWAPPED = "    return torch.linalg.solve(safety_metric + c * task_metric, safety_metric @ tuned)"
HEAD = {name: re.search(r"def .*:\n", RIGHT[name])[0] for name in NAMES}  # type: ignore[index]
PARTIAL = {"natural_step": RIGHT["natural_step"], "weighted_return": HEAD["weighted_return"] + SWAPPED}
STUB = "    raise NotImplementedError"
FORGERY = """
import json, os
FORGED = json.dumps({"result": {"value": 0.0}, "states": []}).encode()

def natural_step(g, G, tau):
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, FORGED + b"\\n{garbage\\n")
        except OSError:
            pass
    return g
"""
NESTED = """
import sys
sys.setrecursionlimit(10**6)

def natural_step(g, G, tau):
    nest = []
    for _ in range(20_000):
        nest = [nest]
    return nest
"""
PATCHED = """
import builtins, math, torch
import curvlib.exercises.core as core
core.require = core.close = torch.allclose = math.isclose = lambda *a, **k: True
always = core.assess.__globals__.update(require=lambda *a, **k: None)

def natural_step(g, G, tau):
    return torch.ones(2)
"""
SPY = """
import glob, os, pathlib
READ = [pathlib.Path(name).read_text() for name in glob.glob("**/*", recursive=True)]
SECRETS = [name for name in os.environ if name not in ("PATH", "HOME", "PYTHONPATH", "OMP_NUM_THREADS", "LC_CTYPE")]
FOUND = open("") if READ or SECRETS else None
"""
CHILD = """
import pathlib, subprocess
CHILD = subprocess.Popen(["sleep", "600"], start_new_session=True)
NOTE = pathlib.Path({path!r}).write_text(str(CHILD.pid))
"""
WRITES = """
import pathlib
A = pathlib.Path("written_here").write_text("x")
B = (pathlib.Path.home() / "written_home").write_text("x")
"""


def blank() -> NotebookNode:
    """The notebook as students get it."""
    notebook: NotebookNode = nbformat.reads(build(SOURCE, fold=False), 4)
    return notebook


def fill(answers: dict[str, str]) -> NotebookNode:
    """The notebook with these answers in their cells."""
    notebook = blank()
    for name, source in answers.items():
        cell(notebook, name).source = source
    return notebook


def cell(notebook: NotebookNode, name: str) -> NotebookNode:
    """The cell that defines this function."""
    result: NotebookNode = next(
        each for each in notebook.cells if each.cell_type == "code" and f"def {name}(" in each.source
    )
    return result


def with_natural(source: str) -> NotebookNode:
    """All right, but for the cell of the natural step."""
    return fill({**RIGHT, "natural_step": source})


def deleted() -> NotebookNode:
    """The calls of check and the last cell are gone."""
    notebook = fill({name: source.partition("\n\n\ncheck")[0] for name, source in RIGHT.items()})
    notebook.cells = [each for each in notebook.cells if each.id not in ("see", "points", "imports")]
    notebook.cells.insert(0, nbformat.v4.new_code_cell("import torch"))
    return notebook


def retyped() -> NotebookNode:
    """An answer in a cell of its own, without the cell's id and metadata."""
    notebook = fill({**RIGHT, "natural_step": "# below"})
    notebook.cells.append(nbformat.v4.new_code_cell(RIGHT["natural_step"]))
    return notebook


def copied() -> NotebookNode:
    """An answer cell twice, with one id."""
    notebook = fill(RIGHT)
    notebook.cells.insert(3, copy.deepcopy(cell(notebook, "natural_step")))
    return notebook


def edited() -> NotebookNode:
    """Checks that print what one likes to read."""
    notebook = fill(PARTIAL)
    for each in notebook.cells:
        each.source = each.source.replace("check(", "print('✔ right', ")
    return notebook


def colab() -> NotebookNode:
    """Ids and metadata as Colab leaves them."""
    notebook = fill(RIGHT)
    for number, each in enumerate(notebook.cells):
        each.pop("id")
        each.metadata = {"id": f"x{number}", "colab": {"base_uri": "https://localhost:8080/"}}
    notebook.nbformat_minor, notebook.metadata = 0, {"accelerator": "GPU", "colab": {}}
    return notebook


Hostile = tuple[Callable[[Path], NotebookNode | str], int, str]  # (notebook, points of 13, part of the feedback)


def natural(source: str, points: int, message: str) -> Hostile:
    """A submission whose natural step is this, and the rest right."""
    return lambda _: with_natural(source), points, message


LOOP = HEAD["natural_step"] + "    while True:\n        pass"
GOOD = RIGHT["natural_step"]
CASES: dict[str, Hostile] = {
    "perfect": (lambda _: fill(RIGHT), 13, "✔ natural_step: right"),
    "partial": (lambda _: fill(PARTIAL), 6, "the metrics are swapped"),
    "untouched": (lambda _: blank(), 0, "✘ random_control: not written yet"),
    "deleted": (lambda _: deleted(), 13, "✔ random_control"),
    "edited": (lambda _: edited(), 6, "✘ random_control: not written yet"),
    "retyped": (lambda _: retyped(), 13, "✔ natural_step"),
    "copied": (lambda _: copied(), 13, "✔ natural_step"),
    "renamed": (lambda _: fill(RIGHT), 13, "✔ natural_step"),
    "broken": (lambda _: '{"cells": [', 0, "the file is no notebook: ask for it again"),
    "syntax": natural(GOOD.replace("tau):", "tau)"), 7, "it has a syntax error in line"),
    "package": natural(f"import missing_package\n{GOOD}", 13, "ModuleNotFoundError: No module named 'missing_package'"),
    "endless": natural(LOOP, 7, "no answer within 3 seconds: an endless loop?"),
    "floods": natural(f"{GOOD}\nX = [print('x' * 80) for _ in range(100_000)]", 13, "✔ natural_step"),
    "exits": natural("import os\n" + HEAD["natural_step"] + "    os._exit(0)", 7, "ended its own process"),
    "sys_exit": natural(f"import sys\nX = sys.exit(0)\n{HEAD['natural_step']}{STUB}", 7, "SystemExit"),
    "patches": natural(PATCHED, 7, "✘ natural_step: "),
    "spies": natural(f"{SPY}\n{GOOD}", 13, "✔ natural_step"),
    "writes": natural(f"%%time\n!touch shell_was_here\n{WRITES}\n{GOOD}", 13, "✔ natural_step"),
    # ours
    "=colab": (lambda _: colab(), 13, "✔ natural_step"),
    "forges": natural(FORGERY, 7, "its reply could not be read"),
    "nests": natural(NESTED, 7, "✘ natural_step: "),
    "huge": natural(HEAD["natural_step"] + "    return torch.zeros(2_000_000)", 7, "more than 20,000,000 bytes"),
    "children": (lambda tmp: with_natural(CHILD.format(path=str(tmp / "pid")) + GOOD), 13, "✔ natural_step"),
    "malformed": (lambda _: json.dumps({"cells": [{"cell_type": "code", "source": 5}, None]}), 0, "is no notebook"),
    "spoils": natural(HEAD["natural_step"] + "    return G.zero_() @ g.zero_()", 7, "✘ natural_step: "),
    "slow_cell": natural(f"X = [0 for _ in iter(int, 1)]\n{GOOD}", 13, "took too long and were left out"),
    "memory": natural(HEAD["natural_step"] + "    return torch.ones(10**11)", 7, "stopped with RuntimeError"),
    "uses_curvlib": natural(
        f"from curvlib import errors\n{GOOD}", 13, "uses curvlib itself: from curvlib import errors"
    ),
}


def write(folder: Path) -> None:
    """All submissions: a folder for each student, but NAME.ipynb for those with an even length of name."""
    for name, (make, _, _) in CASES.items():
        notebook = make(folder.parent)
        text = notebook if isinstance(notebook, str) else json.dumps(notebook)
        file = {"renamed": "05 (1) FINAL.ipynb"}.get(name, SOURCE.name)
        path = folder / name / file if len(name) % 2 or name == "renamed" else folder / f"{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
