r"""Influence, and the gradient of every single chat behind it, from one backward pass a batch.

See :mod:`curvlib.curvature.lowrank`; no weight of the 4-bit base is kept (see :mod:`curvlib.nf4`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from curvlib.batches import Batch, Example, make_batches
from curvlib.curvature.lowrank import chat_gradients
from curvlib.errors import CurvlibError
from curvlib.parameters import trainable
from curvlib.progress import bar

BATCH_SIZE = 8
ANSWER_STEP = 16  # answers whose lengths differ by less share a batch: finer, the chats' own lengths would differ more


def influence(
    model: nn.Module, examples: Sequence[Example], queries: Sequence[Example], solve: Callable[[Tensor], Tensor]
) -> Tensor:
    r"""Return each chat's influence on each query, :math:`-\nabla f_q^\top (C + \lambda I)^{-1} \nabla r_i`, (m, n).

    Sign and unit are those of :mod:`curvlib.influence`: positive where training on the chat raised the query's mean
    loss f over its answer tokens.

    Args:
        model: at the parameters where influence is asked; the trainable ones are LoRA's or weights of linear layers.
        examples: the n training chats.
        queries: the m query chats.
        solve: the damped inverse as a function of one vector (P,), see :meth:`curvlib.curvature.inverse.Fit.inverse`.

    Cost: one gradient of all chats and queries, and m solves, since the queries are fewer; memory 2m × P numbers.

    Raises:
        CurvlibError: no chat, a chat longer than the model's context, no trainable parameter, or one that is not the
            weight of a linear layer.
    """
    solutions = torch.stack([solve(query) for query in query_gradients(model, queries)])
    return -inner_products(model, examples, solutions)


def query_gradients(model: nn.Module, examples: Sequence[Example], *, batch_size: int = BATCH_SIZE) -> Tensor:
    """Return the gradient of each chat's mean loss over its own answer tokens, (m, P), in the order given.

    Cost: one gradient of all chats. Errors as above.
    """
    check_examples(model, examples, "query chats")
    parameters = list(trainable(model).values())
    rows = parameters[0].new_empty(len(examples), sum(parameter.numel() for parameter in parameters))
    for index, batch in bar(list(in_batches(examples, batch_size)), desc="gradients"):
        rows[index] = chat_gradients(model, batch)
    return rows.div_(torch.tensor([[example.tokens] for example in examples]).to(rows))


def inner_products(
    model: nn.Module, examples: Sequence[Example], vectors: Tensor, *, batch_size: int = BATCH_SIZE
) -> Tensor:
    r"""Return the inner products (k, n) of vectors (k, P) with :math:`\nabla r_i`, the gradients of the chats' shares.

    Cost: one gradient of all chats; memory ``batch_size`` rows. No gradient is stored.

    Raises:
        CurvlibError: as above, or the vectors have another length.
    """
    check_examples(model, examples, "training chats")
    size = sum(parameter.numel() for parameter in trainable(model).values())
    if vectors.ndim != 2 or vectors.shape[1] != size:
        raise CurvlibError(
            f"vectors of shape {tuple(vectors.shape)} were given, expected (k, {size}): take the gradients of queries "
            "and of training chats over the same parameters"
        )
    products, total = vectors.new_zeros(len(vectors), len(examples)), sum(example.tokens for example in examples)
    for index, batch in bar(list(in_batches(examples, batch_size)), desc="gradients"):
        products[:, index] = vectors @ chat_gradients(model, batch).to(vectors).T / total
    return products


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
