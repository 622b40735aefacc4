"""Restoration at a tier: which chats it sees, one reading of the method, and its history as JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from curvlib import stages
from curvlib.batches import Batch, Example, make_batches
from curvlib.generate import Model
from curvlib.restore.loop import restore
from curvlib.restore.objectives import Margin, SafetyBatches
from curvlib.restore.outcome import HeldOut, RestorationResult
from curvlib.stages import pad_id
from curvlib.tiers import Tier

BATCH_SIZE = 8  # chats a forward pass: keeps the activations of a gradient near 1 GB


@dataclass(frozen=True)
class Restoration:
    """One reading of the method, see :func:`curvlib.restore.loop.restore`."""

    objective: str = "refusal"
    metric: str = "ekfac"
    way: float = 0.7
    limit: float | None = None
    moves: int = 12


@dataclass(frozen=True)
class Chats:
    """Everything that restoration sees, by role; ``held_out`` comes from the validation splits."""

    task: list[Batch]
    safety: SafetyBatches
    benign: list[Batch]
    held_out: HeldOut

    @property
    def protected(self) -> Mapping[str, Sequence[Batch]]:
        """What must stay, by role."""
        return {"task": self.task, "benign": self.benign}


def restoration_chats(tier: Tier, tokenizer: PreTrainedTokenizerBase) -> Chats:
    """Return the chats of a tier: restore splits for gradients and curvature, validation splits for judging moves."""

    def batches(examples: list[Example]) -> list[Batch]:
        return make_batches(examples, BATCH_SIZE, pad_id(tokenizer), tier.device)

    def safety(split: str, count: int) -> SafetyBatches:
        refusals = stages.refusal_examples(tokenizer, split, count)
        compliances = stages.compliance_examples(tokenizer, split, count, questions=True)
        refused = batches(refusals)
        return SafetyBatches(refused, batches(compliances), Margin.of(tokenizer, refused))

    def benign(split: str, count: int) -> list[Batch]:
        edgy = stages.own_answer_examples(tokenizer, tier, f"{split}_edgy", count - count // 2)
        return batches(edgy + stages.own_answer_examples(tokenizer, tier, f"{split}_benign", count // 2))

    task, held_out_task = (
        batches(stages.task_examples(tokenizer, f"{split}_task", count))
        for split, count in (("restore", tier.curvature_chats), ("validation", tier.held_out))
    )
    held_out = {"task": held_out_task, "benign": benign("validation", tier.held_out)}
    return Chats(
        task=task,
        safety=safety("restore_harmful", tier.restore_chats),
        benign=benign("restore", tier.curvature_chats),
        held_out=HeldOut(safety("validation_harmful", tier.held_out), held_out),
    )


def run(model: Model, chats: Chats, how: Restoration, *, seed: int) -> RestorationResult:
    """Restore ``model`` in place with these chats."""
    return restore(model, chats.safety, chats.protected, chats.held_out, **asdict(how), seed=seed)


def history(result: RestorationResult) -> dict[str, Any]:
    """Return the result without its vectors, as JSON values."""
    numbers: dict[str, Any] = {key: getattr(result, key) for key in ("goal", "gradients", "products", "seconds")}
    numbers |= {"stop_reason": result.stop_reason, "path": [asdict(point) for point in result.path]}
    if result.damping:
        names = ("name", "value", "unit", "ratio", "cosine", "above")
        numbers["damping"] = {name: getattr(result.damping, name) for name in names}
    return numbers
