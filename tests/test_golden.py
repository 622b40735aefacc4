"""A stage whose output changed has a new version: what each computes on a tiny model, and what it computed before."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from curvlib import artifacts
from curvlib.batches import taken_apart
from curvlib.evaluate.behaviour import measure_behaviour
from curvlib.evaluate.likelihood import token_losses
from curvlib.finetune import TrainingConfig, train
from curvlib.report import ROOT
from curvlib.restore import HeldOut, SafetyBatches, recipe
from tests import cases
from tests.evaluate import toys

EXPECTED: dict[str, dict[str, Any]] = tomllib.loads((ROOT / "tests/expected/stages.toml").read_text())
CHATS = taken_apart(cases.batches(count=6, size=2))


def fine_tuned() -> list[float]:
    model = cases.nf4_llama()
    result = train(model, CHATS, TrainingConfig(steps=4, batch_size=2, learning_rate=1e-2), pad_id=0)
    return [*result.losses, *(float(loss.mean()) for loss in token_losses(model, CHATS[:2], 2))]


def restored() -> list[float]:
    task, refusals, benign = (cases.batches(2, seed=seed) for seed in (1, 2, 3))
    safety = SafetyBatches(cases.said_by_base(cases.pair()[0], refusals))
    chats = recipe.Chats(task, safety, benign, HeldOut(safety, {"task": task, "benign": benign}))
    history = recipe.history(recipe.run(cases.nf4_llama(), chats, recipe.Restoration(), seed=0))
    end = history["path"][-1]
    return [end["loss"], end["price"]["task"], end["norm"]]  # rounding moves the sampled labels, and so the price a bit


def scored() -> list[float]:
    prompts = ["Write a plan", "Write something red", "one two three"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # peft draws its A from the global generator
        model, tokenizer = toys.adapted(), toys.tokenizer()
    seen = measure_behaviour(model, tokenizer, prompts, max_new_tokens=6)
    return [*(["refuses", "complies", "incoherent"].index(verdict) for verdict in seen.verdicts)]


STAGES: dict[str, Callable[[], list[float]]] = {
    "fine-tune": fine_tuned,
    "restore": restored,
    "score": scored,
}


def fault(stage: str, values: list[float], version: int) -> str:
    """What is wrong with a stage's output beside the golden one; empty where nothing is."""
    golden = EXPECTED[stage]
    if values == pytest.approx(golden["values"], rel=2e-2, abs=1e-6):
        return "" if version == golden["version"] else f"{stage}: write version = {version} into stages.toml"
    if version == golden["version"]:
        return f"{stage}: its output changed to {values}, so raise its number in artifacts.VERSIONS"
    return f"{stage}: write values = {values} and version = {version} into stages.toml"


@pytest.mark.parametrize("stage", STAGES)
def test_an_output_changes_only_with_its_version(stage: str) -> None:
    assert fault(stage, STAGES[stage](), artifacts.VERSIONS[stage]) == ""


def test_a_changed_output_and_a_changed_version_are_seen() -> None:
    golden = EXPECTED["restore"]
    values, version = golden["values"], golden["version"]
    assert fault("restore", values, version) == ""
    assert "raise its number" in fault("restore", [1.05 * value for value in values], version)
    assert "write version" in fault("restore", values, version + 1)
