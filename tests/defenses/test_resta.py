"""RESTA: the twin's step is subtracted, with the share asked for, from the fine-tuned model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from curvlib.batches import taken_apart
from curvlib.defenses.method import Setting
from curvlib.defenses.resta import TWIN_STEPS, resta
from curvlib.landscape.directions import adapter_direction, moved
from tests import cases
from tests.defenses.tiny import logits, tiny  # noqa: F401  a fixture


def test_the_twin_agrees_and_its_step_is_taken_away(tiny: Setting) -> None:  # noqa: F811
    twin, tuned = tiny.start(), cases.nf4_llama()
    config = replace(tiny.training, steps=TWIN_STEPS)
    spent = tiny.train(twin, taken_apart(tiny.chats.safety.compliances), config=config)
    defended = resta(tiny, 0.7)
    with moved(tuned, [(adapter_direction(twin), -0.7)]):
        expected = logits(tuned)
    torch.testing.assert_close(logits(defended.model), expected, atol=1e-5, rtol=1e-4)
    assert defended.gradients == spent == tiny.training.batch_size * TWIN_STEPS


@pytest.mark.parametrize(("drop", "same"), [(0.0, True), (1e-9, True), (0.5, False)])
def test_gamma_zero_leaves_the_fine_tune_or_what_dare_left_of_it(tiny: Setting, drop: float, same: bool) -> None:  # noqa: F811
    found = logits(resta(tiny, 0.0, drop).model)
    assert torch.allclose(found, logits(cases.nf4_llama()), atol=1e-5) == same
