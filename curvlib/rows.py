"""Rows of a study, one JSON object a line: read them, append one, and see which cases are still to be measured.

A study is then a loop that can be stopped anywhere, and the workers of a dask scheduler can share its cases::

    rows.fill(data_folder() / "studies" / "seeds.jsonl", cases, measure)
    rows.fill(data_folder() / "studies" / "seeds.jsonl", cases, measure, scheduler="tcp://host:8786")
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
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


def fill(path: Path, cases: Iterable[Row], measure: Callable[..., Mapping[str, Any]], *, scheduler: str = "") -> None:
    """Append a row for each case that has none yet: the case and what ``measure(**case)`` returns.

    Args:
        path: of the JSON lines.
        cases: names and values, as JSON has them.
        measure: what is measured of a case, which does not depend on the other cases.
        scheduler: address of a dask scheduler, such as ``tcp://host:8786``; empty: a plain loop in this process.

    This process alone writes, each row once and as soon as it is there. A case whose worker died runs on another one.

    Raises:
        CurvlibError: a scheduler was named, and ``distributed`` is not installed.
    """
    left = remaining(cases, read(path))
    if not scheduler:
        for case in left:
            append(path, {**case, **measure(**case)})
        return
    try:
        from distributed import Client, as_completed  # an extra: one process needs none of it
    except ImportError as error:
        raise CurvlibError(f"scheduler {scheduler!r} was named without dask: pip install -e .[cluster]") from error
    with Client(scheduler) as client:
        running = {client.submit(measure, pure=False, **case): case for case in left}
        for future, found in as_completed(list(running), with_results=True):
            append(path, {**running[future], **found})


def remaining(cases: Iterable[Row], rows: Sequence[Row]) -> list[Row]:
    """Return the cases of which no row has all values, in their order.

    >>> remaining([{"seed": 0}, {"seed": 1}], [{"seed": 0, "price": 0.2}])
    [{'seed': 1}]
    """
    return [case for case in cases if not any(row == {**row, **case} for row in rows)]
