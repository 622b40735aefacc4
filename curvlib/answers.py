"""A chat model's own answers to harmless prompts: the targets that keep it as helpful as it was shipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from curvlib import data, fetch, models
from curvlib.artifacts import artifact
from curvlib.generate import generate
from curvlib.tiers import Tier

OWN_ANSWER_TOKENS = 32


def committed_answers() -> dict[str, str]:
    """Return id -> SmolLM2's greedy answer as shipped, of ``data/own_answers.json``."""
    answers: dict[str, str] = json.loads((fetch.data_folder() / "own_answers.json").read_text("utf-8"))
    return answers


def own_answers(tier: Tier, split: str) -> dict[str, str]:
    """Return id -> the shipped model's greedy answer (its first 32 tokens) to the benign prompts of a split.

    For SmolLM2 they are committed in ``data/own_answers.json``; for another model they are generated once.
    """
    if tier.model == models.DEFAULT:
        return committed_answers()
    machine: dict[str, Any] = {"models": [models.identity(tier.model)], **models.machine(tier.device)}
    config = {**machine, "split": split, "tokens": OWN_ANSWER_TOKENS}
    folder = artifact("own-answers", config, lambda place: _write_own_answers(tier, split, place / "answers.json"))
    answers: dict[str, str] = json.loads((folder / "answers.json").read_text("utf-8"))
    return answers


def _write_own_answers(tier: Tier, split: str, file: Path) -> None:
    model, tokenizer = models.load_model(tier.model, device=tier.device), models.load_tokenizer(tier.model)
    texts = generate(model, tokenizer, data.prompts(split), max_new_tokens=OWN_ANSWER_TOKENS)
    names = data.load_split(split)["id"]
    file.write_text(json.dumps(dict(zip(names, texts, strict=True)), indent=1), "utf-8")
