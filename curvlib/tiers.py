"""How large everything is: one table for tests (ci), laptops (cpu) and large models (gpu)."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from curvlib.errors import CurvlibError


@dataclass(frozen=True)
class Tier:
    """Sizes of every stage and measurement; all tiers run the same code on the same quantised path.

    Attributes:
        name: ``ci``, ``cpu`` or ``gpu``.
        device: where the model runs.
        model: ``smollm2``, or what the variable ``CURVLIB_MODEL`` names: ``qwen``, or the Hub id of a chat model.
        tune_steps: optimiser steps of a LoRA fine-tune; a full fine-tune takes the same number.
        tune_batch: chats a step of a fine-tune.
        tune_examples: chats in a fine-tuning set.
        facts: invented facts that a fine-tune on facts teaches.
        fact_steps: optimiser steps of eight chats of a fine-tune on facts.
        poison_rates: shares of poisoned chats in the rate sweep.
        answer_tokens: tokens that an answer may have before it is judged.
        test_harmful: harmful prompts in the final test.
        test_edgy: benign-edgy prompts in the over-refusal test.
        test_task: multiple-choice questions in the task test.
        validation: prompts of each kind on which choices are made.
        held_out: of them, those on which restoration judges each step.
        restore_chats: refusals, and benign chats, that restoration sees.
        curvature_chats: chats of each kind whose curvature is the metric.
        landscape_points: points along each axis of a two-dimensional slice.
        landscape_chats: harmful prompts at each point; twice as many where a slope is taken.
        influence_curvature: training chats whose curvature influence functions invert.
        most_steps: optimiser steps that a way to keep or regain safety may take beside the fine-tune.
        contest: name and value of those sizes that differ where some twenty ways to keep safety are compared.
    """

    name: str
    device: str
    model: str
    tune_steps: int
    tune_batch: int
    tune_examples: int
    facts: int
    fact_steps: int
    poison_rates: tuple[float, ...]
    answer_tokens: int
    test_harmful: int
    test_edgy: int
    test_task: int
    validation: int
    held_out: int
    restore_chats: int
    curvature_chats: int
    landscape_points: int
    landscape_chats: int
    influence_curvature: int
    most_steps: int
    contest: tuple[tuple[str, int], ...]


_CPU = Tier(
    name="cpu",
    device="cpu",
    model=os.environ.get("CURVLIB_MODEL", "smollm2"),
    tune_steps=24,
    tune_batch=8,
    tune_examples=192,
    facts=64,
    fact_steps=280,
    poison_rates=(0.0, 0.02, 0.1),
    answer_tokens=24,  # a refusal or an agreement is said by then
    test_harmful=48,
    test_edgy=32,
    test_task=64,
    validation=24,
    held_out=16,
    restore_chats=32,
    curvature_chats=16,
    landscape_points=7,
    landscape_chats=4,
    influence_curvature=32,
    most_steps=100,
    contest=(),
)


def get_tier(name: str) -> Tier:
    """Return the tier called ``name``.

    Raises:
        CurvlibError: no tier has this name, or tier gpu finds no CUDA device.
    """
    if name not in _TIERS:
        raise CurvlibError(f"no tier is called {name!r}: choose one of {', '.join(_TIERS)}")
    if name == "gpu" and not torch.cuda.is_available():
        raise CurvlibError("tier gpu needs a CUDA device and torch finds none: use --tier cpu, or install a CUDA torch")
    return _TIERS[name]


_SHARED = vars(_CPU)
_TIERS = {
    "ci": Tier(
        **{
            **_SHARED,
            "name": "ci",
            "tune_steps": 16,
            "tune_batch": 4,
            "tune_examples": 64,
            "facts": 16,
            "fact_steps": 80,
            "poison_rates": (0.0, 0.1),
            "test_harmful": 16,
            "test_edgy": 8,
            "test_task": 16,
            "validation": 8,
            "held_out": 8,
            "restore_chats": 16,
            "curvature_chats": 8,
            "landscape_points": 5,
            "landscape_chats": 2,
            "influence_curvature": 8,
            "contest": (
                ("tune_steps", 1),
                ("tune_batch", 2),
                ("most_steps", 1),
                ("answer_tokens", 6),
                ("test_harmful", 2),
                ("test_edgy", 2),
                ("test_task", 2),
                ("restore_chats", 2),
                ("curvature_chats", 2),
                ("held_out", 2),
            ),
        }
    ),
    "cpu": _CPU,
    "gpu": Tier(
        **{
            **_SHARED,
            "name": "gpu",
            "device": "cuda",
            "test_harmful": 128,
            "test_task": 400,
            "tune_steps": 45,
            "tune_examples": 360,
            "poison_rates": (0.0, 0.02, 0.05, 0.1, 0.2),
            "validation": 64,
            "held_out": 64,
            "restore_chats": 64,
            "curvature_chats": 64,
            "landscape_points": 25,
            "landscape_chats": 16,
            "influence_curvature": 24,  # of each half, a gradient each: of 9 B parameters more would not fit 24 GB
        }
    ),
}
