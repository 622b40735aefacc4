"""A study's rows survive a kill in the middle of a line and two writers at once; a new run goes on from them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from distributed import LocalCluster

from curvlib import rows
from curvlib.errors import CurvlibError

WRITER = """
import sys
from pathlib import Path
from curvlib import rows
for number in range(50):
    rows.append(Path(sys.argv[1]), {"writer": sys.argv[2], "number": number, "text": "ü" * 5000})
"""


def test_a_study_goes_on_from_its_rows(tmp_path: Path) -> None:
    path, cases = tmp_path / "new" / "x.jsonl", [{"seed": seed, "sizes": [1, 2]} for seed in range(3)]
    assert rows.remaining(cases, rows.read(path)) == cases
    rows.append(path, {**cases[1], "price": 0.5})
    rows.append(path, {"seed": 0, "sizes": [1], "price": 0.5})  # another case
    assert rows.read(path)[0] == {"seed": 1, "sizes": [1, 2], "price": 0.5}
    assert rows.remaining(cases, rows.read(path)) == [cases[0], cases[2]]


@pytest.mark.parametrize("torn", ['{"seed": 1', '{"seed": 1}'])
def test_a_line_that_was_cut_is_told_dropped_and_replaced(
    torn: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.jsonl"
    rows.append(path, {"seed": 0})
    path.write_text(path.read_text() + torn)
    assert rows.read(path) == [{"seed": 0}]
    assert capsys.readouterr().out == f"{path}: line 2 was cut while it was written and is left out\n"
    rows.append(path, {"seed": 2})
    assert rows.read(path) == [{"seed": 0}, {"seed": 2}]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("line", ["{", "3", ""])
def test_another_damaged_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n{{"a": 2}}\n')
    with pytest.raises(CurvlibError, match=r"x\.jsonl, line 2 is no JSON object"):
        rows.read(path)


def test_what_is_no_number_is_refused_and_leaves_the_file(tmp_path: Path) -> None:
    rows.append(tmp_path / "x.jsonl", {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        rows.append(tmp_path / "x.jsonl", {"a": float("nan")})
    assert rows.read(tmp_path / "x.jsonl") == [{"a": 1}]


def test_two_writers_at_once_lose_and_mix_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name]) for name in ("a", "b")]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    for name in ("a", "b"):
        assert [row["number"] for row in rows.read(path) if row["writer"] == name] == list(range(50))


def measured(seed: int, folder: str) -> dict[str, Any]:
    """What a worker measures; the first one that takes seed 2 dies of it."""
    fatal = Path(folder) / "died"
    if seed == 2 and not fatal.exists():
        fatal.touch()
        os._exit(1)
    return {"square": seed**2}


@pytest.mark.filterwarnings("ignore")  # of dask, about the worker that died
def test_a_case_whose_worker_died_runs_on_another_and_every_row_is_written_once(tmp_path: Path) -> None:
    cases: list[rows.Row] = [{"seed": seed, "folder": str(tmp_path)} for seed in range(6)]
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0", silence_logs=50) as cluster:  # type: ignore[no-untyped-call]
        rows.append(tmp_path / "x.jsonl", {**cases[0], "square": 0})
        rows.fill(tmp_path / "x.jsonl", cases, measured, scheduler=cluster.scheduler_address)
    assert (tmp_path / "died").exists()
    rows.fill(tmp_path / "plain.jsonl", cases, measured)
    spread, plain = (
        sorted(rows.read(tmp_path / name), key=lambda row: row["seed"]) for name in ("x.jsonl", "plain.jsonl")
    )
    assert spread == plain
    assert len(plain) == 6


def test_a_scheduler_without_dask_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(CurvlibError, match=r"'tcp://x:1' was named without dask: pip install -e \.\[cluster\]"):
        rows.fill(tmp_path / "x.jsonl", [{"seed": 0}], measured, scheduler="tcp://x:1")
