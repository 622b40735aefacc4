"""The study on a tiny model: every cell is measured once, has its controls, and its claims follow from its rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from curvlib import fetch, studies
from curvlib.cli import main
from curvlib.errors import CurvlibError
from curvlib.landscape import study
from curvlib.report import Claim
from curvlib.stages import FineTune
from curvlib.tiers import Tier
from tests.landscape.tiny import tiny  # noqa: F401  a fixture


@pytest.mark.parametrize("how", [FineTune(poison=0.1, rank=2), FineTune(poison=0.1, method="full")])
def test_a_cell_holds_its_controls_and_is_measured_once(tiny: Tier, how: FineTune, monkeypatch: Any) -> None:  # noqa: F811
    rows = study.cell(tiny, "m", how)
    assert [row["loss"] for row in rows] == list(study.LOSSES)
    for row in rows:
        assert row["pearson_low"] <= row["pearson_value"] <= row["pearson_high"]
        assert -1 <= row["null_low"] <= row["null_high"] <= 1
    curved = {row["loss"]: row for row in rows if "overlap" in row}
    assert list(curved) == list(study.CURVED)
    assert all(0 <= row["overlap"] <= 1 and row["top_before"] > 0 for row in curved.values())
    assert 0 < curved["task"]["step_share"] <= 1.001
    assert min(curved["task"][f"curvature_{name}"] for name in ("step", "gradient", "random")) > 0
    monkeypatch.setattr(study, "windows", None)
    assert study.cell(tiny, "m", how) == rows


def row(method: str, loss: str, poison: float, value: float, null: float) -> dict[str, Any]:
    ends = {"null_value": 0.0, "null_low": -null, "null_high": null, "null_n": 16}
    return {"method": method, "loss": loss, "poison": poison, "pearson_value": value, **ends}


def test_claims_follow_the_rule() -> None:
    rows = [
        row(m, "compliance", 0.1, v, 0.3) for m, v in (("lora4", 0.9), ("lora16", 0.7), ("full", 0.2)) for _ in "abc"
    ]
    rows += [row("lora4", "compliance", 0.0, -1.0, 0.3), row("lora4", "text", 0.1, 0.5, 0.3)]
    found = {claim.id: claim for claim in study.claims(rows)}
    assert {name: claim.holds for name, claim in found.items()} == {
        "harmful_correlation": True,
        "harmful_correlation_lora4": True,
        "harmful_correlation_lora16": True,
        "harmful_correlation_full": False,
        "harmful_correlation_control": True,
    }
    assert found["harmful_correlation"].value == pytest.approx(0.6)
    assert found["harmful_correlation_lora4"].n == 3


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(fetch, "data_folder", lambda: tmp_path)
    claim = Claim("x", "s", 1.0, 0.5, 2.0, 0.0, 3, holds=True)
    monkeypatch.setattr(studies, "STUDIES", {"toy": lambda tier: ([claim], [{"tier": tier.name}])})
    return tmp_path


def test_the_command_writes_the_file_and_reads_it_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert studies.load_study("toy") is None
    assert main(["study", "toy", "--tier", "ci"]) == 0
    assert capsys.readouterr().out == f"{folder / 'studies' / 'toy.json'}\n"
    written = json.loads((folder / "studies" / "toy.json").read_text())
    assert (written["study"], written["tier"], written["rows"]) == ("toy", "ci", [{"tier": "ci"}])
    assert studies.load_study("toy")["claims"] == [Claim("x", "s", 1.0, 0.5, 2.0, 0.0, 3, holds=True)]


def test_an_unknown_study_and_a_damaged_file_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "tea"]) == 1
    assert "no study is called 'tea': choose one of toy" in capsys.readouterr().err
    (folder / "studies").mkdir()
    (folder / "studies" / "toy.json").write_text('{"claims": [{}]}')
    with pytest.raises(CurvlibError, match=r"is not a study .* makes it again"):
        studies.load_study("toy")
