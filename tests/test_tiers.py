"""Tiers: known names, one clear line for the others, and sizes that the splits can serve."""

from __future__ import annotations

import pytest
import torch

from curvlib import data
from curvlib.errors import CurvlibError
from curvlib.tiers import get_tier


def test_an_unknown_tier_names_the_known_ones() -> None:
    with pytest.raises(CurvlibError, match="'tpu': choose one of ci, cpu, gpu"):
        get_tier("tpu")


def test_tier_gpu_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CurvlibError, match="needs a CUDA device"):
        get_tier("gpu")


@pytest.mark.parametrize("name", ["ci", "cpu", "gpu"])
def test_the_splits_are_large_enough(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    tier = get_tier(name)
    wanted = {
        "test_harmful": tier.test_harmful,
        "test_edgy": tier.test_edgy,
        "test_task": tier.test_task,
        "poison": round(max(tier.poison_rates) * tier.tune_examples),
        "task_train": tier.tune_examples,
        "chat_train": tier.tune_examples // 3,
        "restore_harmful": tier.restore_chats,
        "restore_task": tier.curvature_chats,
        "restore_edgy": tier.curvature_chats // 2,
        "restore_benign": tier.curvature_chats // 2,
        "validation_harmful": tier.validation,
        "validation_edgy": min(tier.validation, 24),
        "validation_task": tier.validation,
    }
    short = {split: count for split, count in wanted.items() if len(data.load_split(split)) < count}
    assert not short


def test_ci_is_the_smallest() -> None:
    ci, cpu = get_tier("ci"), get_tier("cpu")
    assert len(ci.poison_rates) < len(cpu.poison_rates)
    assert all(getattr(ci, name) < getattr(cpu, name) for name in ("tune_steps", "tune_examples", "test_harmful"))


def test_the_contest_changes_sizes_that_there_are() -> None:
    tier = get_tier("ci")
    assert tier.contest
    assert all(0 < size <= getattr(tier, name) for name, size in tier.contest)
