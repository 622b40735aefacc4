r"""Antidote: prune what the fine-tune changed where harmful answers use it most (arXiv 2408.09600).

.. math:: S_{ij} = |\Delta W_{ij}|\,\lVert X_j\rVert_2, \qquad
    \Delta W_{ij} \leftarrow 0 \ \text{ where } S_{ij} \text{ is among the greatest } \alpha \text{ of its row,}

with :math:`X_j` the inputs of feature j over all tokens of harmful requests that are agreed to. The score is Wanda's
(arXiv 2306.11695), compared within each output as there. Only abstract and summaries of the paper were read: one
pruning after the fine-tune, by this score on harmful data. That the step :math:`\Delta W` is pruned and not W itself is
our reading: what is pruned goes back to the aligned model. α is not known here, so it is searched.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from curvlib.batches import Batch, answer_logits
from curvlib.defenses.layers import added, patch
from curvlib.defenses.method import Defended, Method, Setting
from curvlib.landscape.directions import adapted_layers, adapter_direction, multiply_adapter


@torch.no_grad()
def input_norms(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Return adapted layer -> the l2 norm (in,) of each of its inputs over all tokens that are no padding."""
    squares: dict[str, Tensor] = {}
    seen = torch.empty(0)

    def add(name: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        found = inputs[0][seen].float().square().sum(dim=0)
        squares[name] = squares[name] + found if name in squares else found

    handles = [layer.register_forward_pre_hook(partial(add, name)) for name, layer in adapted_layers(model).items()]
    try:
        for batch in batches:
            seen = batch.attention_mask.bool()
            answer_logits(model, batch, once=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: square.sqrt() for name, square in squares.items()}


def pruned(delta: Tensor, norms: Tensor, share: float) -> Tensor:
    """Return a step (out, in) without the ``share`` of each row that scores highest.

    >>> pruned(torch.tensor([[3.0, -2.0], [1.0, 4.0]]), torch.tensor([1.0, 2.0]), 0.5)
    tensor([[3., 0.],
            [1., 0.]])
    """
    top = (delta.abs() * norms).topk(round(share * delta.shape[1]), dim=1).indices
    return delta.scatter(1, top, 0.0)


def antidote(setting: Setting, share: float) -> Defended:
    """Prune the fine-tune's step; cost: a forward pass of the harmful chats, and 4 bytes a weight."""
    model = setting.tuned()
    norms, step = input_norms(model, setting.chats.safety.compliances), adapter_direction(model)
    left = {name: (pruned(step.delta(name), norms[name], share),) for name in step.chains}
    multiply_adapter(model, lambda _: 0.0)
    patch(model, {name: added(chain) for name, chain in left.items()})
    return Defended(model)


ANTIDOTE = Method("Antidote", "after", "2408.09600", antidote, ({"share": 0.2}, {"share": 0.05}, {"share": 0.5}))
