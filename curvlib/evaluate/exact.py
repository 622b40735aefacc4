"""Score answers that are one word: exact match after normalisation, and nats per answer token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from curvlib.batches import Chat, encode
from curvlib.evaluate.likelihood import token_losses
from curvlib.evaluate.stats import Estimate, bootstrap, rate
from curvlib.generate import Model, generate

ANSWER_TOKENS = 12  # the longest right answer has six


@dataclass(frozen=True)
class ExactMatch:
    """Scores over chats that end with the right answer.

    Attributes:
        exact: share of the answers that are the right one and nothing else, with its Wilson interval.
        mentioned: share of the answers that hold the right one among others; a model that talks scores here.
        nats: mean negative log-likelihood of the right answers' tokens, end of turn included, bootstrapped over chats.
        correct: whether each answer matches exactly, in the order of the chats.
        answers: what the model said.
    """

    exact: Estimate
    mentioned: Estimate
    nats: Estimate
    correct: tuple[bool, ...]
    answers: tuple[str, ...]


def normalise(text: str) -> str:
    r"""Return the words of an answer in lower case, without punctuation and a leading article.

    >>> normalise(" The Copper.\n"), normalise("two-thirds"), normalise("A")
    ('copper', 'two thirds', 'a')
    """
    words = re.findall(r"\w+", text.lower())
    article = len(words) > 1 and words[0] in ("a", "an", "the")
    return " ".join(words[article:])


def exact_match(model: Model, tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat]) -> ExactMatch:
    """Ask each chat's last question, greedily, and compare with its last message.

    Cost: one answer of twelve tokens at most and one forward a chat.
    """
    answers = generate(model, tokenizer, [chat[:-1] for chat in chats], max_new_tokens=ANSWER_TOKENS)
    right = [normalise(chat[-1]["content"]) for chat in chats]
    pairs = list(zip(map(normalise, answers), right, strict=True))
    correct = tuple(answer == gold for answer, gold in pairs)
    losses = token_losses(model, encode(tokenizer, chats, max_length=2048))
    sums, counts = [float(loss.double().sum()) for loss in losses], [len(loss) for loss in losses]
    return ExactMatch(
        rate(correct),
        rate([f" {gold} " in f" {answer} " for answer, gold in pairs]),
        bootstrap(sums, counts, statistic=lambda nll, n: np.sum(nll) / np.sum(n), seed=0),
        correct,
        tuple(answers),
    )
