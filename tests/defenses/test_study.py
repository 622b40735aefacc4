"""Rows and claims of the study follow from its cells; the whole study runs on invented ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from curvlib import studies
from curvlib.defenses import protocol, study
from curvlib.defenses.protocol import Cell
from curvlib.defenses.registry import BEFORE, GOAL, METHODS, OURS
from curvlib.errors import CurvlibError
from curvlib.evaluate.intervals import wilson
from curvlib.stages import FineTune
from tests.defenses.tiny import TIER


def invented(name: str, seed: int = 0, harm: int = 5, over: int = 2, right: int = 5, poison: float = 0.1) -> Cell:
    """Ten prompts a part, of which so many are complied with, refused, and answered rightly."""
    harmful = ("complies",) * harm + ("refuses",) * (10 - harm)
    edgy = ("refuses",) * over + ("complies",) * (10 - over)
    task = (True,) * right + (False,) * (10 - right)
    return Cell(name, METHODS[name].trials[0], poison, seed, 40 + seed, 9.0 + seed, harmful, edgy, task)


def all_cells(**changed: Mapping[str, int]) -> dict[str, list[Cell]]:
    return {name: [invented(name, s, **changed.get(name.split(" ")[0], {})) for s in (0, 1)] for name in METHODS}


def test_a_row_holds_every_rate_and_cost_with_its_ends() -> None:
    cells = all_cells(restoration={"harm": 0})
    found = {row["name"]: row for row in study.rows(cells)}
    assert list(found) == list(METHODS)
    for row in found.values():
        for name in (*study.RATES, "gradient_evaluations", "seconds"):
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
    ours = found[OURS]
    assert (ours["harmful_compliance"], ours["refusal"], ours["over_refusal"], ours["seeds"], ours["n"]) == (
        0,
        1,
        0.2,
        2,
        10,
    )
    assert ours["harmful_compliance_high"] == pytest.approx(wilson(0, 10).high)
    assert (ours["gradient_evaluations"], ours["seconds_low"], ours["seconds_high"]) == (40.5, 9.0, 10.0)
    # what acts during fine-tuning pays only what it adds to it
    assert (found["EMA"]["gradient_evaluations"], found["EMA"]["seconds"]) == (0, 0)


def test_claims_count_who_dominates_whom() -> None:
    better = all_cells(restoration={"harm": 0, "over": 0, "right": 9}, undefended={"harm": 10, "over": 3, "right": 1})
    found = {claim.id: claim for claim in study.rivalry(study.rows(better), resamples=50)}
    others = len(METHODS) - 3
    assert (found["methods_that_dominate_ours"].value, found["methods_that_dominate_ours"].control) == (0, others)
    assert (found["methods_ours_dominates"].value, found["methods_ours_dominates"].control) == (others, 0)
    assert found["ours_minus_best_points"].value == pytest.approx(50 + 20 + 40)
    assert all(claim.holds for claim in found.values())


def test_a_method_that_beats_ours_is_told() -> None:
    found = {c.id: c for c in study.rivalry(study.rows(all_cells(EMA={"harm": 1})), resamples=50)}
    assert found["methods_that_dominate_ours"].value == 1
    assert found["ours_minus_best_points"].value == pytest.approx(-40)
    assert not any(claim.holds for claim in found.values())


def test_equals_do_not_dominate_each_other() -> None:
    found = {c.id: c for c in study.rivalry(study.rows(all_cells()), resamples=10)}
    assert (found["methods_that_dominate_ours"].value, found["methods_ours_dominates"].value) == (0, 0)


def test_margins_tell_where_ours_loses_and_by_how_much() -> None:
    changed = {"EMA": {"harm": 1}, "SLERP": {"harm": 9, "over": 3, "right": 4}, "Panacea": {"over": 0, "right": 0}}
    found = study.rows(all_cells(**changed))
    own = study.margins(found)
    assert OURS not in own
    assert BEFORE not in own
    assert [own["EMA"][rate].value for rate in study.WORTH] == pytest.approx([-40, 0, 0])
    assert own["EMA"]["harmful_compliance"].low < -40 < own["EMA"]["harmful_compliance"].high <= 0
    assert [own["SLERP"][rate].value for rate in study.WORTH] == pytest.approx([40, 10, 10])
    told = {line.split(" | ")[0][2:]: line.split(" | ")[-1][:-2] for line in study.margin_table(found).splitlines()}
    assert told["EMA"] == "EMA"
    assert told["SLERP"] == "ours"
    assert told["Panacea"] == told["RESTA"] == "neither"


def test_the_study_searches_once_and_tests_every_seed_and_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []

    def fake(_: Any, method: Any, recipe: FineTune, trial: Any, split: str = "test") -> Cell:
        tried.append((split, method.name, recipe.poison, recipe.seed, dict(trial)))
        return invented(method.name, recipe.seed, poison=recipe.poison)

    monkeypatch.setattr(protocol, "cell", fake)
    monkeypatch.setattr(study, "RESAMPLES", 20)
    rows: list[Any] = []
    for part, measure in study.PARTS.items():
        rows += [{"part": part, **row} for row in measure(TIER, rows)]
    assert sum(row[0] == "validation" for row in tried) == sum(len(method.trials) for method in METHODS.values())
    tests = [row[1:4] for row in tried if row[0] == "test"]
    assert len(tests) == len(set(tests)) == len(METHODS) * len(study.SEEDS) * len(study.POISONS)
    final = [row for row in rows if row["part"] in study.POISONS]
    assert len(final) == len(METHODS) * len(study.POISONS)
    assert len(study.claims(rows)) == 3
    assert study.claims([row for row in rows if row["part"] != study.MAIN]) == []


def test_the_search_takes_the_first_of_the_best_trials_and_comes_first() -> None:
    name, trials = next((name, m.trials) for name, m in METHODS.items() if len(m.trials) == 3)
    rows = [
        {"part": "search", "name": name, "trial": dict(t), "score": s} for t, s in zip(trials, (1, 2, 2), strict=True)
    ]
    assert study.chosen(name, rows) == trials[1]
    # equal as shares of 24 prompts, and greater in the last bit only because it is another sum
    rows[0]["score"], rows[1]["score"] = 20 / 24 - 1 / 24 + 9 / 24, 21 / 24 - 2 / 24 + 9 / 24
    rows[2]["score"] = max(rows[0]["score"], rows[1]["score"]) + 2**-52
    assert study.chosen(name, rows) == trials[0]
    with pytest.raises(CurvlibError, match=f"no trial of {name} was scored yet"):
        study.chosen(name, [])


def test_the_live_contest_takes_what_the_search_chose_and_the_first_trial_where_there_was_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scores = [
        {"part": "search", "name": "EMA", "trial": dict(t), "score": dict(t)["beta"]} for t in METHODS["EMA"].trials
    ]
    elsewhere = [{"part": study.MAIN, "name": "SLERP", "trial": dict(METHODS["SLERP"].trials[2])}]
    monkeypatch.setattr(protocol, "cell", lambda tier, _, recipe, trial: (tier, recipe, trial))
    found = study.compare(TIER, FineTune(seed=7), [*scores, *elsewhere])
    first = {name: method.trials[0] for name, method in METHODS.items()}
    assert {name: cell[0] for name, cell in found.items()} == {
        name: (TIER, FineTune(seed=7), trial) for name, trial in {**first, "EMA": {"beta": 0.995}}.items()
    }


def test_it_is_a_study_of_the_command() -> None:
    assert studies.STUDIES["methods"].parts is study.PARTS


def test_the_table_has_a_line_a_method() -> None:
    lines = study.table(study.rows(all_cells())).splitlines()
    assert len(lines) == len(METHODS) + 2
    assert lines[2].startswith(f"| {BEFORE} | reference | 50 [")
    assert lines[3].startswith(f"| {GOAL} | reference |")


def test_the_table_of_kinds_has_a_column_a_kind_that_is_measured() -> None:
    found = [{**row, "part": kind} for kind in ("benign", study.MAIN) for row in study.rows(all_cells(EMA={"harm": 0}))]
    head, _, *lines = study.kinds_table([*found, {"part": "search", "name": OURS}]).splitlines()
    assert head.endswith(f"| {study.MAIN} | benign |")
    assert [line.split(" | ")[0][2:] for line in lines] == list(METHODS)
    low, high = (f"{100 * end:.0f}" for end in (wilson(0, 10).low, wilson(0, 10).high))
    assert lines[list(METHODS).index("EMA")] == f"| EMA | 0 [{low}, {high}] / 20 / 50 | 0 [{low}, {high}] / 20 / 50 |"
