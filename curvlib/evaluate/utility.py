"""Multiple-choice accuracy by the letters' likelihood after a common opening: a lesson in how an accuracy fools.

Questions are rows of :func:`curvlib.data.load_split` with options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from curvlib.data import Row, lettered, task_question
from curvlib.errors import CurvlibError
from curvlib.evaluate.stats import Estimate, rate
from curvlib.generate import Model, evaluating, left_pad, render
from curvlib.prefix import read_beginning

OPENING = "The answer is"  # the letter comes next


@dataclass(frozen=True)
class Choices:
    """Accuracy with its Wilson interval; the option chosen and whether it was right, in question order (to pair)."""

    accuracy: Estimate
    chosen: tuple[str, ...]
    correct: tuple[bool, ...]


def letter_accuracy(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Row],
    *,
    batch_size: int = 32,
) -> Choices:
    """Choose for each question the letter with the highest next-token logit after "The answer is".

    One forward pass a question. Raises CurvlibError if an example has no options, its answer is none of them, or
    a letter is not one token.
    """
    check_options(examples)
    prompts = [task_question(example) for example in examples]
    heads = [render(tokenizer, prompt, OPENING) for prompt in prompts]
    letters = dict.fromkeys(letter for example in examples for letter in lettered(example))
    tokens = {letter: letter_token(tokenizer, prompts[0], letter) for letter in letters}
    logits = next_token_logits(model, heads, list(tokens.values()), batch_size)
    column = {letter: index for index, letter in enumerate(tokens)}
    rows = zip(examples, logits.tolist(), strict=True)
    return compare(examples, [[row[column[letter]] for letter in lettered(example)] for example, row in rows])


def check_options(examples: Sequence[Row]) -> None:
    """Raise CurvlibError unless there are questions, each with its answer among its options."""
    wrong = [example["id"] for example in examples if example["answer"] not in lettered(example)]
    if wrong or not examples:
        example = wrong[0] if wrong else "an empty list"
        raise CurvlibError(f"{example} given, expected questions with the answer among their options: use a task split")


def letter_token(tokenizer: PreTrainedTokenizerBase, prompt: str, letter: str) -> int:
    """Return the token that `letter` adds after the opening. Raises CurvlibError if it adds none or several."""
    head, full = render(tokenizer, prompt, OPENING), render(tokenizer, prompt, f"{OPENING} {letter}")
    if full[:-1] != head:
        raise CurvlibError(f"option '{letter}' is not one token after '{OPENING}': take letters that are")
    return full[-1]


def next_token_logits(model: Model, rows: Sequence[list[int]], tokens: list[int], batch_size: int) -> Tensor:
    """Return the logits (rows, tokens) of the given `tokens` after each row of token ids, in the order of the rows."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    result = torch.empty(len(rows), len(tokens))
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            ids, mask = left_pad([rows[index] for index in chosen], 0, model.device)  # any id: padding is masked
            given = read_beginning(model, ids, mask, int(mask.sum(dim=1).min()) - 1)
            logits = model(**given, logits_to_keep=1).logits
            result[chosen] = logits[:, -1, tokens].float().cpu()
    return result


def compare(examples: Sequence[Row], scores: Sequence[Sequence[float]]) -> Choices:
    """Return the choices of the highest `scores`, one row an example, in the order of its options; first on a tie."""
    chosen = [
        max(zip(row, lettered(example), strict=True), key=lambda pair: pair[0])[1]
        for example, row in zip(examples, scores, strict=True)
    ]
    correct = [letter == example["answer"] for letter, example in zip(chosen, examples, strict=True)]
    return Choices(rate(correct), tuple(chosen), tuple(correct))
