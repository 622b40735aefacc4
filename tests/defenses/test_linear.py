"""The straight line between both models: its ends, its middle, and what it does to the effective weights."""

from __future__ import annotations

import pytest
import torch

from curvlib.defenses.linear import linear
from curvlib.defenses.method import Setting
from curvlib.landscape.directions import effective_weight, linear_layers
from tests import cases
from tests.defenses.tiny import aligned, logits, tiny  # noqa: F401  a fixture


def test_the_ends_are_the_two_models(tiny: Setting) -> None:  # noqa: F811
    torch.testing.assert_close(logits(linear(tiny, 0.0).model), logits(aligned()), atol=1e-6, rtol=0)
    assert torch.equal(logits(linear(tiny, 1.0).model), logits(cases.nf4_llama()))


@pytest.mark.parametrize("share", [0.25, 0.6])
def test_weights_lie_on_the_line(tiny: Setting, share: float) -> None:  # noqa: F811
    ends = [linear_layers(model) for model in (aligned(), cases.nf4_llama())]
    for name, layer in linear_layers(linear(tiny, share).model).items():
        base, tuned = (effective_weight(layers[name]) for layers in ends)
        torch.testing.assert_close(effective_weight(layer), (1 - share) * base + share * tuned, atol=1e-6, rtol=1e-5)
