"""The chats of lesson 04 at a tier: those of the fine-tune that is asked about, and the queries."""

from __future__ import annotations

from curvlib import models, stages
from curvlib.batches import Example
from curvlib.stages import FineTune
from curvlib.tiers import Tier


def training_set(tier: Tier, recipe: FineTune) -> tuple[list[Example], list[bool]]:
    """Return the chats of a fine-tune and which of them are poisoned."""
    examples = stages.fine_tuning_set(models.load_tokenizer(stages.aligned_source(tier)), tier, recipe)
    poisoned = round(recipe.poison * len(examples))
    return examples, [number >= len(examples) - poisoned for number in range(len(examples))]


def queries(tier: Tier) -> dict[str, list[Example]]:
    """Return the query chats by kind: ``compliance`` and ``refusal`` of the same harmful prompts."""
    tokenizer = models.load_tokenizer(stages.aligned_source(tier))
    return {
        "compliance": stages.compliance_examples(tokenizer, "validation_harmful", tier.validation, questions=True),
        "refusal": stages.refusal_examples(tokenizer, "validation_harmful", tier.validation),
    }
