"""DARE: what is kept is rescaled, the mean over masks is the step, and merging has its ends."""

from __future__ import annotations

import torch

from curvlib.defenses.dare import dare, drop_and_rescale
from curvlib.defenses.method import Setting
from tests import cases
from tests.defenses.tiny import aligned, logits, tiny  # noqa: F401  a fixture


def test_an_entry_is_zero_or_rescaled_and_the_mean_is_the_step() -> None:
    delta, generator, draws = cases.random(5, 4), torch.Generator().manual_seed(0), 4000
    found = torch.stack([drop_and_rescale(delta, 0.75, generator) for _ in range(draws)])
    assert (torch.isclose(found, 4 * delta) | (found == 0)).all()
    error = delta.abs() * (0.75 / 0.25 / draws) ** 0.5  # standard error: p/(1 - p) is the variance of a kept unit
    assert ((found.mean(0) - delta).abs() < 4.5 * error).all()
    assert abs(float((found == 0).double().mean()) - 0.75) < 0.01


def test_nothing_dropped_is_the_linear_merge(tiny: Setting) -> None:  # noqa: F811
    whole, none = dare(tiny, drop=0.0, share=1.0).model, dare(tiny, drop=0.5, share=0.0).model
    torch.testing.assert_close(logits(whole), logits(cases.nf4_llama()), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits(none), logits(aligned()), atol=1e-6, rtol=0)


def test_a_seed_fixes_the_mask(tiny: Setting) -> None:  # noqa: F811
    first, again = (logits(dare(tiny, 0.5, 0.6).model) for _ in range(2))
    assert torch.equal(first, again)
    assert (first - logits(cases.nf4_llama())).abs().max() > 1e-3
