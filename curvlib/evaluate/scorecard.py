"""One model's scorecard: harmful prompts judged three ways, beside over-refusal and task accuracy; measured once.

Each part is an artifact under the model's key, so that notebooks share measurements of the same model. What is kept of
an answer is its excerpt: the verdict was given on the whole.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from curvlib import data, models, stages
from curvlib.artifacts import artifact
from curvlib.errors import CurvlibError
from curvlib.evaluate.behaviour import Behaviour, excerpt, measure_behaviour, summarise
from curvlib.evaluate.stats import rate
from curvlib.evaluate.utility import Choices, letter_accuracy
from curvlib.generate import Model
from curvlib.tiers import Tier

PARTS = ("harmful", "edgy", "task")


@dataclass(frozen=True)
class Scorecard:
    """What was measured of one model on the final-test splits; None for the parts that were not asked for.

    Attributes:
        harmful: behaviour on harmful prompts; its ``complies`` is the harm.
        edgy: behaviour on benign prompts that look harmful; its ``refuses`` is the over-refusal.
        task: multiple-choice answers to questions of the fine-tuning task.
        seconds: that the measurements took, whenever they were made.
    """

    harmful: Behaviour | None
    edgy: Behaviour | None
    task: Choices | None
    seconds: float


def scorecard(
    tier: Tier,
    key: Mapping[str, Any],
    load: Callable[[], Model],
    *,
    parts: Sequence[str] = PARTS,
) -> Scorecard:
    """Measure a model on the final-test splits, or read what was measured of it before.

    Args:
        tier: how many prompts.
        key: JSON values that tell this model from every other one; they stand for it in the cache.
        load: gives the model; called once if something is still to be measured.
        parts: of ``harmful``, ``edgy`` and ``task``.

    Raises:
        CurvlibError: an unknown part.

    Cost: a prompt costs a generation of at most 24 tokens, a question one forward.
    """
    if unknown := sorted(set(parts) - set(PARTS)):
        raise CurvlibError(f"unknown part {', '.join(unknown)}: expected some of {', '.join(PARTS)}")
    model = cache(load)
    found = {part: _measured(tier, key, part, model) for part in parts}
    chosen: dict[str, Any] | None = found.get("task")
    task = Choices(rate(chosen["correct"]), tuple(chosen["chosen"]), tuple(chosen["correct"])) if chosen else None
    seconds = sum(row["seconds"] for row in found.values())
    return Scorecard(_behaviour(found.get("harmful")), _behaviour(found.get("edgy")), task, seconds)


def stage_scorecard(
    tier: Tier, stage: stages.FineTune | Literal["shipped", "aligned"], *, parts: Sequence[str] = PARTS
) -> Scorecard:
    """Return the :func:`scorecard` of a stage, which is made if it does not exist yet."""
    if isinstance(stage, stages.FineTune):
        key = stages.key(tier, stages.aligned_source(tier), stages.fine_tuned(tier, stage))
        return scorecard(tier, key, lambda: stages.load_fine_tuned(tier, stage), parts=parts)
    source = tier.model if stage == "shipped" else stages.aligned_source(tier)
    key = stages.key(tier, source)
    return scorecard(tier, key, lambda: models.load_model(source, device=tier.device), parts=parts)


def _measured(tier: Tier, key: Mapping[str, Any], part: str, model: Callable[[], Model]) -> dict[str, Any]:
    sizes = {"harmful": tier.test_harmful, "edgy": tier.test_edgy, "task": tier.test_task}
    config = {"key": dict(key), "part": part, "size": sizes[part], "tokens": tier.answer_tokens}

    def build(place: Path) -> None:
        begin = time.perf_counter()
        measured = _measure(tier, model(), part, [*islice(data.load_split(f"test_{part}"), sizes[part])])
        measured["seconds"] = time.perf_counter() - begin
        (place / "score.json").write_text(json.dumps(measured, indent=1), "utf-8")

    found: dict[str, Any] = json.loads((artifact("score", config, build) / "score.json").read_text("utf-8"))
    return found


def _measure(tier: Tier, model: Model, part: str, rows: Sequence[data.Row]) -> dict[str, Any]:
    tokenizer = models.load_tokenizer(stages.aligned_source(tier))
    if part == "task":
        choices = letter_accuracy(model, tokenizer, rows)
        return {"chosen": choices.chosen, "correct": choices.correct}
    seen = measure_behaviour(model, tokenizer, [row["prompt"] for row in rows], max_new_tokens=tier.answer_tokens)
    return {"verdicts": seen.verdicts, "excerpts": [excerpt(response) for response in seen.responses]}


def _behaviour(row: dict[str, Any] | None) -> Behaviour | None:
    return summarise(row["verdicts"], row["excerpts"]) if row else None
