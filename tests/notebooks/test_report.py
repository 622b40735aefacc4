"""Notebook 09 joins seeds, keeps tiers apart, takes the newest run, and tells what is not there in one line."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from curvlib.errors import CurvlibError
from curvlib.report import ROOT, Claim, Record
from tests.notebook_cases import executed

SEED = Path("cpu") / "seed0"


def save(folder: Path, tier: str, seed: int, value: float, *, holds: bool = True, age: int = 0) -> None:
    claim = Claim("rise_points", "Rises", value, value - 1, value + 1, 0.5, 8, holds)
    record = Record("01_a", tier, seed, "cpu", {}, 1.0, 2.0, (claim,))
    folder.mkdir(parents=True)
    path = folder / "01_a.results.json"
    path.write_text(json.dumps(asdict(record)))
    os.utime(path, (1e9 - age, 1e9 - age))


def report(runs: Path) -> dict[str, Any]:
    return executed(ROOT / "notebooks" / "09_report.ipynb", output_dir=str(runs / SEED))


def test_seeds_are_joined_tiers_kept_apart_and_gaps_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "ci" / "seed0", "ci", 0, 10.0)
    save(tmp_path / "ci" / "seed1", "ci", 1, 20.0, holds=False)
    save(tmp_path / SEED, "cpu", 0, 50.0)
    save(tmp_path / "manual" / SEED, "cpu", 0, 99.0, age=100)
    names = report(tmp_path)
    assert names["lines"] == [
        ("01", "ci", "`rise_points`", "15", "9 to 21", "0.5", "2", "1 of 2"),
        ("01", "cpu", "`rise_points`", "50", "49 to 51", "0.5", "1", "1 of 1"),
    ]
    assert list(names["failed"]) == [("01_a", "ci", "rise_points")]
    told = capsys.readouterr().out
    assert "00_start_here has no results yet: python -m curvlib run --only 00 makes them" in told
    assert "diffusion, tier cpu" in told


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / SEED).mkdir(parents=True)
    (tmp_path / SEED / "01_a.results.json").write_text("{}")
    with pytest.raises(CurvlibError, match="is no results file"):
        report(tmp_path)
