"""The solved notebooks as the source folder of an nbgrader course, for teachers whose hub has nbgrader."""

from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from curvlib.exercises.core import load
from curvlib.exercises.release import BEGIN, CALL, END


def graded(cell: NotebookNode, **settings: Any) -> NotebookNode:
    """The cell with nbgrader's metadata."""
    common = {"schema_version": 3, "grade": False, "solution": False, "locked": False, "task": False}
    cell.metadata["nbgrader"] = {**common, "grade_id": cell.id, **settings}
    return cell


def convert(solutions: Path, course: Path) -> int:
    """Write ``source/NN_name/NN_name.ipynb`` for each solved notebook; return how many.

    An exercise becomes an autograded answer, followed by a locked cell that asserts its check and has its points. A
    written question becomes a manually graded answer of 4 points.
    """
    paths = sorted(solutions.glob("*.ipynb"))
    for path in paths:
        solved, cells = nbformat.read(path, 4), []
        for cell in solved.cells:
            cells.append(cell)
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
            if BEGIN in cell.source:
                name = CALL.findall(cell.source)[-1]
                test = nbformat.v4.new_code_cell(f"assert check({name})", id=f"{cell.id}-test")
                cells += [graded(test, grade=True, locked=True, points=load()[name])]
                graded(cell, solution=True)
            elif "answer" in cell.metadata.get("tags", []):
                cell.source = f"{BEGIN}\n{cell.source}\n{END}"
                graded(cell, solution=True, grade=True, points=4)
        solved.cells, target = cells, course / "source" / path.stem / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(solved, target)
    return len(paths)
