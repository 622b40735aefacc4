"""Chats as batches of tokens in which only the last answer counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from curvlib.errors import CurvlibError
from curvlib.prefix import read_beginning
from curvlib.template import Chat as Chat
from curvlib.template import answer_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that torch's cross-entropy skips
AT_ONCE = 256  # positions of one gradient on a GPU: 3.3 GB at 7B in float32, see benchmarks/gpu
HEAD_ROWS = 32  # with up to three rows a thread, CPU kernels sum over 49,152 words ten times less exactly


@dataclass(frozen=True)
class Example:
    """Tokens of one chat; ``labels`` repeats the answer's tokens and holds -100 before them.

    The last ``closing`` tokens end the answer's turn; they are no part of what it says.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    closing: int = field(default=1, repr=False, compare=False)  # follows from the tokens: stays out of stages' keys

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the answer."""
        return self.labels.count(IGNORED)

    @property
    def tokens(self) -> int:
        """Number of answer tokens."""
        return len(self.labels) - self.prompt_length


@dataclass(frozen=True)
class Batch:
    """Left-padded chats: ``input_ids``, ``attention_mask`` and ``labels``, each (B, T) int64.

    Every answer ends at the right edge; ``labels`` is -100 outside the answer tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @property
    def answer_length(self) -> int:
        """Number of trailing positions that hold every answer token of the batch."""
        columns = (self.labels != IGNORED).any(dim=0).nonzero()
        return self.labels.shape[1] - int(columns[0]) if len(columns) else 0

    @property
    def tokens(self) -> int:
        """Number of answer tokens."""
        return int((self.labels != IGNORED).sum())

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def rows(self, start: int, stop: int) -> Batch:
        """Return the chats start … stop-1, without the padding columns that they do not need."""
        part = replace(self, **{name: value[start:stop] for name, value in vars(self).items()})
        first = int(part.attention_mask.any(dim=0).nonzero()[0])
        return replace(part, **{name: value[:, first:] for name, value in vars(part).items()})

    def parts(self, size: int) -> list[Batch]:
        """Return the batch cut into pieces of at most ``size`` chats."""
        return [self.rows(start, start + size) for start in range(0, len(self), size)]

    def affordable(self, device: torch.device | str) -> list[Batch]:
        """Return the batch whole for a CPU; for a GPU in pieces of at most ``AT_ONCE`` positions, or of one chat."""
        if torch.device(device).type == "cpu":
            return [self]
        return self.parts(max(1, AT_ONCE // self.input_ids.shape[1]))


def encode(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat], max_length: int) -> list[Example]:
    """Tokenise chats through the tokenizer's template; the last message must be the assistant's.

    The answer ends with the template's end-of-turn token, see :func:`curvlib.template.answer_tokens`; what does not fit
    into ``max_length`` tokens is cut off the answer's end.

    Raises:
        CurvlibError: a chat does not end with an answer, its prompt leaves no room for one, or the template does not
            tell which tokens are the answer.
    """
    return [_encode(tokenizer, chat, max_length, number) for number, chat in enumerate(chats)]


def _encode(tokenizer: PreTrainedTokenizerBase, chat: Chat, max_length: int, number: int) -> Example:
    if not chat or chat[-1]["role"] != "assistant":
        raise CurvlibError(f"chat {number} does not end with an assistant message: append the answer to it")
    try:
        ids, first, closing = answer_tokens(tokenizer, chat)
    except CurvlibError as error:
        raise CurvlibError(f"chat {number}: {error}") from error
    cut = max(0, len(ids) - max_length)
    ids = ids[: len(ids) - cut]
    if not 0 < first < len(ids):
        raise CurvlibError(
            f"chat {number} has a prompt of {first} tokens and no answer token within max_length={max_length}: "
            "raise max_length or leave the chat out"
        )
    return Example(tuple(ids), (*[IGNORED] * first, *ids[first:]), max(0, closing - cut))


def open_ended(example: Example, tokens: int | None = None) -> Example:
    """Drop what closes the turn, and what lies beyond the first ``tokens`` of the answer: it is only a beginning."""
    stop = len(example.labels) - example.closing
    stop = stop if tokens is None else min(example.prompt_length + tokens, stop)
    return Example(example.input_ids[:stop], example.labels[:stop], 0)


def make_batches(
    examples: Sequence[Example], batch_size: int, pad_id: int, device: torch.device | str = "cpu"
) -> list[Batch]:
    """Sort examples by length (stable) and pad them on the left into batches of at most ``batch_size``.

    Those that are to be differentiated on a GPU, ``device``, are :meth:`Batch.affordable` there.
    """
    if batch_size < 1 or not examples:
        raise CurvlibError(
            f"{len(examples)} examples in batches of {batch_size}: give at least one example and size one"
        )
    ordered = sorted(examples, key=lambda example: len(example.input_ids))
    groups = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    return [part for group in groups for part in collate(group, pad_id).affordable(device)]


def collate(group: Sequence[Example], pad_id: int) -> Batch:
    """Pad examples on the left into one batch, in the given order."""
    width = max(len(example.input_ids) for example in group)
    pad = [width - len(example.input_ids) for example in group]
    return Batch(
        torch.tensor([[pad_id] * n + list(e.input_ids) for n, e in zip(pad, group, strict=True)]),
        torch.tensor([[0] * n + [1] * (width - n) for n in pad]),
        torch.tensor([[IGNORED] * n + list(e.labels) for n, e in zip(pad, group, strict=True)]),
    )


def spread(examples: Sequence[Example], count: int) -> list[Example]:
    """Return ``count`` chats at even distances over all of them, from the first on, or all if there are no more.

    >>> [example.input_ids[0] for example in spread([Example((n,), (n,)) for n in range(8)], 5)]
    [0, 1, 3, 4, 6]
    """
    count = min(count, len(examples))
    return [examples[number * len(examples) // count] for number in range(count)]


def taken_apart(batches: Iterable[Batch]) -> list[Example]:
    """Return the chats of all batches one by one, without padding."""
    return [_example(batch, row) for batch in batches for row in range(len(batch))]


def _example(batch: Batch, row: int) -> Example:
    kept = batch.attention_mask[row].bool()
    return Example(tuple(batch.input_ids[row][kept].tolist()), tuple(batch.labels[row][kept].tolist()))


def answer_logits(model: nn.Module, batch: Batch, *, once: bool = True) -> Tensor:
    """Return the logits (N, V) that predict each answer token, rows in the order of ``labels[labels != -100]``.

    The head reads the K positions that predict the last K tokens only (K = ``batch.answer_length``, and some more where
    they are few, so that its products are exact). Positions count from each chat's first token, so padding does not
    move them. What all chats begin with is computed once, unless ``once`` is False: for those who watch what each layer
    reads, which is then no position too many.
    """
    batch = batch.to(next(model.parameters()).device)
    length = batch.answer_length
    if not 0 < length < batch.labels.shape[1]:
        raise CurvlibError(
            f"answers span {length} of {batch.labels.shape[1]} positions, expected at least one answer token and a "
            "prompt token before it: make the batch with encode() and make_batches()"
        )
    ids, mask = batch.input_ids, batch.attention_mask
    prompts = mask.sum(dim=1) - (batch.labels != IGNORED).sum(dim=1)
    most = int(prompts.min()) - 1 if once else 0  # a prompt's last token predicts the answer
    given = read_beginning(model, ids, mask, most)
    end = given["input_ids"].shape[1] - 1
    length = max(length, min(end, -(-HEAD_ROWS // len(batch)))) if once else length
    # an index, where a slice would do: its rows lie side by side, so that the head is one matrix product
    logits: Tensor = model(**given, logits_to_keep=torch.arange(end - length, end, device=ids.device)).logits
    answers = batch.labels[:, -length:] != IGNORED
    return logits.flatten(0, 1) if bool(answers.all()) else logits[answers.nonzero(as_tuple=True)]


def answer_targets(batch: Batch) -> Tensor:
    """Return the answer tokens (N,) int64, in the order of :func:`answer_logits`."""
    return batch.labels[batch.labels != IGNORED]


def at_least_float32(values: Tensor) -> Tensor:
    """Widen 16-bit values to float32; leave float32 and float64 as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def answer_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean negative log-likelihood (nats per token) over the batch's answer tokens, a scalar."""
    logits = at_least_float32(answer_logits(model, batch))
    return cross_entropy(logits, answer_targets(batch).to(logits.device))


def chat_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return for each chat the mean negative log-likelihood (nats per token) over its own answer tokens, (B,)."""
    logits = at_least_float32(answer_logits(model, batch))
    answers = (batch.labels != IGNORED).to(logits.device)
    losses = cross_entropy(logits, answer_targets(batch).to(logits.device), reduction="none")
    sums = losses.new_zeros(len(batch)).index_add(0, answers.nonzero()[:, 0], losses)
    return sums / answers.sum(dim=1)
