"""Panacea's update on two quadratics, and its one step in the training loop against plain autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from curvlib.batches import answer_loss, make_batches
from curvlib.defenses.method import Setting
from curvlib.defenses.panacea import panacea, perturbation, update
from curvlib.parameters import assign, flatten, shifted, trainable
from curvlib.restore import objectives
from tests.defenses.tiny import TRAINING, tiny  # noqa: F401  a fixture


def test_one_step_on_quadratics_by_hand() -> None:
    # g = ½‖w‖², h = ½·2‖w‖²: at w = (3, 4), ∇g = w, ∇h = 2w, ε = ρ w/5, ∇h(w + ε) - ∇h(w) = 2ε
    w, rho, strength = torch.tensor([3.0, 4.0]), 0.5, 0.1
    epsilon = perturbation(2 * w, rho)
    torch.testing.assert_close(epsilon, torch.tensor([0.3, 0.4]))
    bracket = update(w, 2 * w, 2 * (w + epsilon), strength)
    torch.testing.assert_close(bracket, torch.tensor([3 - 0.06, 4 - 0.08]))


def test_a_flat_harmful_loss_perturbs_nothing() -> None:
    assert torch.equal(perturbation(torch.zeros(3), 1.0), torch.zeros(3))


@pytest.mark.parametrize(("rho", "strength"), [(0.5, 0.2), (0.0, 0.0)])
def test_one_step_of_training_by_hand(
    tiny: Setting,  # noqa: F811
    rho: float,
    strength: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = replace(TRAINING, steps=1, batch_size=4)
    monkeypatch.setattr(Setting, "training", one)
    monkeypatch.setattr(objectives, "COMPLIANCE_BOUND", 50.0)  # the tiny model's losses lie near 5
    compliances = tiny.chats.safety.compliances
    defended = panacea(tiny, rho, strength)
    model = tiny.start()
    parameters = list(trainable(model).values())

    def slope(batches: list) -> torch.Tensor:  # type: ignore[type-arg]
        tokens = sum(batch.tokens for batch in batches)
        return sum(  # type: ignore[return-value]
            flatten(torch.autograd.grad(answer_loss(model, batch), parameters)) * (batch.tokens / tokens)
            for batch in batches
        )

    task = slope(make_batches(tiny.examples(), 4, 0))
    harm = slope([compliances[0]])
    with shifted(parameters, rho * harm / harm.norm()):
        there = slope([compliances[0]])
    bent = task - strength * (there - harm)
    bent *= min(1.0, 1.0 / float(bent.norm()))
    assign(parameters, flatten(parameters) - one.rate(0) * bent / (bent.abs() + 1e-8))  # Adam's first step
    whole = slope([*compliances])
    assign(parameters, flatten(parameters) + rho * whole / whole.norm())
    moved = bent.abs() > 1e-5  # below, float32 rounding decides Adam's sign
    found = flatten(trainable(defended.model))
    torch.testing.assert_close(found[moved], flatten(parameters)[moved], atol=2e-4, rtol=1e-3)
    assert defended.gradients == 4 + 2 * len(compliances[0]) + sum(map(len, compliances))
