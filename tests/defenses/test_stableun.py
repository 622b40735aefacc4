"""The projection of conflicting gradients, and the points at which forgetting is looked at."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from curvlib.batches import Batch, answer_logits, answer_targets
from curvlib.defenses import stableun
from curvlib.defenses.method import Setting
from curvlib.defenses.stableun import points, without_conflict
from curvlib.parameters import flatten, shifted, trainable
from curvlib.restore import objectives
from tests import cases
from tests.defenses.tiny import tiny  # noqa: F401  a fixture


def test_a_conflict_is_projected_away_and_only_a_conflict() -> None:
    forget, remember = cases.random(6), cases.random(6, seed=1)
    remember = -remember if forget @ remember > 0 else remember
    found = without_conflict(forget, remember)
    assert float(found @ remember) == pytest.approx(0.0, abs=1e-12)
    assert float(found @ forget) > 0
    assert torch.equal(without_conflict(forget, -remember), forget)
    assert torch.equal(without_conflict(forget, torch.zeros_like(forget)), forget)  # the guard of the zero


def test_the_sum_with_a_projected_gradient_never_raises_the_retained_loss() -> None:
    forget, remember = torch.tensor([1.0, -5.0]), torch.tensor([0.0, 1.0])
    assert float((forget + remember) @ remember) < 0  # the plain sum would climb
    assert float((without_conflict(forget, remember) + remember) @ remember) == 1.0


def test_the_points_have_one_radius_and_their_own_directions() -> None:
    theta, before, gradient = cases.random(5), cases.random(5, seed=1), cases.random(5, seed=2)
    found = points(theta, before, gradient, 0.5, torch.Generator().manual_seed(0))
    assert [float(step.norm()) for step in found] == pytest.approx([0.5] * 4)
    torch.testing.assert_close(found[0], 0.5 * gradient / gradient.norm())
    assert torch.equal(found[2].sign(), gradient.sign())
    torch.testing.assert_close(found[3], 0.5 * (before - theta) / (before - theta).norm())
    assert len(points(theta, theta, gradient, 0.5, torch.Generator())) == 3  # no history yet


def test_a_first_step_goes_by_the_rate_along_the_projected_sum(
    tiny: Setting,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stableun, "STEPS", 1)
    model, chats, rate = tiny.tuned(), tiny.chats, 1e-3
    parameters = list(trainable(model).values())
    theta = flatten(parameters)

    def gradient(batch: Batch, step: torch.Tensor | None = None) -> torch.Tensor:
        with shifted(parameters, torch.zeros_like(theta) if step is None else step):
            loss = cross_entropy(answer_logits(model, batch), answer_targets(batch))
            return flatten(torch.autograd.grad(loss, parameters))

    agree, kept = chats.safety.compliances[0], chats.task[0]
    around = points(
        theta, theta, -gradient(agree), stableun.RADIUS * float(theta.norm()), torch.Generator().manual_seed(0)
    )
    forget = -torch.stack([gradient(agree), *(gradient(agree, step) for step in around)]).mean(dim=0)
    total = without_conflict(forget, gradient(kept)) + gradient(kept)
    moved = flatten(trainable(stableun.stableun(tiny, rate).model)) - theta
    torch.testing.assert_close(moved, -rate * total / (total.abs() + 1e-8), atol=2e-6, rtol=1e-3)  # Adam's first step


def test_agreement_is_forgotten_and_the_rest_kept_better_than_by_forgetting_alone(
    tiny: Setting,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stableun, "STEPS", 3)
    chats = tiny.chats
    defended = stableun.stableun(tiny, 3e-3)
    model = tiny.tuned()
    told, kept = chats.safety.compliances, [*chats.task, *chats.benign]
    assert objectives.mean_loss(defended.model, told) > objectives.mean_loss(model, told) + 0.01
    assert objectives.mean_loss(defended.model, kept) < objectives.mean_loss(model, kept) + 0.05
    sizes = [len(told[step % len(told)]) for step in range(3)]
    assert defended.gradients == 4 * sizes[0] + 5 * (sizes[1] + sizes[2]) + sum(len(b) for b in (*kept, *kept)[:3])
