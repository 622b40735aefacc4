"""A model in bfloat16, as one may load it on a GPU: the lines that mix it with float32 run, and are near."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from curvlib import nf4
from curvlib.batches import answer_loss, chat_losses
from curvlib.curvature.damping import price
from curvlib.curvature.forward import flat_gradient
from curvlib.curvature.ggn import ggn
from curvlib.curvature.hessian import hessian
from curvlib.curvature.kfac import ekfac
from curvlib.curvature.lowrank import chat_gradients
from curvlib.landscape.directions import adapter_direction, moved, random_like
from curvlib.parameters import tensor_list, trainable
from tests import cases

BATCHES = cases.batches(3)
SIZE = sum(parameter.numel() for parameter in trainable(cases.pair()[0]).values())
V = cases.random(SIZE, dtype=torch.float32)


def in_bfloat16(device: str) -> Any:
    """The tiny 4-bit model with all but its adapter in bfloat16."""
    model = cases.nf4_llama(device=device)
    for name, parameter in model.named_parameters():
        if "lora_" not in name and parameter.is_floating_point():
            parameter.data = parameter.data.bfloat16()
    for layer in nf4.four_bit_layers(model).values():
        layer.compute_dtype = layer.weight.quant_state.dtype = torch.bfloat16
    return model


def step_away(model: Any) -> Tensor:
    step = adapter_direction(model)
    with torch.no_grad(), moved(model, [(random_like(step, seed=0), 1.0)]):
        return chat_losses(model, BATCHES[0])


def curvature(model: Any) -> Tensor:
    fitted = ekfac(model, BATCHES, rank=4)
    return torch.tensor(
        [fitted.damping_scale, float(fitted.inverse(fitted.damping_scale).matvec(V.to(model.device)).norm())]
    )


WORK: dict[str, Callable[[Any], Tensor]] = {
    "gradient": lambda model: flat_gradient(answer_loss(model, BATCHES[0]), tensor_list(trainable(model))),
    "gradients of chats": lambda model: chat_gradients(model, BATCHES[0]),
    "Hessian": lambda model: hessian(model, BATCHES, check=False).matvec(V.to(model.device)),
    "Gauss-Newton": lambda model: ggn(model, BATCHES, check=False).matvec(V.to(model.device)),
    "EK-FAC": curvature,
    "step": step_away,
    "price": lambda model: torch.tensor(price(model, 0.02 * V.to(model.device), BATCHES)),
}


@pytest.mark.parametrize("name", WORK)
def test_a_bfloat16_model_is_near_the_float32_one_and_is_not_it(name: str, device: str) -> None:
    exact, rounded = WORK[name](cases.pair(device)[0]), WORK[name](in_bfloat16(device))
    assert exact.dtype == rounded.dtype == torch.float32
    assert 0 < cases.relative_error(rounded, exact) < 0.3
