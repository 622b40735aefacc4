"""The fine-tuned models and their chats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from curvlib import nf4, stages
from curvlib.batches import Example, make_batches, spread, taken_apart
from curvlib.curvature.lowrank import sampled_fisher
from curvlib.influence import recipe
from curvlib.influence.gradients import BATCH_SIZE
from curvlib.stages import FineTune
from curvlib.tiers import get_tier
from tests import cases

POISON, RULE = 0.1, 0.1  # λ as a share of the mean curvature that a chat sees, the same for every package


@dataclass(frozen=True)
class Setup:
    """A fine-tuned model that is loaded when asked for, and what it was tuned on.

    Attributes:
        title: for the reader.
        load: returns the model under its trainable adapter, in evaluation mode; a new one at each call.
        examples: all training chats.
        queries: the harmful-compliance chats that are asked about.
        seen: the training chats that the curvature is estimated from.
        damping: returns λ for a loaded model.
    """

    title: str
    load: Callable[[], nn.Module]
    examples: list[Example]
    queries: list[Example]
    seen: list[Example]
    damping: Callable[[nn.Module], float]


def tiny_nf4(device: str) -> Setup:
    """A two-layer Llama of random weights in NF4 under LoRA, on random chats; seconds."""
    chats = taken_apart(cases.batches(count=30, size=1))
    examples, queries = chats[:24], chats[24:]
    title = "tiny Llama, random weights, NF4, LoRA rank 2, float32"
    return Setup(title, lambda: cases.nf4_llama().to(device), examples, queries, examples, by_rule(examples))


def smollm2_nf4(device: str) -> Setup:
    """A fine-tune of SmolLM2 in NF4 with a tenth of poison, and queries that agree to harmful requests."""
    tier = get_tier("gpu" if device == "cuda" else "cpu")
    tuned = FineTune(poison=POISON)
    examples, _ = recipe.training_set(tier, tuned)
    seen = spread(examples, tier.influence_curvature)
    return Setup(
        "SmolLM2-135M fine-tuned in NF4, LoRA rank 8",
        lambda: stages.load_fine_tuned(tier, tuned),
        examples,
        recipe.queries(tier)["compliance"],
        seen,
        by_rule(seen),
    )


def smollm2_dense(device: str) -> Setup:
    """The same fine-tune with its 4-bit weights dequantised to float32: the same function, layers that all know."""
    four_bit = smollm2_nf4(device)
    title = "the same, dequantised: dense float32, LoRA rank 8"
    return Setup(**{**vars(four_bit), "title": title, "load": lambda: dequantised(four_bit.load())})


SETUPS: dict[str, Callable[[str], Setup]] = {
    "tiny_nf4": tiny_nf4,
    "smollm2_dense": smollm2_dense,
    "smollm2_nf4": smollm2_nf4,
}


def by_rule(seen: Sequence[Example]) -> Callable[[nn.Module], float]:
    """Return λ by the rule on these chats, for a loaded model."""
    chats = make_batches(seen, BATCH_SIZE, pad_id=0)
    return lambda model: RULE * sampled_fisher(model, chats, samples=1, seed=0).scale


def dequantised(model: nn.Module) -> nn.Module:
    """Replace every 4-bit layer by a dense one of the same weights, widen all to float32, and return the model."""
    for name, layer in nf4.four_bit_layers(model).items():
        dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        weights: dict[str, Any] = {"weight": nf4.dequantise(layer)}
        if layer.bias is not None:
            weights["bias"] = layer.bias.detach()
        dense.load_state_dict(weights, assign=True)
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, dense.requires_grad_(False))
    return model.float().eval()


def repeated(chats: Sequence[Example], count: int) -> list[Example]:
    """Return ``count`` chats, those given again and again: what is measured costs the same for a chat that comes back.

    >>> repeated("abc", 5)
    ['a', 'b', 'c', 'a', 'b']
    """
    return [chats[number % len(chats)] for number in range(count)]
