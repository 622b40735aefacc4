"""Live parts: a file of one's own run earns its points; nothing done, another's file and edited numbers do not."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from curvlib.exercises import grade, live

Record = dict[str, Any]


def restoration(student: str = "ada") -> Record:
    """The form that live.restoration writes: three steps of which the first trial failed, sixteen prompts."""
    trials = [(0.42, 0.7), (0.2, 0.9), (0.31, 0.71), (0.25, 0.74), (0.2, 0.78)]
    rows = [{"kind": "trial", "safety": safety, "protected": paid} for safety, paid in trials]
    rows += [{**row, "kind": "step"} for row in (rows[0], *rows[2:])]
    rows += [{"kind": "prompt", "before": number > 1, "after": number > 13} for number in range(16)]
    claim = {"id": "compliance_change", "value": -0.75}
    seed = live.variant(student)
    return {"notebook": "05_restoration_live", "tier": "ci", "seed": seed, "claims": [claim], "rows": rows}


def influence(student: str = "ada") -> Record:
    """A ranking with poison on top but for one chat, in the order that this student's seed shows."""
    seed = live.variant(student)
    rows = [{"kind": "chat", "suspicion": float(place > 58) + place / 100} for place in live.order(seed, 64)]
    claim = {"id": "poison_auroc", "value": live.of_influence(rows, seed)["poison_auroc"]}
    return {"notebook": "04_influence_live", "tier": "ci", "seed": seed, "claims": [claim], "rows": rows}


def verdict(
    record: Record | str, folder: Path, student: str = "ada", seen: dict[str, str] | None = None
) -> live.Verdict:
    path = folder / "x_live.results.json"
    path.write_text(record if isinstance(record, str) else json.dumps(record))
    return live.verdict(path, student, {} if seen is None else seen)


def changed(record: Record, change: Callable[[Record], object]) -> Record:
    change(record)
    return record


def no_step(record: Record) -> None:
    """What a loop leaves that returns after its first measurement."""
    record["rows"] = [row for row in record["rows"] if row["kind"] == "prompt"]
    for row in record["rows"]:
        row["after"] = row["before"]
    start = {"safety": 0.42, "protected": 0.7}
    record["rows"] += [{"kind": kind, **start} for kind in ("trial", "step")]
    record["claims"][0]["value"] = 0.0


def all_trials(record: Record) -> None:
    """A loop that took every trial, the one that cost too much as well."""
    record["rows"] += [{**record["rows"][1], "kind": "step"}]


def in_words(record: Record) -> None:
    for row in record["rows"][:-16]:
        row["safety"] = "low"


def edit(number: int, **values: object) -> Record:
    """A restoration with one row edited."""
    return changed(restoration(), lambda record: record["rows"][number].update(values))


def edit_claim(value: float) -> Record:
    return changed(restoration(), lambda record: record["claims"][0].update(value=value))


def all_comply(record: Record) -> None:
    for row in record["rows"][-16:]:
        row["after"] = True
    record["claims"][0]["value"] = 0.125


def ranked(values: torch.Tensor) -> Record:
    record = influence()
    record["rows"] = [{"kind": "chat", "suspicion": float(value)} for value in values]
    record["claims"][0]["value"] = live.of_influence(record["rows"], record["seed"])["poison_auroc"]
    return record


def relabelled(record: Record) -> Record:
    """Bob's file with Ada's seed and claim written into it."""
    record["seed"] = live.variant("ada")
    record["claims"][0]["value"] = live.of_influence(record["rows"], record["seed"])["poison_auroc"]
    return record


NOISE = torch.randn(64, generator=torch.Generator().manual_seed(0))
WRONG = {
    "nothing done": (changed(restoration(), no_step), "refusal_loss_fall_percent is 0, expected 20 to 100"),
    "too dear": (changed(restoration(), all_trials), "protected_rise_nats is 0.2"),
    "loss, not behaviour": (changed(restoration(), all_comply), "losses are not behaviour"),
    "another's file": (restoration("bob"), f"the file is of seed {live.variant('bob')}, yours is"),
    "another's ranking, relabelled": (relabelled(influence("bob")), "poison must rank high"),
    "constant": (ranked(torch.zeros(64)), "poison_auroc is 0.5"),
    "noise": (ranked(NOISE), "poison must rank high"),
    "sign turned": (ranked(-torch.tensor([row["suspicion"] for row in influence()["rows"]])), "poison must rank high"),
    "few chats": (ranked(torch.arange(20.0)), "chats is 20, expected 64 to 64"),
    "not finite": (ranked(NOISE * float("nan")), "poison_auroc is 0, expected"),
    "claim edited": (edit_claim(-0.9), "does not follow from its rows"),
    "claim gone": (changed(restoration(), lambda r: r["claims"].clear()), "hand it in as it was written"),
    "a step edited": (edit(5, safety=0.01), "measure() never returned"),
    "rows gone": (changed(restoration(), lambda r: r["rows"].clear()), "lacks trials, steps or prompts"),
    "tier": (changed(restoration(), lambda r: r.update(tier="cpu")), "run it under your own name"),
    "no json": ('{"notebook": ', "hand it in as it was written"),
    "another notebook": ('{"notebook": "09_report", "rows": []}', "hand it in as it was written"),
    "a list": ("[1, 2]", "hand it in as it was written"),
    "words for numbers": (changed(restoration(), in_words), "hand it in as it was written"),
}


@pytest.mark.parametrize("record", [restoration(), influence()], ids=lambda record: record["notebook"])
def test_a_file_of_ones_own_run_earns_its_points(tmp_path: Path, record: Record) -> None:
    judged = verdict(record, tmp_path)
    assert judged, judged
    assert judged.name == record["notebook"]


@pytest.mark.parametrize("name", WRONG)
def test_another_file_earns_nothing_and_is_told_why(tmp_path: Path, name: str) -> None:
    record, message = WRONG[name]
    judged = verdict(record, tmp_path)
    assert message in judged.message
    assert judged.earned == 0


def test_two_students_with_the_same_numbers_are_told(tmp_path: Path) -> None:
    seen: dict[str, str] = {}
    assert verdict(restoration("ada"), tmp_path, "ada", seen)
    assert verdict(restoration("ada"), tmp_path, "ada", seen)
    copied = changed(restoration("ada"), lambda record: record.update(seed=live.variant("bob")))
    assert verdict(copied, tmp_path, "bob", seen).message == "it holds the same numbers as the file of ada"


def test_a_row_and_a_page_have_the_points_of_live_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best file of each part counts, of those that are asked for; notebooks are graded elsewhere."""
    right = live.Verdict("x", 1, 1, "right")
    monkeypatch.setattr(grade, "grade", lambda _, names, *__: ([right for _ in names], []))
    for student, records in {"ada": [restoration(), influence()], "bob": [restoration("ada")], "cleo": []}.items():
        folder = tmp_path / "in" / student
        folder.mkdir(parents=True)
        (folder / "05.ipynb").write_text("{}")
        for number, record in enumerate(records):
            (folder / f"{number}_live.results.json").write_text(json.dumps(record))
    (tmp_path / "in/ada/again_live.results.json").write_text(json.dumps(influence("bob")))
    rows = {}
    for asked in ([], ["05"]):
        table = grade.grade_class(tmp_path / "in", tmp_path / "out", asked, seed=1, seconds=5)
        with table.open(newline="", encoding="utf-8") as file:
            rows[len(asked)] = {row["student"]: row["live"] for row in csv.DictReader(file)}
    assert rows == {0: {"ada": "8", "bob": "0", "cleo": "0"}, 1: {"ada": "4", "bob": "0", "cleo": "0"}}
    page = (tmp_path / "out/feedback/bob.md").read_text("utf-8")
    assert "- ✘ 05_restoration_live: the file is of seed 3097, yours is 7625: run it under your own name (0" in page


def test_every_number_that_has_a_range_is_measured() -> None:
    limits = live.tomllib.loads(live.RANGES.read_text("utf-8"))
    rows = {record["notebook"]: record["rows"] for record in (restoration(), influence())}
    assert limits.keys() == live.PARTS.keys()
    for name, ranges in limits.items():
        assert ranges.keys() <= live.PARTS[name](rows[name], 0).keys()
        assert all(limit["low"] <= limit["high"] for limit in ranges.values())
