"""What is reused from the restoration: the right reading, the right chats, and honest counting."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from curvlib.batches import answer_logits, answer_targets, taken_apart
from curvlib.curvature.damping import price
from curvlib.defenses import restoration
from curvlib.defenses.method import Setting
from curvlib.finetune import train
from curvlib.parameters import flatten, trainable
from curvlib.restore.recipe import Restoration, run
from tests import cases
from tests.defenses.tiny import tiny  # noqa: F401  a fixture


def test_ours_is_the_restoration_of_the_lesson(tiny: Setting) -> None:  # noqa: F811
    found = restoration.restoration(tiny)
    model = cases.nf4_llama()
    result = run(model, tiny.chats, Restoration(), seed=0)
    assert not torch.equal(result.after, result.before)
    torch.testing.assert_close(flatten(trainable(found.model)), flatten(trainable(model)))
    assert found.gradients == result.gradients > 0


def test_a_product_counts_as_two_gradients_of_all_protected_chats(
    tiny: Setting,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(restoration, "run", lambda *_, **__: SimpleNamespace(gradients=5, products=3))
    assert restoration.restoration(tiny).gradients == 5 + 2 * 3 * 6


def test_realignment_is_one_run_of_fine_tuning_on_the_mixture(tiny: Setting) -> None:  # noqa: F811
    found = restoration.realignment(tiny, rate=1e-2, steps=3)
    assert found.gradients == 3 * tiny.training.batch_size
    twin, chats = tiny.tuned(), tiny.chats
    mixture = taken_apart([*chats.safety.refusals, *chats.safety.refusals, *chats.task, *chats.benign])
    train(twin, mixture, replace(tiny.training, learning_rate=1e-2), pad_id=0)
    torch.testing.assert_close(flatten(trainable(found.model)), flatten(trainable(twin)))


def test_ascent_goes_along_the_gradient_until_the_limit(tiny: Setting) -> None:  # noqa: F811
    model, chats = tiny.tuned(), tiny.chats.safety.compliances
    parameters = list(trainable(model).values())
    losses = [cross_entropy(answer_logits(model, b), answer_targets(b), reduction="sum") for b in chats]
    tokens = sum(batch.tokens for batch in chats)
    gradient = flatten(torch.autograd.grad(torch.stack(losses).sum() / tokens, parameters))
    ways = [flatten(trainable(restoration.ascent(tiny, limit).model)) - flatten(parameters) for limit in (1e-4, 0.0)]
    assert float(torch.cosine_similarity(ways[0], gradient, dim=0)) > 0.99
    paid = [price(model, ways[0], batches) for batches in tiny.chats.held_out.protected.values()]
    assert max(paid) <= 1.01e-4
    assert not ways[1].any()
