"""Imports point downward, notebooks import what there is, and reading a committed study loads few modules."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name

from curvlib.notebook_file import code_cells, read
from curvlib.report import ROOT

# From the bottom to the top; a room may use the rooms before it. Rooms of one row do not know each other.
LAYERS = (
    ("errors", "progress"),
    ("cache",),
    ("artifacts", "fetch"),
    ("parameters", "nf4", "prefix", "rows", "sources", "template"),
    ("batches", "checkpoint"),
    ("packaged",),
    ("models",),
    ("tiers", "data", "facts", "generate"),
    ("answers", "finetune"),
    ("stages",),
    ("curvature",),
    ("evaluate",),
    ("aligned", "plots", "report"),
    ("landscape",),
    ("restore",),
    ("influence",),
    ("defenses",),
    ("diffusion",),
    ("notebook_file",),
    ("runner", "exercises"),
    ("cli",),
)
MOST = 30  # modules of curvlib that reading a study may load


def room(path: Path) -> str:
    """The folder of curvlib that a module lies in, or its own name."""
    return path.relative_to(ROOT / "curvlib").parts[0].removesuffix(".py")


def imports(source: str) -> Iterator[str]:
    """The rooms of curvlib that a module's source imports, lazily or not."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "curvlib":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("curvlib."):
            yield str(node.module).split(".")[1]


def upward(here: str, source: str) -> list[str]:
    """The imports of a room's source that point up, or sideways."""
    rank = {name: row for row, layer in enumerate(LAYERS) for name in layer}
    top = len(LAYERS)
    used = (there for there in imports(source) if there != here and not there.startswith("__"))
    return [f"{here} -> {there}" for there in used if rank.get(there, top) >= rank.get(here, top)]


def test_no_import_points_up() -> None:
    modules = (path for path in (ROOT / "curvlib").rglob("*.py") if not path.name.startswith("__"))
    assert [arrow for path in modules for arrow in upward(room(path), path.read_text("utf-8"))] == []


def test_an_import_that_points_up_is_seen() -> None:
    assert upward("stages", "from curvlib.restore.loop import restore") == ["stages -> restore"]
    assert upward("stages", "from curvlib import models, plots") == ["stages -> plots"]
    assert upward("restore", "from curvlib.stages import FineTune") == []


def absent(source: str) -> list[str]:
    """What a cell imports from curvlib that is not there."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    names = [f"{n.module}.{alias.name}" for n in nodes for alias in n.names if str(n.module).startswith("curvlib")]
    return [name for name in names if not there(name)]


def there(name: str) -> bool:
    try:
        resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_notebooks_import_what_there_is() -> None:
    """In seconds; a run at tier ci would tell it after minutes, and studies do not run there."""
    notebooks = [path for folder in ("", "studies") for path in (ROOT / "notebooks" / folder).glob("*.ipynb")]
    assert len(notebooks) > 10
    assert [name for path in notebooks for cell in code_cells(read(path)) for name in absent(cell.source)] == []
    gone = absent("from curvlib.curvature.lanczos import eigenpairs, lanczos")
    assert gone == ["curvlib.curvature.lanczos.eigenpairs"]


def test_reading_a_study_loads_few_modules() -> None:
    code = (
        "import sys; from curvlib.report import load_study; assert load_study('diffusion');"
        "print(sum(name.split('.')[0] == 'curvlib' for name in sys.modules))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(ended.stdout) <= MOST
