"""A tiny aligned model in place of the real stage."""

from __future__ import annotations

from typing import Any

import torch

from curvlib import nf4
from tests import cases


def aligned(noise: float = 0.0) -> Any:
    """The tiny model in NF4; with noise a full fine-tune of it."""
    model = cases.llama()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter += noise * cases.random(*parameter.shape, seed=number).float()
    model.requires_grad_(False)
    cases.quantise(model)
    nf4.install(model)
    return model
