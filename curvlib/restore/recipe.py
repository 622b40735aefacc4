"""Restoration as a cached stage: which chats it sees at a tier, and where the restored adapter is kept."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from curvlib import models, stages
from curvlib.artifacts import artifact
from curvlib.batches import Batch, Example, make_batches, taken_apart
from curvlib.errors import CurvlibError
from curvlib.finetune import TrainingConfig
from curvlib.restore.loop import restore
from curvlib.restore.objectives import SafetyBatches
from curvlib.restore.outcome import Budget, HeldOut, RestorationResult
from curvlib.restore.realign import realign
from curvlib.stages import FineTune, pad_id
from curvlib.tiers import Tier

BATCH_SIZE = 8  # chats a forward pass: keeps the activations of a gradient near 1 GB


@dataclass(frozen=True)
class Restoration:
    """One reading of the method: the objective (``realign`` for the baseline), the metric, and the budget.

    ``training`` are the runs that a re-alignment chooses from, if not its own; their seed is the fine-tune's.
    """

    objective: str = "refusal"
    metric: str = "fisher"
    budget: Budget = field(default_factory=Budget)
    training: tuple[TrainingConfig, ...] = ()

    def settings(self) -> dict[str, Any]:
        """Return the fields that tell a restored adapter from others."""
        return {name: value for name, value in asdict(self).items() if value != ()}


@dataclass(frozen=True)
class Chats:
    """Everything that restoration sees, by role; ``held_out`` comes from the validation splits."""

    task: list[Batch]
    safety: SafetyBatches
    benign: list[Batch]
    held_out: HeldOut

    @property
    def batches(self) -> list[Batch]:
        """Every batch, whatever its role."""
        seen = [*self.task, *self.safety.refusals, *self.safety.compliances, *self.benign]
        held_out = [*self.held_out.safety.refusals, *self.held_out.safety.compliances]
        return seen + held_out + [batch for batches in self.held_out.protected.values() for batch in batches]


def restoration_chats(tier: Tier, tokenizer: PreTrainedTokenizerBase) -> Chats:
    """Return the chats of a tier: restore splits for gradients and curvature, validation splits for judging steps."""
    pad = pad_id(tokenizer)

    def batches(examples: list[Example]) -> list[Batch]:
        return make_batches(examples, BATCH_SIZE, pad)

    def safety(split: str, count: int) -> SafetyBatches:
        refusals = stages.refusal_examples(tokenizer, split, count)
        compliances = stages.compliance_examples(tokenizer, split, count, questions=True)
        return SafetyBatches(batches(refusals), batches(compliances))

    def own(split: str, count: int) -> list[Example]:
        return stages.own_answer_examples(tokenizer, tier, split, count)

    half = tier.curvature_chats // 2
    held_out = {
        "task": batches(stages.task_examples(tokenizer, "validation_task", tier.held_out)),
        "benign": batches(own("validation_edgy", tier.held_out // 2) + own("validation_benign", tier.held_out // 2)),
    }
    return Chats(
        task=batches(stages.task_examples(tokenizer, "restore_task", tier.curvature_chats)),
        safety=safety("restore_harmful", tier.restore_chats),
        benign=batches(own("restore_edgy", tier.curvature_chats - half) + own("restore_benign", half)),
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
    config = stages.key(tier, stages.aligned_source(tier), stages.fine_tuned(tier, recipe))
    config |= {**how.settings(), "seed": recipe.seed, "texts": stages.digest(taken_apart(chats.batches))}

    def build(place: Path) -> None:
        model: Any = stages.load_fine_tuned(tier, recipe)
        result = run(model, chats, how, seed=recipe.seed)
        model.save_pretrained(str(place / "model"))
        (place / "history.json").write_text(json.dumps(history(result), indent=1), "utf-8")

    return artifact("restore", config, build)


def run(model: PeftModel, chats: Chats, how: Restoration, *, seed: int) -> RestorationResult:
    """Restore ``model`` in place with these chats; ``realign`` fine-tunes it on them instead."""
    shared: dict[str, Any] = {"held_out": chats.held_out, "benign_batches": chats.benign}
    shared |= {"budget": how.budget, "seed": seed}
    if how.objective == "realign":
        runs = [replace(run, seed=seed) for run in how.training]
        return realign(model, chats.task, chats.safety, training=runs, **shared)
    return restore(model, chats.task, chats.safety, objective=how.objective, metric=how.metric, **shared)


def history(result: RestorationResult) -> dict[str, Any]:
    """Return the result without its vectors, as JSON values."""
    return {
        "steps": [asdict(step) for step in result.steps],
        "trials": [asdict(trial) for trial in result.trials],
        "products": result.products,
        "gradients": result.gradients,
        "seconds": result.seconds,
        "stop_reason": result.stop_reason,
        "change": float((result.after - result.before).norm()),
    }


def load_history(tier: Tier, recipe: FineTune, how: Restoration) -> dict[str, Any]:
    """Return the history of a restoration, see :func:`history`; the restoration is made if it does not exist yet."""
    found: dict[str, Any] = json.loads((restored(tier, recipe, how) / "history.json").read_text("utf-8"))
    return found


def load_restored(tier: Tier, recipe: FineTune, how: Restoration) -> PeftModel:
    """Return the restored model in NF4 under the restored, trainable adapter."""
    return models.load_adapter(stages.load_aligned(tier)[0], restored(tier, recipe, how) / "model")
