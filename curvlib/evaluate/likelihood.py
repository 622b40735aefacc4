"""Score given text: the negative log-likelihood of each token under a model, and perplexity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn, split
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from curvlib.batches import IGNORED, Example, answer_logits, answer_targets, at_least_float32, make_batches
from curvlib.errors import CurvlibError
from curvlib.evaluate.stats import Estimate, bootstrap
from curvlib.generate import evaluating


def continuation(head: Sequence[int], tail: Sequence[int]) -> Example:
    """Return the tokens of `head` and `tail` as an example in which only `tail` counts."""
    return Example((*head, *tail), (*[IGNORED] * len(head), *tail))


def token_losses(model: nn.Module, examples: Sequence[Example], batch_size: int = 32) -> list[Tensor]:
    """Return for each example, in the order given, the negative log-likelihoods (nats) of its answer tokens, (K_i,).

    The model's mode is left as it was. Cost: one forward a batch, logits at answer positions only.
    """
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].input_ids))  # as make_batches sorts
    losses: list[Tensor] = []
    with evaluating(model):
        for batch in make_batches(examples, batch_size, pad_id=0):  # any id: padding is masked
            logits = at_least_float32(answer_logits(model, batch))
            values = cross_entropy(logits, answer_targets(batch).to(logits.device), reduction="none").cpu()
            losses += split(values, (batch.labels != IGNORED).sum(1).tolist())
    return [loss for _, loss in sorted(zip(order, losses, strict=True), key=lambda pair: pair[0])]


def text_perplexity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_tokens: int = 128,
    batch_size: int = 4,
    seed: int = 0,
) -> Estimate:
    """Estimate the perplexity exp(Σ NLL / Σ tokens) on plain text, with a bootstrap interval over the documents.

    Each document is cut to `max_tokens` tokens; its first token is given, not predicted. The batches are small because
    each holds batch_size × max_tokens × vocabulary logits. Raises CurvlibError for fewer than two usable documents.
    """
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"][:max_tokens] for text in texts]
    rows = [row for row in rows if len(row) > 1]
    if len(rows) < 2:
        raise CurvlibError(f"{len(rows)} texts of two tokens or more given, expected at least two: give more text")
    losses = token_losses(model, [continuation(row[:1], row[1:]) for row in rows], batch_size)
    sums, counts = [float(loss.double().sum()) for loss in losses], [len(loss) for loss in losses]
    return bootstrap(sums, counts, statistic=lambda nll, n: np.exp(np.sum(nll) / np.sum(n)), seed=seed)
