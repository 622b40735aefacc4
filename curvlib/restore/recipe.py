"""Restoration as a cached stage: which chats it sees at a tier, and where the restored adapter is kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from curvlib import models, stages
from curvlib.artifacts import artifact
from curvlib.batches import Batch, Example, make_batches, taken_apart
from curvlib.errors import CurvlibError
from curvlib.generate import Model
from curvlib.restore.loop import restore
from curvlib.restore.objectives import SafetyBatches
from curvlib.restore.outcome import HeldOut, RestorationResult
from curvlib.stages import FineTune, pad_id
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
        return make_batches(examples, BATCH_SIZE, pad_id(tokenizer))

    def safety(split: str, count: int) -> SafetyBatches:
        refusals = stages.refusal_examples(tokenizer, split, count)
        compliances = stages.compliance_examples(tokenizer, split, count, questions=True)
        return SafetyBatches(batches(refusals), batches(compliances))

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


def restored(tier: Tier, recipe: FineTune, how: Restoration) -> Path:
    """Return the folder of the restored adapter (``model``) and its history (``history.json``); made once.

    Raises:
        CurvlibError: a full fine-tune has no adapter that could be restored.
    """
    if recipe.method != "lora":
        raise CurvlibError(f"{recipe} was given, expected a LoRA fine-tune: restoration moves its adapter")
    chats = restoration_chats(tier, models.load_tokenizer(stages.aligned_source(tier)))
    held_out, safety = chats.held_out, (chats.safety, chats.held_out.safety)
    seen = [batch for part in safety for batch in (*part.refusals, *part.compliances)]
    seen += [b for roles in (chats.protected, held_out.protected) for part in roles.values() for b in part]
    config = stages.key(tier, stages.aligned_source(tier), stages.fine_tuned(tier, recipe))
    config |= {**asdict(how), "seed": recipe.seed, "texts": stages.digest(taken_apart(seen))}

    def build(place: Path) -> None:
        model: Any = stages.load_fine_tuned(tier, recipe)
        result = run(model, chats, how, seed=recipe.seed)
        model.save_pretrained(str(place / "model"))
        (place / "history.json").write_text(json.dumps(history(result), indent=1), "utf-8")

    return artifact("restore", config, build)


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


def load_history(tier: Tier, recipe: FineTune, how: Restoration) -> dict[str, Any]:
    """Return the history of a restoration, see :func:`history`; the restoration is made if it does not exist yet."""
    content: dict[str, Any] = json.loads((restored(tier, recipe, how) / "history.json").read_text("utf-8"))
    return content


def load_restored(tier: Tier, recipe: FineTune, how: Restoration) -> PeftModel:
    """Return the restored model in NF4 under the restored, trainable adapter."""
    return models.load_adapter(stages.load_aligned(tier)[0], restored(tier, recipe, how) / "model")
