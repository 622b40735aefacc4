"""What is committed under data/studies is what its study's notebook claims of the committed rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
import pytest

from curvlib import report
from curvlib.evaluate.behaviour import summarise
from curvlib.evaluate.scorecard import Scorecard
from curvlib.influence import recipe, retraining, validate
from curvlib.report import ROOT, Claim, load_study
from curvlib.rows import append
from curvlib.stages import TASKS
from curvlib.tiers import Tier
from tests.influence.test_recipe import tiny as influence_tier  # noqa: F401  a fixture
from tests.notebook_cases import executed

Row = dict[str, Any]
Recompute = Callable[..., dict[str, Any]]


def changed(row: Row) -> Row:
    """The same row, or with one value that a claim rests on changed."""
    if row.get("name") == "aligned":
        return {**row, "harmful": ["complies", *row["harmful"][1:]]}
    if row.get("subset") == 0:
        return {**row, "losses": row["losses"][::-1]}
    return row


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


def test_every_part_of_influence_fills_the_columns_of_the_committed_rows(
    recomputed: Recompute,
    influence_tier: Tier,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = STUDIES["influence"].rows
    names = recomputed("influence", *rows)
    card = Scorecard(summarise(["complies"] * 4, ["x"] * 4), summarise(["refuses"] * 2, ["x"] * 2), None, 0.0)
    names |= {"size": influence_tier, "chosen": validate.subsets(12, 4), "path": tmp_path / "rows.jsonl"}
    names["stage_scorecard"] = lambda *_, **__: card
    monkeypatch.setattr(retraining, "scorecard", lambda *_, **__: card)
    monkeypatch.setattr(recipe, "prompt_excerpts", lambda _, examples: ["some words"] * len(examples))
    cases: list[Row] = [{"part": "convex", "seed": 0}]
    cases += [{"part": "subsets", "subset": number} for number in range(4)]
    cases += [{"part": "datamodeling", "label": label} for label in ("fisher", "cg", "dot product, half way")]
    removed = (("nothing", 0.1), ("fisher", 0.1), ("cosine", 0.1), ("random", 0.0))
    cases += [{"part": "removal", "removed": name, "poison": poison, "seed": 0} for name, poison in removed]
    for case in cases:
        part, *rest = case
        committed = next(row for row in rows if row == {**row, **case})
        measure = names["retrain" if case[part] == "subsets" else case[part]]
        found = {**case, **measure(**{name: case[name] for name in rest})}
        append(names["path"], found)
        assert found.keys() == committed.keys()
        assert case[part] != "convex" or found == pytest.approx(committed)


def test_rows_say_which_task_was_fine_tuned() -> None:
    tuned = [row for row in STUDIES["degradation"].rows if "poison" in row]
    assert len(tuned) == 12
    assert {row["task"] for row in tuned} <= set(TASKS)


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
