"""Measure usefulness: multiple-choice accuracy by likelihood, with or without solved examples before the question.

Questions are `curvlib.data.Example` rows with options. `sentence_accuracy` scores whole answers in the form the task is
trained in; `letter_accuracy` compares the letters alone after a common opening, at a third of the cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from curvlib.batches import Chat, encode
from curvlib.data import Example, task_answer, task_question
from curvlib.errors import CurvlibError
from curvlib.evaluate.likelihood import token_losses
from curvlib.evaluate.stats import Estimate, rate
from curvlib.generate import Model, evaluating, left_pad, render
from curvlib.prefix import read_beginning

OPENING = "The answer is"  # how `task_answer` begins: the letter comes next


@dataclass(frozen=True)
class Choices:
    """Accuracy with its Wilson interval; the option chosen and whether it was right, in question order (to pair)."""

    accuracy: Estimate
    chosen: tuple[str, ...]
    correct: tuple[bool, ...]


def question_turns(example: Example, shots: Sequence[Example] = ()) -> Chat:
    """Return the question as a user's message, after each of `shots` as a solved question and answer."""
    solved = [
        {"role": role, "content": content}
        for shot in shots
        for role, content in (("user", task_question(shot)), ("assistant", task_answer(shot)))
    ]
    return [*solved, {"role": "user", "content": task_question(example)}]


def sentence_accuracy(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    shots: Sequence[Example] = (),
    batch_size: int = 32,
    max_length: int = 2048,
) -> Choices:
    """Choose for each question the option whose answer sentence has the highest mean log-likelihood per token.

    The mean (end token included) does not favour short options. All (question, option) pairs are scored in one pass,
    batched by length. Raises CurvlibError if an example has no options or its answer is none of them.
    """
    check_options(examples)
    chats = [
        [
            *question_turns(example, shots),
            {"role": "assistant", "content": task_answer(replace(example, answer=letter))},
        ]
        for example in examples
        for letter in example.options
    ]
    losses = iter(token_losses(model, encode(tokenizer, chats, max_length), batch_size))
    scores = [[-float(loss.mean()) for loss in islice(losses, len(example.options))] for example in examples]
    return compare(examples, scores)


def letter_accuracy(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    shots: Sequence[Example] = (),
    batch_size: int = 32,
) -> Choices:
    """Choose for each question the letter with the highest next-token logit after "The answer is".

    One forward pass a question. Raises CurvlibError as `sentence_accuracy`, and if a letter is not one token.
    """
    check_options(examples)
    prompts = [question_turns(example, shots) for example in examples]
    heads = [render(tokenizer, prompt, OPENING) for prompt in prompts]
    tokens = {letter: letter_token(tokenizer, prompts[0], letter) for example in examples for letter in example.options}
    logits = next_token_logits(model, heads, list(tokens.values()), batch_size)
    column = {letter: index for index, letter in enumerate(tokens)}
    rows = zip(examples, logits.tolist(), strict=True)
    return compare(examples, [[row[column[letter]] for letter in example.options] for example, row in rows])


def check_options(examples: Sequence[Example]) -> None:
    """Raise CurvlibError unless there are questions, each with its answer among its options."""
    wrong = [example.id for example in examples if example.answer not in example.options]
    if wrong or not examples:
        example = wrong[0] if wrong else "an empty list"
        raise CurvlibError(f"{example} given, expected questions with the answer among their options: use a task split")


def letter_token(tokenizer: PreTrainedTokenizerBase, prompt: Chat, letter: str) -> int:
    """Return the token that `letter` adds after the opening. Raises CurvlibError if it adds none or several."""
    head, full = render(tokenizer, prompt, OPENING), render(tokenizer, prompt, f"{OPENING} {letter}")
    if full[:-1] != head:
        raise CurvlibError(f"option '{letter}' is not one token after '{OPENING}' here: use sentence_accuracy instead")
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


def compare(examples: Sequence[Example], scores: Sequence[Sequence[float]]) -> Choices:
    """Return the choices of the highest `scores`, one row an example, in the order of its options; first on a tie."""
    chosen = [
        max(zip(row, example.options, strict=True), key=lambda pair: pair[0])[1]
        for example, row in zip(examples, scores, strict=True)
    ]
    correct = [letter == example.answer for letter, example in zip(chosen, examples, strict=True)]
    return Choices(rate(correct), tuple(chosen), tuple(correct))
