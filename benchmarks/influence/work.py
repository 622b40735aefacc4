r"""What every package is asked, and the unit of its answer.

All get the same chats, the same chats to estimate the curvature from and the same damping λ, and are called as their
documentation shows. All return what :mod:`curvlib.influence` defines, (m, n), positive where training on the chat
raised the query's mean loss:

.. math:: I_{qi} = -\nabla f_q^\top (C + \lambda I)^{-1} \nabla \ell_i / N,

with :math:`\ell_i` the summed loss of chat i, N the answer tokens of all chats, and C the curvature of the mean over
the :math:`N_s` answer tokens of :math:`n_s` chats. The peers' curvature is a mean over chats, :math:`(N_s / n_s)\,C`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from curvlib.batches import IGNORED, Batch, Example, answer_logits, answer_targets, at_least_float32, make_batches


@dataclass(frozen=True)
class Work:
    """What is asked of every contestant.

    Attributes:
        examples: the n training chats.
        queries: the m chats whose mean losses are asked about.
        seen: the chats that the curvature is estimated from.
        damping: λ, in the unit of the curvature of the mean loss over answer tokens.
        folder: for what a package writes to disk.
    """

    examples: list[Example]
    queries: list[Example]
    seen: list[Example]
    damping: float
    folder: Path

    @property
    def chat_tokens(self) -> float:
        """Mean answer tokens of a chat that the curvature is estimated from: a peer's curvature over ours."""
        return sum(example.tokens for example in self.seen) / len(self.seen)

    @property
    def peer_damping(self) -> float:
        """λ in the unit of a peer's curvature."""
        return self.damping * self.chat_tokens

    def from_peer(self, scores: Tensor) -> Tensor:
        """Return a peer's inner products (m, n), of queries' and chats' summed losses, as influences."""
        return -scores.float().cpu() * self.chat_tokens / sum(example.tokens for example in self.examples)


Score = Callable[[nn.Module, Work], Tensor]  # a model that it may change, and what is asked, to influences (m, n)


def by_length(chats: Sequence[Example]) -> tuple[list[Example], Tensor]:
    """Return the chats from short to long, and the place (n,) of each given chat in that order."""
    order = sorted(range(len(chats)), key=lambda number: len(chats[number].input_ids))
    return [chats[number] for number in order], torch.tensor(order).argsort()


def answer_losses(model: nn.Module, batch: Batch, *, sample: bool = False) -> Tensor:
    """Return each chat's loss summed over its answer tokens, (B,); with ``sample`` of answers drawn from the model."""
    logits = at_least_float32(answer_logits(model, batch, once=False))
    targets = answer_targets(batch).to(logits.device)
    if sample:
        targets = torch.multinomial(logits.detach().softmax(dim=-1), 1)[:, 0]
    owners = (batch.labels != IGNORED).nonzero()[:, 0].to(logits.device)
    losses = cross_entropy(logits, targets, reduction="none")
    return losses.new_zeros(len(batch)).index_add(0, owners, losses)


def left_padded(chats: list[Example]) -> dict[str, Tensor]:
    """Return chats in ascending length as the fields of one batch, in the order given."""
    return vars(make_batches(chats, len(chats), pad_id=0)[0])


def right_padded(chats: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Return tokens and labels (B, T), padded on the right: a causal model needs no mask then, which vmap refuses."""
    rows = [torch.tensor([chat.input_ids, chat.labels]).T for chat in chats]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)
    ids, labels = padded.unbind(dim=-1)
    return ids.clamp(min=0), labels
