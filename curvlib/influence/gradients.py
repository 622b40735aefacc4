r"""The gradient of every single chat, from one backward pass a batch, in memory or on disk.

See :mod:`curvlib.curvature.lowrank`; no weight of the 4-bit base is kept (see :mod:`curvlib.nf4`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from curvlib.batches import IGNORED, Batch, Example, make_batches
from curvlib.curvature.lowrank import chat_gradients
from curvlib.errors import CurvlibError
from curvlib.parameters import trainable
from curvlib.progress import bar

BATCH_SIZE = 8
ANSWER_STEP = 16  # answers whose lengths differ by less share a batch: finer, the chats' own lengths would differ more
Shard = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Gradients:
    """The gradients of ``count`` chats over ``size`` parameters, in shards: (chat numbers (k,), rows (k, size)) each.

    A shard is held in memory, or is a safetensors file that is read when its turn comes.
    """

    count: int
    size: int
    shards: tuple[Shard | Path, ...]

    def __iter__(self) -> Iterator[Shard]:
        """Yield chat numbers and rows, the rows in float32 at least."""
        for shard in self.shards:
            index, rows = _read(shard, self.size) if isinstance(shard, Path) else shard
            yield index, rows.float() if rows.dtype == torch.bfloat16 else rows

    def dot(self, vectors: Tensor) -> Tensor:
        """Return the inner products (m, count) with vectors (m, size).

        Raises:
            CurvlibError: the vectors have another length.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.size:
            raise CurvlibError(
                f"vectors of shape {tuple(vectors.shape)} were given, expected (m, {self.size}): take the gradients "
                "of queries and of training chats over the same parameters"
            )
        result = vectors.new_zeros(len(vectors), self.count)
        for index, rows in self:
            result[:, index.to(result.device)] = vectors @ rows.to(vectors).T
        return result

    def norms(self) -> Tensor:
        """Return the length of each chat's gradient, (count,)."""
        result = torch.zeros(self.count)
        for index, rows in self:
            result[index] = rows.norm(dim=1).float().cpu()
        return result

    def rows(self) -> Tensor:
        """Return all gradients as one matrix (count, size)."""
        found = list(self)
        return torch.cat([rows for _, rows in found])[torch.cat([index for index, _ in found]).argsort()]


def example_gradients(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    own_mean: bool = False,
    folder: Path | None = None,
    batch_size: int = BATCH_SIZE,
) -> Gradients:
    r"""Return the gradient of each chat over the model's trainable parameters, which are LoRA's or of linear layers.

    Args:
        model: a causal language model, such as a 4-bit one under a LoRA adapter.
        examples: chats; the order of the rows is theirs.
        own_mean: differentiate each chat's mean loss over its own answer tokens, as for queries. By default the share
            of the chat in the mean loss over all answer tokens, so that the rows add up to the gradient of that loss.
        folder: write each batch's rows there, in bfloat16 (2 bytes a number, relative error 0.2 %), and keep none in
            memory. Files of an interrupted run with the same chats and parameters are taken over.
        batch_size: chats a pass.

    Cost: one gradient of all chats; memory n · P numbers without ``folder``, batch_size · P with it.

    Raises:
        CurvlibError: no chat, a chat longer than the model's context, no trainable parameter, or one that is not the
            weight of a linear layer.
    """
    check_examples(model, examples, "training chats" if not own_mean else "query chats")
    size = sum(parameter.numel() for parameter in trainable(model).values())
    total = sum(example.tokens for example in examples)
    shards: list[Shard | Path] = []
    parts, same = list(in_batches(examples, batch_size)), _digest(model, examples, own_mean) if folder else ""
    for number, (index, batch) in enumerate(bar(parts, desc="gradients")):
        file = folder / f"gradients-{same}-{batch_size}-{number:04}.safetensors" if folder else None
        if file is None or not file.exists():
            rows = chat_gradients(model, batch)
            rows /= batch.labels.ne(IGNORED).sum(1, keepdim=True).to(rows) if own_mean else total
            shard = torch.tensor(index), rows
            if file:
                _write(file, shard)
        shards.append(file or shard)
    return Gradients(len(examples), size, tuple(shards))


def query_gradients(model: nn.Module, examples: Sequence[Example], *, batch_size: int = BATCH_SIZE) -> Tensor:
    """Return the gradient of each query chat's mean loss, (m, P), in memory."""
    return example_gradients(model, examples, own_mean=True, batch_size=batch_size).rows()


def in_batches(examples: Sequence[Example], size: int) -> Iterator[tuple[list[int], Batch]]:
    """Yield batches of chats with answers of like length, then of like length, each with the numbers of its chats.

    The head reads as many positions of every chat as the longest answer of its batch has tokens.
    """
    lengths = [len(example.input_ids) for example in examples]
    answers = [(example.tokens - 1) // ANSWER_STEP for example in examples]
    order = sorted(range(len(examples)), key=lambda number: (answers[number], lengths[number]))
    for start in range(0, len(order), size):
        index = sorted(order[start : start + size], key=lengths.__getitem__)  # the order that a batch puts them in
        yield index, make_batches([examples[number] for number in index], size, pad_id=0)[0]  # padding is masked


def check_examples(model: nn.Module, examples: Sequence[Example], what: str) -> None:
    """Refuse an empty set, and a chat that is longer than the model's context."""
    if not examples:
        raise CurvlibError(f"no {what} were given, expected at least one: a mean over none is not defined")
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    longest = max(range(len(examples)), key=lambda number: len(examples[number].input_ids))
    length = len(examples[longest].input_ids)
    if limit is not None and length > limit:
        raise CurvlibError(
            f"number {longest} of the {what} has {length} tokens, more than the model's context of {limit}: "
            "encode it with a smaller max_length"
        )


def _digest(model: nn.Module, examples: Sequence[Example], own_mean: bool) -> str:
    """Return 12 hexadecimal digits that stand for what a file of gradients hangs on: chats, scale and parameters."""
    found = hashlib.sha256(repr((examples, own_mean)).encode())
    for parameter in trainable(model).values():
        found.update(parameter.detach().float().cpu().numpy().tobytes())
    return found.hexdigest()[:12]


def _write(file: Path, shard: Shard) -> None:
    temporary = file.with_suffix(".tmp")
    save_file({"index": shard[0], "rows": shard[1].to(torch.bfloat16).contiguous()}, temporary)
    temporary.replace(file)


def _read(file: Path, size: int) -> Shard:
    try:
        tensors = load_file(file)
        index, rows = tensors["index"], tensors["rows"]
    except (OSError, SafetensorError, KeyError) as error:
        raise CurvlibError(
            f"{file} holds no gradients that can be read ({error!r}): remove it and run again"
        ) from error
    if rows.shape != (len(index), size):
        raise CurvlibError(f"{file} holds rows of shape {tuple(rows.shape)}, expected (k, {size}): remove it")
    return index, rows
