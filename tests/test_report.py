"""Claims are refused when they are no claims, and results are written whole and read back."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from curvlib.errors import CurvlibError
from curvlib.evaluate.stats import Estimate
from curvlib.report import Claim, Results, load_record, write_atomically

GOOD = Claim("rise", "Compliance rises, points", 60.0, 50.0, 70.0, 2.0, 48, True)


def test_results_are_written_and_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = Results("01_x", "ci", 3, str(tmp_path / "new"))
    results.claim(**dataclasses.asdict(GOOD))
    assert results.claims == {"rise": GOOD}
    assert capsys.readouterr().out == "holds: Compliance rises, points: 60 [50, 70], control 2, n = 48 (rise)\n"
    path = results.save()
    assert path == tmp_path / "new" / "01_x.results.json"
    assert list(json.loads(path.read_text())) == [
        *("notebook", "tier", "seed", "device", "versions", "wall_s", "peak_memory_mb", "claims", "rows", "date")
    ]
    record = load_record(path)
    assert record.claims == (GOOD,)
    assert 10 < record.peak_memory_mb < 1e5
    assert 0 <= record.wall_s < 60
    assert set(record.versions) == {"python", "curvlib", "torch", "transformers", "peft", "bitsandbytes"}
    assert [file.name for file in path.parent.iterdir()] == ["01_x.results.json"]


def test_a_gpu_is_named_where_the_tier_ran_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked = {"is_available": True, "get_device_name": "H200", "max_memory_allocated": 21_460_000_000}
    for name, value in faked.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    told = {tier: load_record(Results("01_x", tier, 0, str(tmp_path / tier)).save()).device for tier in ("cpu", "gpu")}
    assert told == {"cpu": "cpu", "gpu": "H200, 21.5 GB at most, float32 products, bfloat16 answers"}


def test_an_estimate_stands_for_its_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = Results("01_x", "ci", 0, str(tmp_path))
    results.claim("rise", GOOD.statement, Estimate(60, 50, 70, 48), control=2, holds=True)
    assert results.claims == {"rise": GOOD}
    results.claim("fall", "Falls", Estimate(6, 5, 7, 48), control=2, holds=False, unit="points")
    assert "Falls: 6 [5, 7] points, control 2, n = 48 (fall)" in capsys.readouterr().out
    rows = [{"seed": 0, "rise": 60.0}]
    assert load_record(results.save(rows)).rows == rows
    with pytest.raises(CurvlibError, match="claim x has value: give an Estimate"):
        results.claim("x", "s", value=1, control=0, holds=True)


def test_a_run_by_hand_writes_under_runs_manual() -> None:
    assert Results("01_x", "cpu", 2).path.parts[-5:] == ("runs", "manual", "cpu", "seed2", "01_x.results.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"control": None}, "no null control"),
        ({"control": math.nan}, "control is nan"),
        ({"value": math.inf}, "value is inf"),
        ({"low": 71.0}, "low <= high"),
        ({"n": 0}, "n >= 1"),
        ({"id": "Rise!"}, "claim id 'Rise!'"),
    ],
)
def test_what_is_no_claim_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    fields = {**dataclasses.asdict(GOOD), **change}
    with pytest.raises(CurvlibError, match=message):
        Results("01_x", "ci", 0, str(tmp_path)).claim(**fields)


def test_an_id_is_used_once(tmp_path: Path) -> None:
    results = Results("01_x", "ci", 0, str(tmp_path))
    results.claim(**dataclasses.asdict(GOOD))
    with pytest.raises(CurvlibError, match="made twice"):
        results.claim(**dataclasses.asdict(GOOD))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"claims": [{"id": "x"}]}'])
def test_a_damaged_results_file_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "01_x.results.json"
    path.write_text(text)
    with pytest.raises(CurvlibError, match=r"01_x\.results\.json is no results file"):
        load_record(path)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")  # a lone surrogate has no UTF-8
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a.json": "old"}
