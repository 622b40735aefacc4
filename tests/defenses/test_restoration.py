"""What is reused from the restoration: the right reading, the right chats, and honest counting."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from curvlib.batches import answer_logits, answer_targets
from curvlib.defenses import restoration
from curvlib.defenses.method import Setting
from curvlib.parameters import flatten, trainable
from curvlib.restore.outcome import Budget
from curvlib.restore.recipe import Restoration, run
from tests import cases
from tests.defenses.tiny import tiny  # noqa: F401  a fixture


def test_ours_is_the_restoration_of_the_lesson(tiny: Setting) -> None:  # noqa: F811
    found = restoration.restoration(tiny, "refusal")
    model = cases.nf4_llama()
    result = run(model, tiny.chats, Restoration("refusal"), seed=0)
    torch.testing.assert_close(flatten(trainable(found.model)), flatten(trainable(model)))
    assert found.gradients == result.gradients > 0


def test_a_product_counts_as_two_gradients_of_all_protected_chats(tiny: Setting) -> None:  # noqa: F811
    result: Any = SimpleNamespace(gradients=5, products=3)
    assert restoration.spent(result, tiny) == 5 + 2 * 3 * 6


def test_realignment_is_one_run_whatever_it_costs_the_task(tiny: Setting) -> None:  # noqa: F811
    found = restoration.realignment(tiny, rate=1e-2, steps=3)
    assert found.gradients == 3 * tiny.training.batch_size
    assert not torch.equal(flatten(trainable(found.model)), flatten(trainable(tiny.tuned())))


def test_ascent_steps_along_the_gradient_by_the_allowance_or_a_half_of_it(tiny: Setting) -> None:  # noqa: F811
    model, told = tiny.tuned(), tiny.chats.safety.compliances
    parameters = list(trainable(model).values())
    losses = [cross_entropy(answer_logits(model, b), answer_targets(b), reduction="sum") for b in told]
    tokens = sum(batch.tokens for batch in told)
    gradient = flatten(torch.autograd.grad(torch.stack(losses).sum() / tokens, parameters))
    moved = flatten(trainable(restoration.ascent(tiny, rise=9.0, steps=1).model)) - flatten(parameters)
    assert float(torch.cosine_similarity(moved, gradient, dim=0)) == pytest.approx(1.0, abs=1e-4)
    halvings = -math.log2(float(moved.norm()) / (2 * Budget().trust) ** 0.5)
    assert halvings == pytest.approx(round(halvings), abs=1e-3)
    assert 0 <= round(halvings) <= Budget().halvings


def test_ascent_is_plain_gradient_in_the_identity_metric(tiny: Setting, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    seen: list[Restoration] = []
    monkeypatch.setattr(restoration, "run", lambda *given, **_: seen.append(given[2]))
    monkeypatch.setattr(restoration, "spent", lambda *_: 0)
    restoration.ascent(tiny, rise=0.3)
    assert (seen[0].objective, seen[0].metric, seen[0].budget.rise) == ("ascent", "identity", 0.3)
