"""What is committed under data/studies is what its study's notebook claims of the committed rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
import pytest

from curvlib import report
from curvlib.report import ROOT, Claim, load_study
from tests.notebook_cases import executed

Row = dict[str, Any]
Recompute = Callable[..., dict[str, Any]]


def changed(value: Any) -> Any:
    """The same row with other measurements; what names a case, whole numbers and words, stays."""
    match value:
        case float():
            return 2 * value + 1
        case list():
            return [changed(item) for item in value]
        case dict():
            return {key: changed(item) for key, item in value.items()}
    return value


STUDIES = {path.stem: load_study(path.stem) for path in sorted((ROOT / "data" / "studies").glob("*.json"))}
DIFFUSION = STUDIES.pop("diffusion")  # its notebook trains models before its claims, which are a function


@pytest.fixture
def recomputed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recompute:
    """Run a study's notebook on rows in a folder of its own, without its measuring, and return what its cells leave."""
    folder = tmp_path / "data" / "studies"
    folder.mkdir(parents=True)
    monkeypatch.setattr(report, "ROOT", tmp_path)

    def run(name: str, *measured: Row) -> dict[str, Any]:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in measured), "utf-8")
        (source,) = (ROOT / "notebooks" / "studies").glob(f"S*_{name}.ipynb")
        return executed(source)

    return run


@pytest.mark.parametrize("name", STUDIES)
def test_the_notebook_claims_what_is_committed_and_a_changed_row_changes_it(name: str, recomputed: Recompute) -> None:
    study = STUDIES[name]
    assert study.claims
    claims = claimed(recomputed(name, *study.rows))
    assert [(claim.id, claim.n, claim.holds) for claim in claims] == [(c.id, c.n, c.holds) for c in study.claims]
    for claim, kept in zip(claims, study.claims, strict=True):
        numbers, expected = ([c.value, c.low, c.high, c.control] for c in (claim, kept))
        assert numbers == pytest.approx(expected, rel=1e-9)
    assert claimed(recomputed(name, *map(changed, study.rows))) != claims


def claimed(names: dict[str, Any]) -> list[Claim]:
    return list(names["results"].claims.values())


def test_an_absent_study_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "ROOT", tmp_path)
    with pytest.raises(report.CurvlibError, match=r"tea\.json is not there: make study NAME=tea measures it"):
        load_study("tea")


def claims_of_diffusion(measured: Sequence[Mapping[str, Any]]) -> tuple[Claim, ...]:
    """What the cells tagged ``claims`` of the diffusion study's notebook make of rows; they measure nothing."""
    (path,) = (ROOT / "notebooks" / "studies").glob("S*_diffusion.ipynb")
    names: dict[str, Any] = {}
    for cell in nbformat.read(path, 4).cells:
        if "claims" in cell.metadata.get("tags", []):
            exec(cell.source, names)
    return tuple(names["claims"](measured))


def test_the_diffusion_study_claims_what_is_committed_and_a_changed_row_changes_it() -> None:
    measured = [dict(row) for row in DIFFUSION.rows]
    for claim, kept in zip(claims_of_diffusion(measured), DIFFUSION.claims, strict=True):
        assert (claim.id, claim.n, claim.holds) == (kept.id, kept.n, kept.holds)
        numbers, expected = ([c.value, c.low, c.high, c.control] for c in (claim, kept))
        assert numbers == pytest.approx(expected, rel=1e-9)
    next(row for row in measured if row.get("method") == "forgotten")["sixteen_100"] = 0.0
    assert claims_of_diffusion(measured) != DIFFUSION.claims
