r"""A suffix by random search: words behind a request that make :math:`-\log p(t)` small, t the first token of "Sure".

A round changes a few neighbouring words of the best suffix in several ways and keeps the best of all; no gradient is
used. Source: Andriushchenko et al. (arXiv 2404.02151).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from curvlib.evaluate.likelihood import continuation, token_losses
from curvlib.generate import Model, render


@dataclass(frozen=True)
class Suffix:
    """A suffix, and the loss (nats) of the best one after each round; the first is that of a random one."""

    text: str
    losses: tuple[float, ...]


def _losses(model: Model, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], target: str) -> list[float]:
    first = tokenizer(target, add_special_tokens=False)["input_ids"][0]
    examples = [continuation(render(tokenizer, prompt), [first]) for prompt in prompts]
    return [float(loss.sum()) for loss in token_losses(model, examples)]


def search(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    request: str,
    *,
    target: str = "Sure",
    length: int = 20,
    candidates: int = 16,
    rounds: int = 20,
    seed: int = 0,
) -> Suffix:
    """Return the best suffix of ``length`` words; of no ``rounds`` a random one, the control.

    Cost: a forward pass of ``candidates`` prompts a round.
    """
    texts = {text.strip() for text in tokenizer.batch_decode([[token] for token in tokenizer.get_vocab().values()])}
    draw, known = random.Random(seed), sorted(text for text in texts if text.isascii() and text.isalpha())
    best = draw.choices(known, k=length)
    losses = _losses(model, tokenizer, [" ".join([request, *best])], target)
    for number in range(rounds):
        width, tried = max(1, length // 4 - number), []  # coarse changes first
        for _ in range(candidates):
            place = draw.randrange(length - width + 1)
            tried.append([*best[:place], *draw.choices(known, k=width), *best[place + width :]])
        values = _losses(model, tokenizer, [" ".join([request, *words]) for words in tried], target)
        if min(values) < losses[-1]:
            best = tried[values.index(min(values))]
        losses.append(min(losses[-1], *values))
    return Suffix(" ".join(best), tuple(losses))
