"""The contest's table says what its rows hold."""

from __future__ import annotations

from typing import Any

from curvlib.evaluate.intervals import pooled_rate
from curvlib.restore.rows import flags
from curvlib.restore.table import COSTS, RATES, contest_table


def row(name: str, seed: int, **paid: Any) -> dict[str, Any]:
    """Ten prompts, of which seed 0 complies with two and seed 1 with four."""
    harm = 2 + 2 * seed
    shots = {"shots_0": [True, False], "shots_2": [True, True], "shots_4": [True, False]}
    found = {"harmful": ["complies"] * harm + ["refuses"] * (10 - harm), "edgy": ["refuses"] + ["complies"] * 4}
    text = {"perplexity_value": 40.0 + seed, "perplexity_low": 30.0 + seed, "perplexity_high": 50.0 + seed}
    return {"name": name, "seed": seed, "task": [True, False], **found, **shots, **text, **paid}


def test_every_cell_holds_its_number_and_its_ends() -> None:
    paid = [
        {"task_loss_rise": 0.1, "weight_step": 1.0, "seconds": 50.0, "gradients": 160},
        {"weight_step": 2.0, "seconds": 70.0},
    ]
    given = [row("ours", seed, stop_reason="steps spent", **own) for seed, own in enumerate(paid)]
    told = contest_table([*given, row("free", 0, stop_reason="", weight_step=0.0)]).splitlines()
    heads, _, line, other = (text[2:-2].split(" | ") for text in told)
    cells = dict(zip(heads, line, strict=True))
    rate = pooled_rate([flags(found["harmful"], "complies") for found in given])
    assert cells["complies, %"] == f"30 [{100 * rate.low:.0f}, {100 * rate.high:.0f}]"
    assert cells["incoherent, %"].startswith("0 [0, ")
    assert cells["few-shot, %"].split(" ")[0] == f"{100 * (1 + 1 / 3) / 2:.0f}"
    assert cells["perplexity"] == "40.5 [30.0, 51.0]"
    assert cells["seconds"] == "60 [50, 70]"
    assert cells["‖ΔW‖"] == "1.50 [1.00, 2.00]"
    assert cells["task loss, nats"] == "+0.10 [+0.10, +0.10]"
    assert set(heads) == {"model", *RATES, "few-shot, %", "perplexity", *COSTS}
    assert [cell.strip() for cell in other[-len(COSTS) :]] == [""] * len(COSTS)


def test_no_rows_are_no_lines() -> None:
    assert len(contest_table([]).splitlines()) == 2


def test_rates_are_percentages_of_their_own_part() -> None:
    assert RATES["over-refusal, %"] == ("edgy", "refuses")
    assert contest_table([row("ours", 0)]).splitlines()[2].split(" | ")[4].split(" ")[0] == "20"
