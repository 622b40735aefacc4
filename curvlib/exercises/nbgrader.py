"""The solved notebooks as the source folder of an nbgrader course, for teachers whose hub has nbgrader."""

from pathlib import Path

import nbformat

from curvlib.exercises.core import load
from curvlib.exercises.release import BEGIN, CALL

COMMON = {"schema_version": 3, "grade": False, "solution": False, "locked": False, "task": False}


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
                cell.metadata["nbgrader"] = {**COMMON, "solution": True, "grade_id": cell.id}
                graded = {**COMMON, "grade": True, "locked": True, "grade_id": f"{cell.id}-test"}
                graded["points"] = load()[name].points
                test = nbformat.v4.new_code_cell(f"assert check({name})", id=f"{cell.id}-test")
                test.metadata["nbgrader"] = graded
                cells.append(test)
            elif "answer" in cell.metadata.get("tags", []):
                cell.source = f"{BEGIN}\n{cell.source}\n### END SOLUTION"
                manual = {**COMMON, "solution": True, "grade": True, "grade_id": cell.id, "points": 4}
                cell.metadata["nbgrader"] = manual
        solved.cells = cells
        target = course / "source" / path.stem / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(solved, target)
    return len(paths)
