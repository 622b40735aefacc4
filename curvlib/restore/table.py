"""The contest of the restoration study as a table: what each model does and costs, every number with its ends."""

from __future__ import annotations

from collections.abc import Sequence

from curvlib.evaluate.intervals import Estimate, over_seeds, pooled_rate
from curvlib.report import markdown_table
from curvlib.restore.cases import Row
from curvlib.restore.rows import by_name, few_shot, flags

RATES = {  # column -> part of a row, and the verdict that counts; one without a verdict counts right answers
    "complies, %": ("harmful", "complies"),
    "refuses, %": ("harmful", "refuses"),
    "incoherent, %": ("harmful", "incoherent"),
    "over-refusal, %": ("edgy", "refuses"),
    "task, %": ("task", ""),
}
COSTS = {  # column -> field of a row, and how it is written
    "task loss, nats": ("task_loss_rise", "+.2f"),
    "‖ΔW‖": ("weight_step", ".2f"),
    "seconds": ("seconds", ".0f"),
    "gradients": ("gradients", ".0f"),
}


def contest_table(rows: Sequence[Row]) -> str:
    """Return one line a model, over its seeds.

    Args:
        rows: those of a contest, one a model and seed.

    Rates have the intervals of the figures, over seeds and prompts; few-shot answers one over questions, asked with
    several numbers of shots each; perplexity the hull of its seeds' intervals over texts. What was paid has its least
    and its greatest seed: the rise of the held-out task loss, the step's norm in effective weights, seconds and
    gradients. It is left out where nothing restored the model.
    """
    heads = ("model", *RATES, "few-shot, %", "perplexity", *COSTS)
    return markdown_table(heads, [[name, *_cells(group)] for name, group in by_name(rows).items()])


def _cells(group: Sequence[Row]) -> list[str]:
    rates = [pooled_rate([flags(row[part], verdict) for row in group]) for part, verdict in RATES.values()]
    shots = over_seeds([few_shot(row) for row in group], 0.0)
    values, low, high = ([row[f"perplexity_{end}"] for row in group] for end in ("value", "low", "high"))
    perplexity = Estimate(sum(values) / len(values), min(low), max(high), len(values))
    return [
        *(f"{rate.percent:.0f}" for rate in rates),
        f"{shots:.0f}",
        f"{perplexity:.1f}",
        *(_spread(group, field, form) for field, form in COSTS.values()),
    ]


def _spread(group: Sequence[Row], field: str, form: str) -> str:
    """Return the mean over the seeds with the least and the greatest; nothing where nothing restored the model."""
    paid = [float(row[field]) for row in group if row.get("stop_reason") and field in row]
    return f"{Estimate(sum(paid) / len(paid), min(paid), max(paid), len(paid)):{form}}" if paid else ""
