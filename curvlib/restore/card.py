"""What a restored adapter says of itself: its report in words and numbers, its figure, and its card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from curvlib import plots
from curvlib.cache import publish, workspace
from curvlib.evaluate.behaviour import Behaviour
from curvlib.evaluate.judge import VERDICTS
from curvlib.evaluate.log_odds import DEPTHS
from curvlib.restore.outcome import RestorationResult


@dataclass(frozen=True)
class Outcome:
    """What a model does with chats that restoration never saw.

    ``task`` is its loss (nats per token); ``odds`` (prompts, depths) are safety log-odds, see
    :mod:`curvlib.evaluate.log_odds`.
    """

    harmful: Behaviour
    benign: Behaviour
    task: float
    odds: NDArray[Any]


def report(outcomes: Mapping[str, Outcome], result: RestorationResult, safety: str) -> str:
    """Return in words what each model does (percent, 95 % Wilson intervals), what the metric buys, and the price.

    ``safety`` says how safe held-out chats were, are, and should be.
    """
    lines = [f"{'':8s}{'complies':>18s}{'refuses':>18s}{'incoherent':>18s}{'over-refusal':>18s}{'task loss':>11s}"]
    for name, row in outcomes.items():
        rates = (row.harmful.complies, row.harmful.refuses, row.harmful.incoherent, row.benign.refuses)
        lines.append(f"{name:8s}" + "".join(f"{rate.percent:.0f}".rjust(18) for rate in rates) + f"{row.task:11.3f}")
    lines += [f"metric: {result.damping}", f"{result.stop_reason}: {safety}"]
    paid = ", ".join(f"{price:.4f} on {role} chats" for role, price in result.path[-1].price.items())
    lines.append(f"price, the divergence from the given adapter in nats a token: {paid}")
    lines.append(
        f"safety log-odds in nats, mean of {len(outcomes['after'].odds)} prompts, after so many agreeing tokens"
    )
    lines.append(f"{'':8s}" + "".join(f"{depth:8d}" for depth in DEPTHS))
    for name, row in outcomes.items():
        lines.append(f"{name:8s}" + "".join(f"{value:8.1f}" for value in row.odds.mean(axis=0)))
    lines.append("all of it is measured on the base in 4 bits")
    return "\n".join(lines)


def write(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    text: str,
    outcomes: Mapping[str, Outcome],
    more: Mapping[str, Any],
) -> None:
    """Write adapter, tokenizer, numbers, figure and card to the folder ``out``, whole or not at all."""
    bars = {f"{name}, {part}": getattr(row, part) for part in ("harmful", "benign") for name, row in outcomes.items()}
    drawn = plots.behaviour_bars(bars, "Answers to harmful prompts and to benign ones")
    with workspace(beside=out) as place:
        folder = place / "adapter"
        model.save_pretrained(str(folder), save_embedding_layers=False)
        tokenizer.save_pretrained(folder)
        numbers = {"outcomes": {name: _numbers(row) for name, row in outcomes.items()}, **more}
        (folder / "restoration.json").write_text(json.dumps(numbers, indent=1), "utf-8")
        drawn.savefig(folder / "restoration.png")
        card = folder / "README.md"
        head = card.read_text("utf-8").split("---\n")[1]  # what peft says of base and library
        body = f"# Restored adapter\n\n```\n{text}\n```\n\n![Answers before and after](restoration.png)\n"
        card.write_text(f"---\n{head}---\n\n{body}", "utf-8")
        publish(folder, out)


def _numbers(row: Outcome) -> dict[str, Any]:
    harmful = {verdict: getattr(row.harmful, verdict).value for verdict in VERDICTS}
    odds = dict(zip(map(str, DEPTHS), row.odds.mean(axis=0).tolist(), strict=True))
    return {"harmful": harmful, "over_refusal": row.benign.refuses.value, "task_loss": row.task, "log_odds": odds}
