"""Fine-tunes on part of a training set, as cached stages: what removing chats does, and what subsets teach."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from curvlib import models, stages
from curvlib.artifacts import artifact
from curvlib.batches import Example
from curvlib.evaluate.likelihood import token_losses
from curvlib.evaluate.scorecard import Scorecard, scorecard
from curvlib.finetune import TrainingConfig, train
from curvlib.influence import recipe as recipes
from curvlib.stages import FineTune
from curvlib.tiers import Tier


def retrained(tier: Tier, recipe: FineTune, kept: Sequence[int]) -> Path:
    """Return the adapter (peft format) of a fine-tune on the chats of these numbers alone.

    The steps shrink with the set, so that each chat is seen as often as before.
    """
    run = _Retraining.of(tier, recipe, kept)

    def build(place: Path) -> None:
        run.train(place).save_pretrained(str(place / "model"))

    return artifact("influence-run", run.config, build) / "model"


def load_retrained(tier: Tier, recipe: FineTune, kept: Sequence[int]) -> PeftModel:
    """Return the model of :func:`retrained`."""
    return models.load_adapter(stages.load_aligned(tier)[0], retrained(tier, recipe, kept))


def removed_scorecard(tier: Tier, recipe: FineTune, kept: Sequence[int]) -> Scorecard:
    """Return what the model of :func:`retrained` says to harmful prompts and to look-alikes."""
    key = stages.key(tier, stages.aligned_source(tier), retrained(tier, recipe, kept))
    return scorecard(tier, key, lambda: load_retrained(tier, recipe, kept), parts=("harmful", "edgy"))


def query_losses(tier: Tier, recipe: FineTune, kept: Sequence[int]) -> list[float]:
    """Return each compliance query's mean loss after the fine-tune of :func:`retrained`; no adapter is kept."""
    run, asked = _Retraining.of(tier, recipe, kept), recipes.queries(tier)["compliance"]

    def build(place: Path) -> None:
        losses = [float(loss.mean()) for loss in token_losses(run.train(place), asked, 8)]
        (place / "losses.json").write_text(json.dumps(losses), "utf-8")

    place = artifact("influence-losses", run.config | {"queries": stages.digest(asked)}, build)
    found: list[float] = json.loads((place / "losses.json").read_text("utf-8"))
    return found


@dataclass(frozen=True)
class _Retraining:
    """A fine-tune on some of a recipe's chats."""

    tier: Tier
    recipe: FineTune
    chosen: list[Example]
    training: TrainingConfig

    @classmethod
    def of(cls, tier: Tier, recipe: FineTune, kept: Sequence[int]) -> _Retraining:
        examples, _ = recipes.training_set(tier, recipe)
        steps = max(1, round(tier.tune_steps * len(kept) / len(examples)))
        training = replace(stages.tune_training(tier, recipe), steps=steps)
        return cls(tier, recipe, [examples[number] for number in kept], training)

    @property
    def config(self) -> dict[str, Any]:
        """All that the trained model depends on."""
        source = stages.aligned_source(self.tier)
        config = {**stages.key(self.tier, source), "rank": self.recipe.rank, "seed": self.recipe.seed}
        return config | {"training": asdict(self.training), "texts": stages.digest(self.chosen)}

    def train(self, place: Path) -> PeftModel:
        """Return the trained model; a killed run goes on from its checkpoint in ``place``."""
        base, tokenizer = stages.load_aligned(self.tier)
        model = models.add_lora(base, rank=self.recipe.rank, seed=self.recipe.seed)
        told: dict[str, Any] = {"checkpoint": place / "training.safetensors"}
        told["label"] = f"fine-tune on {len(self.chosen)} chats"
        train(model, self.chosen, self.training, pad_id=stages.pad_id(tokenizer), **told)
        return model


def without(count: int, removed: Sequence[int]) -> list[int]:
    """Return the numbers below ``count`` that are not removed.

    >>> without(4, [2, 0])
    [1, 3]
    """
    gone = set(removed)
    return [number for number in range(count) if number not in gone]
