"""A study is measured whole or in parts; its file keeps what was measured before and is read back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from curvlib import fetch, studies
from curvlib.cli import main
from curvlib.errors import CurvlibError
from curvlib.report import Claim
from curvlib.studies import Study
from curvlib.tiers import Tier


def first(tier: Tier, _: Sequence[Any]) -> list[dict[str, Any]]:
    return [{"x": 1, "tier": tier.name}]


def second(_: Tier, rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Go on from what the first part found."""
    return [{"x": row["x"] + 1} for row in rows if row["part"] == "first"]


def claims(rows: Sequence[Any]) -> list[Claim]:
    return [Claim("x", "s", float(row["x"]), 0.5, 3.0, 0.0, len(rows), holds=True) for row in rows[-1:]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(fetch, "data_folder", lambda: tmp_path)
    monkeypatch.setattr(studies, "STUDIES", {"toy": lambda: Study({"first": first, "second": second}, claims)})
    return tmp_path


def written(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "studies" / "toy.json").read_text())
    return found


def test_the_command_writes_the_file_and_reads_it_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert studies.load_study("toy") is None
    assert main(["study", "toy", "--tier", "ci"]) == 0
    assert capsys.readouterr().out == f"{folder / 'studies' / 'toy.json'}\n"
    assert (written(folder)["study"], written(folder)["tier"]) == ("toy", "ci")
    assert written(folder)["rows"] == [{"part": "first", "x": 1, "tier": "ci"}, {"part": "second", "x": 2}]
    assert studies.load_study("toy")["claims"] == [Claim("x", "s", 2.0, 0.5, 3.0, 0.0, 2, holds=True)]


def test_a_part_joins_what_the_file_holds(folder: Path) -> None:
    assert main(["study", "toy", "--tier", "ci", "--only", "second"]) == 0
    assert written(folder)["rows"] == []
    for part in ("first", "second", "second"):
        assert main(["study", "toy", "--tier", "ci", "--only", part]) == 0
    assert [row["part"] for row in written(folder)["rows"]] == ["first", "second"]
    assert list(written(folder)["runs"]) == ["second", "first"]
    assert written(folder)["runs"]["first"]["torch"]
    with pytest.raises(CurvlibError, match="holds tier ci, not cpu"):
        studies.run_study("toy", "cpu", ["first"])


def test_an_interrupted_study_keeps_its_finished_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> list[Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(studies, "STUDIES", {"toy": lambda: Study({"first": first, "second": fail}, claims)})
    assert main(["study", "toy", "--tier", "ci"]) == 130
    assert [row["part"] for row in written(folder)["rows"]] == ["first"]


def test_without_parts_a_study_measures_what_lacks_and_a_whole_one_anew(folder: Path, monkeypatch: Any) -> None:
    seen: list[str] = []

    def noted(part: str) -> Any:
        return lambda *_: seen.append(part) or [{"x": 1}]

    parts = {name: noted(name) for name in ("first", "second")}
    monkeypatch.setattr(studies, "STUDIES", {"toy": lambda: Study(parts, claims)})
    for command in (["--only", "first"], [], [], ["--tier", "cpu"]):
        assert main(["study", "toy", "--tier", "ci", *command]) == 0
    assert seen == ["first", "second", *["first", "second"] * 2]
    assert written(folder)["tier"] == "cpu"


def test_a_long_part_goes_on_from_the_rows_that_it_yielded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at = 2

    def long(_: Tier, rows: Sequence[Any]) -> Iterator[dict[str, Any]]:
        for x in sorted({1, 2, 3} - {row["x"] for row in rows if row["part"] == "long"}):
            if x == stop_at:
                raise KeyboardInterrupt
            yield {"x": x}

    monkeypatch.setattr(studies, "STUDIES", {"toy": lambda: Study({"first": first, "long": long}, claims)})
    assert main(["study", "toy", "--tier", "ci", "--only", "long"]) == 130
    assert written(folder)["rows"] == [{"part": "long", "x": 1}]
    assert (written(folder)["claims"], studies.load_study("toy")) == ([], None)
    stop_at = 0
    assert main(["study", "toy", "--tier", "ci", "--only", "first,long"]) == 0
    assert [row["x"] for row in written(folder)["rows"] if row["part"] == "long"] == [1, 2, 3]
    assert written(folder)["claims"][0]["value"] == 3.0
    assert main(["study", "toy", "--tier", "ci", "--only", "long"]) == 0
    assert [row["x"] for row in written(folder)["rows"] if row["part"] == "long"] == [1, 2, 3]


def test_an_unknown_study_or_part_and_a_damaged_file_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "tea"]) == 1
    assert "no study is called 'tea': choose one of toy" in capsys.readouterr().err
    assert main(["study", "toy", "--only", "third"]) == 1
    assert "study toy has no part 'third': choose some of first, second" in capsys.readouterr().err
    (folder / "studies").mkdir()
    (folder / "studies" / "toy.json").write_text('{"claims": [{}]}')
    with pytest.raises(CurvlibError, match=r"is not a study .* makes it again"):
        studies.load_study("toy")
