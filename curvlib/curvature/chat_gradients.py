r"""The gradient of every single chat over linear layers' parameters, from one backward pass a batch.

A linear map :math:`z_t = W a_t` contributes :math:`\sum_t g_t a_t^\top` to the gradient of one chat, with :math:`g_t`
the gradient at its output. Hooks collect a and g, and one product a map gives the gradients of all chats of a batch.
Source: Goodfellow 2015, "Efficient per-example gradient computations", arXiv 1510.01799.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from curvlib.batches import Batch
from curvlib.curvature.kfac import Fisher, chat_products, flat_places, linear_maps, trains_bias, visit_maps
from curvlib.parameters import trainable


def chat_gradients(
    model: nn.Module,
    batch: Batch,
    *,
    fisher: Fisher = "empirical",
    labels: torch.Generator | None = None,
    draws: int = 1,
) -> Tensor:
    """Return the gradient of each chat's loss, summed over its answer tokens, in float32 at least: (draws × B, P).

    Args:
        model: a causal language model whose trainable parameters are LoRA's, or those of linear layers.
        batch: chats.
        fisher: ``empirical`` differentiates the given answers, ``sampled`` answers drawn from the model's predictions.
        labels: draws them.
        draws: sets of labels, one after the other in the rows; they share the forward pass.

    Cost: one gradient of the batch, and a backward pass for each further draw; memory draws × B × P numbers.

    Raises:
        CurvlibError: a trainable parameter is not the weight or bias of one linear map, or takes no part in the loss.
    """
    maps, places = linear_maps(model), flat_places(model)
    parameters = trainable(model).values()
    first = next(iter(parameters))
    size = sum(parameter.numel() for parameter in parameters)
    wide = torch.promote_types(first.dtype, torch.float32)
    rows = torch.zeros(draws, len(batch), size, device=first.device, dtype=wide)
    done: Counter[str] = Counter()

    def visit(name: str, a: Tensor, g: Tensor, _: Tensor) -> None:
        layer = maps[name]
        found = chat_products(layer, a, g)
        pieces = [(layer.weight, found[..., : layer.in_features])]
        if trains_bias(layer):
            pieces.append((layer.bias, found[..., -1]))
        for parameter, piece in pieces:
            start = places[id(parameter)]
            rows[done[name], :, start : start + parameter.numel()] = piece.flatten(1)
        done[name] += 1

    visit_maps(model, batch, maps, visit, fisher, labels or torch.Generator(first.device), draws)
    return rows.flatten(0, 1)
