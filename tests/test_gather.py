"""Results are gathered over seeds and tiers, and what is not there is told in one line."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from curvlib import fetch, gather
from curvlib.errors import CurvlibError
from curvlib.report import Claim, Record


def save(folder: Path, notebook: str, tier: str, seed: int, value: float, *, holds: bool = True, age: int = 0) -> None:
    claim = Claim("rise_points", "Rises", value, value - 1, value + 1, 0.5, 8, holds)
    record = Record(notebook, tier, seed, "cpu", {}, 1.0, 2.0, (claim,))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{notebook}.results.json"
    path.write_text(json.dumps(asdict(record)))
    os.utime(path, (1e9 - age, 1e9 - age))


def test_seeds_are_joined_and_tiers_kept_apart(tmp_path: Path) -> None:
    save(tmp_path / "ci" / "seed0", "01_a", "ci", 0, 10.0)
    save(tmp_path / "ci" / "seed1", "01_a", "ci", 1, 20.0, holds=False)
    save(tmp_path / "cpu" / "seed0", "01_a", "cpu", 0, 50.0)
    save(tmp_path / "cpu" / "seed0", "09_report", "cpu", 0, 1.0)
    found = gather.over_seeds(gather.load_records(tmp_path, but="09_report"))
    assert {group: len(claims) for group, claims in found.items()} == {
        ("01_a", "ci", "rise_points"): 2,
        ("01_a", "cpu", "rise_points"): 1,
    }
    one = gather.joined(found["01_a", "ci", "rise_points"])
    assert (one.value, one.low, one.high, one.holds) == (15.0, 9.0, 21.0, False)
    assert gather.claims_table(found).splitlines()[2:] == [
        "| 01 | ci | `rise_points` | 15 | 9 to 21 | 0.5 | 2 | 1 of 2 |",
        "| 01 | cpu | `rise_points` | 50 | 49 to 51 | 0.5 | 1 | 1 of 1 |",
    ]


def test_the_newest_run_of_a_seed_counts(tmp_path: Path) -> None:
    save(tmp_path / "ci" / "seed0", "01_a", "ci", 0, 10.0)
    save(tmp_path / "manual" / "ci" / "seed0", "01_a", "ci", 0, 99.0, age=100)
    assert [record.claims[0].value for record in gather.load_records(tmp_path)] == [10.0]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "01_a.results.json").write_text("{}")
    with pytest.raises(CurvlibError, match="is no results file"):
        gather.load_records(tmp_path)


def test_absent_studies_and_absent_parts_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "data_folder", lambda: tmp_path)
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "degradation.json").write_text('{"claims": [], "rows": [], "runs": {"models": {}}}')
    begun = '{"claims": [], "rows": [], "runs": {"seed 0": {"unfinished": true}}}'
    (tmp_path / "studies" / "landscape.json").write_text(begun)
    lines = gather.missing()
    assert len(lines) == len(gather.STUDIES)
    assert "data/studies/influence.json is not there yet: python -m curvlib study influence measures it" in lines
    told = "data/studies/degradation.json lacks judge: python -m curvlib study degradation adds them"
    assert told in lines
    assert "data/studies/landscape.json has no whole part yet: python -m curvlib study landscape measures it" in lines
