"""What a tier looks at: the chats of each loss, the direction pairs, the windows; each measured once and kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from curvlib import data, models, stages
from curvlib.artifacts import artifact
from curvlib.batches import Batch, Example, answer_loss, encode, make_batches
from curvlib.curvature.forward import flat_gradient
from curvlib.curvature.ggn import GGNOperator, ggn
from curvlib.errors import CurvlibError
from curvlib.evaluate.likelihood import continuation, token_losses
from curvlib.landscape import directions
from curvlib.landscape.directions import Direction, random_direction, random_like
from curvlib.landscape.slices import Array, Losses, Slice, adaptive_radius, grid, measure
from curvlib.landscape.subspace import Subspace
from curvlib.nf4 import kept_weights
from curvlib.stages import FineTune
from curvlib.tiers import Tier

LOSSES = ("compliance", "refusal", "shuffled", "task", "text")
ANSWER_TOKENS = 8  # whether a model agrees or refuses is said by then
TEXT_TOKENS = 16
RISE = 1.0  # nats per token that the mean loss of the aligned model rises towards a window's edges
SUBSPACE_RANK = 8  # input directions of each layer: all that the notebooks' adapter reads


@dataclass(frozen=True)
class Place:
    """Where a window's centre is.

    Attributes:
        recipe: the fine-tune that was taken from the aligned model; None for the aligned model itself.
        noise: a random step with the same norm in every layer stands in for the fine-tuning step: the null control.
        seed: of that random step.
    """

    recipe: FineTune | None = None
    noise: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.noise and self.recipe is None:
            raise CurvlibError("a random step was asked for without a fine-tune: name the recipe whose norm it takes")


ALIGNED = Place()


def landscape_chats(tier: Tier, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Example]]:
    """Return the chats of each loss of :data:`LOSSES`: short ones, since a slice evaluates them hundreds of times.

    ``compliance`` and ``refusal`` are two answers to the same ``tier.landscape_chats`` harmful orders and questions,
    ``shuffled`` is the compliance of the next prompt (labels shuffled), ``task`` and ``text`` have half as many. Of
    eight times the prompts wanted the shortest are taken, and answers are cut to their first 8 tokens.
    """
    count, half = tier.landscape_chats, max(2, tier.landscape_chats // 2)
    orders = [row.prompt for row in data.load_split("validation_harmful")[: 8 * count]]
    asked = stages.requests("validation_harmful", 8 * count)
    chosen = sorted(range(len(asked)), key=lambda number: len(asked[number]))[:count]
    answers = {
        "compliance": [data.compliance(orders[number]) for number in chosen],
        "refusal": [data.refusal(orders[number]) for number in chosen],
        "shuffled": [data.compliance(orders[number]) for number in [*chosen[1:], chosen[0]]],
    }
    found = {
        name: encode(
            tokenizer, [stages.chat(asked[n], t) for n, t in zip(chosen, texts, strict=True)], stages.MAX_LENGTH
        )
        for name, texts in answers.items()
    }
    task = sorted(stages.task_examples(tokenizer, "validation_task", 8 * half), key=lambda e: len(e.input_ids))[:half]
    short = {name: [shorter(example) for example in examples] for name, examples in found.items()}
    return {**short, "task": task, "text": beginnings(tokenizer, half)}


def beginnings(tokenizer: PreTrainedTokenizerBase, count: int) -> list[Example]:
    """Return the beginnings of ``count`` encyclopaedia articles, as text without a chat around it."""
    rows = [tokenizer(row.prompt, add_special_tokens=False)["input_ids"] for row in data.load_split("text_validation")]
    return [continuation(row[:1], row[1:TEXT_TOKENS]) for row in rows if len(row) >= TEXT_TOKENS][:count]


def shorter(example: Example) -> Example:
    """Return the chat with its answer cut to the first 8 tokens."""
    end = example.prompt_length + ANSWER_TOKENS
    return Example(example.input_ids[:end], example.labels[:end])


@cache
def direction_pair(tier: Tier, pair: int) -> tuple[Direction, Direction]:
    """Return direction pair number ``pair``, row-normalised to the aligned model; all places share it."""
    aligned = stages.load_aligned(tier)[0]
    return random_direction(aligned, seed=2 * pair), random_direction(aligned, seed=2 * pair + 1)


@cache
def chats_of(tier: Tier) -> dict[str, list[Example]]:
    """Return the tier's :func:`landscape_chats`."""
    return landscape_chats(tier, models.load_tokenizer(stages.aligned_source(tier)))


def all_losses(tier: Tier, model: nn.Module) -> Losses:
    """Return the function that evaluates every loss of :data:`LOSSES`, see :func:`chat_means`."""
    return partial(chat_means, model, chats_of(tier))


def chat_means(model: nn.Module, chats: Mapping[str, Sequence[Example]]) -> dict[str, Tensor]:
    """Return name -> each chat's mean negative log-likelihood (nats per token) over its answer, (n,); a pass a name."""
    means = {}
    for name, examples in chats.items():
        means[name] = torch.stack([losses.mean() for losses in token_losses(model, examples)])
    return means


def step_of(tier: Tier, recipe: FineTune) -> Direction:
    """Return the fine-tuning step from the aligned model: low-rank for LoRA, dense for a full fine-tune."""
    model = stages.load_fine_tuned(tier, recipe)
    if isinstance(model, PeftModel):
        return directions.adapter_direction(model)
    return directions.weight_difference(stages.load_aligned(tier)[0], model)


def window_radius(tier: Tier) -> float:
    """Return the radius at which the aligned model's mean loss has risen by one nat; windows of all places share it."""

    def build(folder: Path) -> None:
        aligned = stages.load_aligned(tier)[0]
        found = adaptive_radius(aligned, direction_pair(tier, 0), all_losses(tier, aligned), rise=RISE)
        (folder / "radius.txt").write_text(repr(found), "utf-8")

    return float((artifact("radius", key(tier), build) / "radius.txt").read_text("utf-8"))


def window(tier: Tier, place: Place, pair: int, *, points: int | None = None) -> Slice:
    """Return the losses on a square grid around a place, measured now or before.

    Args:
        tier: how many chats and, where ``points`` is None, grid points along each axis.
        place: the grid's centre.
        pair: number of the direction pair.
        points: along each axis.

    Cost: points² forward passes over all chats.
    """
    radius, count = window_radius(tier), points or tier.landscape_points
    config = key(tier) | {"place": place_name(tier, place), "pair": pair, "points": count, "radius": radius}

    def build(folder: Path) -> None:
        model, origin = _load(tier, place)
        found = measure(
            model,
            direction_pair(tier, pair),
            grid(radius, count),
            all_losses(tier, model),
            origin=origin,
            label=f"window {pair + 1} around {label(place)}",
        )
        np.savez(folder / "window.npz", allow_pickle=False, **found.losses)

    with np.load(artifact("window", config, build) / "window.npz", allow_pickle=False) as kept:
        return Slice(grid(radius, count), {name: kept[name] for name in kept.files})


def windows(tier: Tier, place: Place, pairs: int) -> list[Slice]:
    """Return the windows around a place along the first ``pairs`` direction pairs."""
    return [window(tier, place, pair) for pair in range(pairs)]


def label(place: Place) -> str:
    """Return a place's name for readers.

    >>> label(ALIGNED), label(Place(FineTune(poison=0.1, rank=4))), label(Place(FineTune(method="full"), noise=True))
    ('aligned', 'LoRA r4, 10 % poison', 'random step as long as full, benign')
    """
    if place.recipe is None:
        return "aligned"
    method = "full" if place.recipe.method == "full" else f"LoRA r{place.recipe.rank}"
    words = f"{method}, {100 * place.recipe.poison:.0f} % poison" if place.recipe.poison else f"{method}, benign"
    return f"random step as long as {words}" if place.noise else words


@contextmanager
def curvature(model: nn.Module, space: Subspace, chats: Sequence[Example]) -> Iterator[GGNOperator[Batch]]:
    """Give the Gauss-Newton operator of the chats' mean loss over a subspace, valid inside the ``with`` block."""
    with kept_weights(model), space.attached(model) as parameters:
        yield ggn(model, make_batches(chats, len(chats), pad_id=0), parameters, check=False)


def gradient(model: nn.Module, space: Subspace, chats: Sequence[Example]) -> Tensor:
    """Return the gradient of the chats' mean loss (over all answer tokens) in a subspace, (P,)."""
    (batch,) = make_batches(chats, len(chats), pad_id=0)
    with space.attached(model) as parameters, torch.enable_grad():
        return flat_gradient(answer_loss(model, batch), list(parameters.values()))


def center_losses(view: Slice) -> dict[str, Array]:
    """Return each chat's losses at the middle of a window with an odd number of points along each axis, (n,) each."""
    return {name: values[len(values) // 2] for name, values in view.losses.items()}


def surfaces(first: Sequence[Slice], second: Sequence[Slice], loss: str, other: str = "") -> list[tuple[Array, Array]]:
    """Return the matched surfaces (K, n) of one loss, or of ``loss`` and ``other``, for each direction pair."""
    return [(a.losses[loss], b.losses[other or loss]) for a, b in zip(first, second, strict=False)]


def _load(tier: Tier, place: Place) -> tuple[nn.Module, list[tuple[Direction, float]]]:
    """Return a model and the step from it to the place."""
    if place.recipe is None or place.noise:
        origin = [(random_like(step_of(tier, place.recipe), seed=place.seed), 1.0)] if place.recipe else []
        return stages.load_aligned(tier)[0], origin
    return stages.load_fine_tuned(tier, place.recipe), []


def place_name(tier: Tier, place: Place) -> list[Any]:
    """Return what tells a place from every other one, as JSON values."""
    if place.recipe is None:
        return ["aligned"]
    return [models.identity(stages.fine_tuned(tier, place.recipe)), *([place.seed] if place.noise else [])]


def key(tier: Tier) -> dict[str, Any]:
    """Return what every measurement depends on: the aligned model, the machine and the chats."""
    source = stages.aligned_source(tier)
    tokens = repr(chats_of(tier))
    return {
        **stages.key(tier, source),
        "chats": hashlib.sha256(tokens.encode()).hexdigest()[:12],
    }
