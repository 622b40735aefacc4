"""Every committed notebook is well formed, shows a real run, and at tier ci measures what tests/expected says."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from nbformat import NotebookNode

from curvlib import notebook_file
from curvlib.report import ROOT, Claim, load_record
from curvlib.runner import run_notebook
from tests.notebook_cases import HEADER, code, markdown

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXPECTED: dict[str, dict[str, dict[str, Any]]] = tomllib.loads((ROOT / "tests/expected/ci.toml").read_text())
DEFAULTS = {"tier": "cpu", "seed": 0, "output_dir": ""}
MACHINE_PATH = re.compile(r"/(home|root|tmp|Users|work)/\w|[A-Z]:\\\\")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def form_faults(cells: list[NotebookNode]) -> list[str]:
    """What the house style of notebooks forbids, as far as a program can see it."""
    faults = []
    tagged = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1 or literals(tagged[0]) != DEFAULTS:
        faults.append(f"expected one cell tagged parameters with the literals {DEFAULTS}, found {tagged}")
    faults += [
        f"a code cell has {lines} lines, more than 30: {cell.source[:40]!r}"
        for cell in cells
        if cell.cell_type == "code" and (lines := len(cell.source.splitlines())) > 30
    ]
    runs = [(kind, len(list(run))) for kind, run in groupby(cell.cell_type for cell in cells)]
    if any(kind == "code" and length > 2 for kind, length in runs):
        faults.append("more than two code cells in a row")
    return faults


def literals(source: str) -> dict[str, object] | None:
    """Names and values of a cell that holds nothing but ``name = literal`` and ``name: type = literal``."""
    found: dict[str, object] = {}
    for statement in ast.parse(source).body:
        match statement:
            case ast.Assign([ast.Name(name)], ast.Constant(value)):
                found[name] = value
            case ast.AnnAssign(ast.Name(name), _, ast.Constant(value)):
                found[name] = value
            case _:
                return None
    return found


def output_faults(cells: list[NotebookNode]) -> list[str]:
    """What must not be kept in a committed output: pictures other than PNG, and paths of somebody's machine."""
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    faults = [f"an output of type {kind}" for kind in sorted(kinds - set(notebook_file.KEPT_TYPES))]
    texts = [output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs]
    return faults + [f"a path of one machine: {text[:80]!r}" for text in texts if MACHINE_PATH.search(text)]


def deviations(claims: tuple[Claim, ...], expected: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How claims differ from their expected ranges."""
    made = {claim.id: claim for claim in claims}
    faults = [f"{name}: expected, not claimed" for name in sorted(expected.keys() - made.keys())]
    faults += [f"{name}: claimed, no expectation" for name in sorted(made.keys() - expected.keys())]
    for name in sorted(made.keys() & expected.keys()):
        claim, wanted = made[name], expected[name]
        if not wanted["low"] <= claim.value <= wanted["high"]:
            faults.append(f"{name}: {claim.value:.4g} is outside {wanted['low']} to {wanted['high']}")
        if claim.holds != wanted.get("holds", claim.holds):
            faults.append(f"{name}: holds is {claim.holds}")
    return faults


def test_there_are_notebooks_and_no_stale_expectation() -> None:
    assert NOTEBOOKS
    assert set(EXPECTED) <= {path.stem for path in NOTEBOOKS}


def test_the_reference_run_lies_within_the_expected_ranges() -> None:
    """One whole run at tier ci, seed 0, with which a change of the code that should change no number is compared."""
    lines = (ROOT / "tests/expected/ci_reference.jsonl").read_text("utf-8").splitlines()
    records = {record["notebook"]: record["claims"] for record in map(json.loads, lines)}
    assert set(EXPECTED) <= set(records)
    for name, claims in records.items():
        assert deviations(tuple(Claim(**claim) for claim in claims), EXPECTED.get(name, {})) == []


@each_notebook
def test_the_form_is_that_of_the_house(path: Path) -> None:
    assert form_faults(notebook_file.read(path).cells) == []


@each_notebook
def test_the_committed_outputs_are_those_of_a_whole_run(path: Path) -> None:
    notebook = notebook_file.read(path)
    assert notebook_file.problems(notebook) == []
    assert output_faults(notebook.cells) == []
    assert path.stat().st_size <= notebook_file.SIZE_LIMIT


@each_notebook
def test_it_runs_at_tier_ci_and_measures_what_is_expected(path: Path) -> None:
    run_dir = ROOT / "runs" / "ci-test"
    outcome = run_notebook(path, run_dir, "ci", 0, fresh=True)
    assert outcome.fault == ""
    record = load_record(run_dir / f"{path.stem}.results.json")
    assert (record.notebook, record.tier, record.seed) == (path.stem, "ci", 0)
    assert deviations(record.claims, EXPECTED.get(path.stem, {})) == []


PARAMETERS = code(HEADER.replace('"ci"', '"cpu"', 1), "parameters")


@pytest.mark.parametrize(
    "cells",
    [
        [],
        [PARAMETERS, markdown("x"), PARAMETERS],
        [code(HEADER, "parameters")],
        [code(f"{PARAMETERS.source}\nrun = print()", "parameters")],
        [PARAMETERS, code("x = 1\n" * 31)],
        [PARAMETERS, code("1"), code("2")],
    ],
    ids=["none", "two", "another tier", "a call", "31 lines", "three in a row"],
)
def test_a_fault_of_form_is_seen(cells: list[NotebookNode]) -> None:
    assert form_faults([PARAMETERS, code("x = 1\n" * 30)]) == []
    assert len(form_faults(cells)) == 1


@pytest.mark.parametrize(
    "output",
    [
        {"output_type": "display_data", "data": {"image/svg+xml": "<svg/>"}},
        {"output_type": "stream", "text": "saved to /home/ada/x"},
    ],
)
def test_a_fault_of_output_is_seen(output: dict[str, Any]) -> None:
    cell = code("1")
    cell.outputs = [output]
    assert len(output_faults([cell])) == 1


@pytest.mark.parametrize(
    ("expected", "fault"),
    [
        ({}, "rise: claimed, no expectation"),
        ({"rise": {"low": 0, "high": 59}}, "rise: 60 is outside 0 to 59"),
        ({"rise": {"low": 0, "high": 60, "holds": False}}, "rise: holds is True"),
        ({"rise": {"low": 60, "high": 60}, "fall": {"low": 0, "high": 1}}, "fall: expected, not claimed"),
    ],
)
def test_a_deviation_is_seen(expected: dict[str, dict[str, Any]], fault: str) -> None:
    claims = (Claim("rise", "s", 60.0, 50.0, 70.0, 2.0, 48, True),)
    assert deviations(claims, {"rise": {"low": 0, "high": 100, "holds": True}}) == []
    assert deviations(claims, expected) == [fault]
