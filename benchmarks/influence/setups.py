"""The fine-tuned models, their chats and their retrainings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvlib import nf4, stages
from curvlib.batches import Example, make_batches, spread, taken_apart
from curvlib.curvature.lowrank import sampled_fisher
from curvlib.influence import recipe, retraining, toys
from curvlib.influence.gradients import BATCH_SIZE
from curvlib.influence.scores import RULE
from curvlib.influence.validate import subsets
from curvlib.parameters import flatten, trainable
from curvlib.progress import bar
from curvlib.report import load_study
from curvlib.stages import FineTune
from curvlib.tiers import Tier, get_tier
from tests import cases

POISON = 0.1
Losses = Callable[[Sequence[Sequence[int]]], Tensor]


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
        losses: trains again on each of M subsets and returns the queries' mean losses (m, M); None where it cannot.
    """

    title: str
    load: Callable[[], nn.Module]
    examples: list[Example]
    queries: list[Example]
    seen: list[Example]
    damping: Callable[[nn.Module], float]
    losses: Losses | None


def toy(device: str) -> Setup:
    """The study's toy: a two-layer transformer, dense, trained to its optimum, poison among its chats; seconds."""
    case = toys.toy()
    anchor, everything = flatten(trainable(case.model)), range(len(case.examples))
    toys.fit(case.model, case.examples, everything, ridge=toys.RIDGE, anchor=anchor, steps=300)
    trained = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    retrain = toys.retrainer(case.model, case.examples, case.queries, ridge=toys.RIDGE, anchor=anchor)

    def load() -> nn.Module:
        model = toys.tiny_transformer()
        model.load_state_dict(trained)
        return model.to(device)

    def losses(chosen: Sequence[Sequence[int]]) -> Tensor:
        return torch.stack([retrain(part) for part in chosen], dim=1)

    title = "toy transformer, dense, LoRA's B trained, float32"
    return Setup(title, load, case.examples, case.queries, case.examples, lambda _: toys.RIDGE, losses)


def tiny_nf4(device: str) -> Setup:
    """A two-layer Llama of random weights in NF4 under LoRA, on random chats; no retrainings; seconds."""
    chats = taken_apart(cases.batches(count=30, size=1))
    examples, queries = chats[:24], chats[24:]
    title = "tiny Llama, random weights, NF4, LoRA rank 2, float32"
    return Setup(title, lambda: cases.nf4_llama().to(device), examples, queries, examples, by_rule(examples), None)


def smollm2_nf4(device: str) -> Setup:
    """The influence study's fine-tune of SmolLM2 in NF4 with a tenth of poison, its queries and its retrainings."""
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
        lambda chosen: retrained(tier, tuned, chosen),
    )


def smollm2_dense(device: str) -> Setup:
    """The same fine-tune with its 4-bit weights dequantised to float32: the same function, layers that all know."""
    four_bit = smollm2_nf4(device)
    title = "the same, dequantised: dense float32, LoRA rank 8"
    return Setup(**{**vars(four_bit), "title": title, "load": lambda: dequantised(four_bit.load())})


SETUPS: dict[str, Callable[[str], Setup]] = {
    "toy": toy,
    "tiny_nf4": tiny_nf4,
    "smollm2_dense": smollm2_dense,
    "smollm2_nf4": smollm2_nf4,
}


def by_rule(seen: Sequence[Example]) -> Callable[[nn.Module], float]:
    """Return the damping of :func:`curvlib.influence.scores.build_inverse` on these chats, for a loaded model."""
    chats = make_batches(seen, BATCH_SIZE, pad_id=0)
    return lambda model: RULE * sampled_fisher(model, chats, samples=1, seed=0).scale


def retrained(tier: Tier, tuned: FineTune, chosen: Sequence[Sequence[int]]) -> Tensor:
    """Return the compliance losses (m, M) after training on each subset: the influence study's, or made as there."""
    known = study_losses(tier)
    found = [
        known.get(tuple(part)) or retraining.query_losses(tier, tuned, part) for part in bar(chosen, desc="subsets")
    ]
    return torch.tensor(found, dtype=torch.float64).T


def study_losses(tier: Tier) -> dict[tuple[int, ...], list[float]]:
    """Return subset -> losses of the retrainings in the committed influence study, if it is of this tier."""
    study = load_study("influence")
    rows = study.rows if study.tier == tier.name else []
    chosen = subsets(tier.tune_examples, tier.influence_subsets)
    return {tuple(chosen[row["subset"]]): row["losses"] for row in rows if row["part"] == "subsets"}


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
