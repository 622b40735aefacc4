"""Rows of a study, one JSON object a line: read them, append one, and see which cases are still to be measured.

A study is then a loop that can be stopped anywhere, and several machines can share its cases::

    path = data_folder() / "studies" / "price.jsonl"
    for case in rows.remaining(cases, rows.read(path)):
        rows.append(path, {**case, "price": price(**case)})
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from curvlib.cache import locked
from curvlib.errors import CurvlibError

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """Return the rows of a file, none if it is not there yet; a last line that was cut by a kill is told and left out.

    Raises:
        CurvlibError: another line is no JSON object.
    """
    text = path.read_text("utf-8") if path.exists() else ""
    *lines, rest = text.split("\n")
    if rest:
        print(f"{path}: line {len(lines) + 1} was cut while it was written and is left out")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise CurvlibError(f"{path}, line {number} is no JSON object ({error}): restore or remove it") from error
    return rows


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Write one row to the end of a file and to the disk, in place of a line that was cut; other writers wait."""
    line = json.dumps(row, allow_nan=False) + "\n"
    with locked(path), path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def remaining(cases: Iterable[Row], rows: Sequence[Row]) -> list[Row]:
    """Return the cases of which no row has all values, in their order.

    >>> remaining([{"seed": 0}, {"seed": 1}], [{"seed": 0, "price": 0.2}])
    [{'seed': 1}]
    """
    return [case for case in cases if not any(row == {**row, **case} for row in rows)]
