"""Many short chats as one row of tokens, in which every common beginning is computed once.

A slice evaluates the same few chats at hundreds of points. They share the template's head, and a harmful prompt is
shared by its refusal and its compliance. Their tokens form a prefix tree: each node is one token, sees its ancestors
only, and has its depth as position. One forward pass over the nodes gives every chat the logits it would have alone.
For four harmful prompts with three answers each, two questions and two texts this saves more than half of the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from curvlib.batches import IGNORED, Example, at_least_float32
from curvlib.errors import CurvlibError


@dataclass(frozen=True)
class Pack:
    """The prefix tree of some chats, T nodes with N answer tokens.

    Attributes:
        input_ids: (1, T) int64, parents before their children.
        positions: (1, T) int64, the depth of each node.
        visible: (T, T) bool; row i is true at node i and its ancestors.
        sources: (N,) int64, the node that predicts each answer token.
        targets: (N,) int64, the answer tokens.
        chats: (N,) int64, the chat that each belongs to.
        names: the name of each chat's loss.
    """

    input_ids: Tensor
    positions: Tensor
    visible: Tensor
    sources: Tensor
    targets: Tensor
    chats: Tensor
    names: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Number of answer tokens."""
        return len(self.targets)


def pack(losses: Mapping[str, Sequence[Example]]) -> Pack:
    """Return the chats of several losses, by name, as one prefix tree.

    Raises:
        CurvlibError: there is no chat, or one begins with its answer, so that nothing predicts it.
    """
    nodes: dict[tuple[int, int], int] = {}  # (parent, token) -> node; the parent of a root is -1
    answers: list[tuple[int, int, int]] = []  # source node, token, chat
    chats = [(name, example) for name, examples in losses.items() for example in examples]
    if not chats or any(example.labels[0] != IGNORED for _, example in chats):
        raise CurvlibError(
            f"{len(chats)} chats were given, expected at least one, each with a prompt before its answer"
        )
    for number, (_, example) in enumerate(chats):
        parent = -1
        for token, label in zip(example.input_ids, example.labels, strict=True):
            if label != IGNORED:
                answers.append((parent, label, number))
            parent = nodes.setdefault((parent, token), len(nodes))
    visible = torch.eye(len(nodes), dtype=torch.bool)
    for (parent, _), node in nodes.items():
        if parent >= 0:
            visible[node] |= visible[parent]
    sources, targets, owners = torch.tensor(answers).T
    ids = torch.tensor([[token for _, token in nodes]])
    depth = visible.sum(1)[None] - 1
    return Pack(ids, depth, visible, sources, targets, owners, tuple(name for name, _ in chats))


def copies_logits(model: nn.Module, packed: Pack, copies: int) -> Tensor:
    """Return the logits (copies, N, V) that predict the answer tokens, in the order of ``packed.targets``.

    The copies differ where the model treats them differently, see :func:`curvlib.landscape.directions.moved`. The head
    is applied to the nodes that predict an answer token only. Cost: one forward pass over copies × T tokens.
    """
    weights = next(model.parameters())
    dtype = weights.dtype if weights.is_floating_point() else torch.float32
    hidden = torch.zeros(packed.visible.shape, dtype=dtype).masked_fill(~packed.visible, torch.finfo(dtype).min)
    sources, places = packed.sources.unique(return_inverse=True)
    logits: Tensor = model(
        input_ids=packed.input_ids.to(weights.device).expand(copies, -1),
        attention_mask=hidden[None, None].to(weights.device),
        position_ids=packed.positions.to(weights.device).expand(copies, -1),
        use_cache=False,
        logits_to_keep=sources.to(weights.device),
    ).logits
    return logits[:, places.to(weights.device)]


def pack_logits(model: nn.Module, packed: Pack) -> Tensor:
    """Return the logits (N, V) of one copy, see :func:`copies_logits`."""
    return copies_logits(model, packed, 1)[0]


@torch.no_grad()
def pack_losses(model: nn.Module, packed: Pack, copies: int = 1) -> dict[str, Tensor]:
    """Return name -> each chat's mean negative log-likelihood (nats per token) over its answer, (copies, chats)."""
    logits = at_least_float32(copies_logits(model, packed, copies)).cpu()
    values = cross_entropy(logits.mT, packed.targets.expand(copies, -1), reduction="none")
    count = len(packed.names)
    sums = values.new_zeros(copies, count).index_add(1, packed.chats, values)
    means = sums / packed.chats.bincount(minlength=count)
    return {
        name: means[:, [number for number, owner in enumerate(packed.names) if owner == name]]
        for name in dict.fromkeys(packed.names)
    }
