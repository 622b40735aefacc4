"""LoX: the best low-rank part of the alignment, added before training starts."""

from __future__ import annotations

import pytest
import torch

from curvlib.defenses.lox import RANK, lox, top_directions
from curvlib.defenses.method import Setting
from curvlib.landscape.directions import linear_layers
from curvlib.parameters import assign, trainable
from tests import cases
from tests.defenses.tiny import aligned, alignment, logits, tiny  # noqa: F401  a fixture


def test_the_product_is_the_best_part_of_that_rank() -> None:
    v = cases.random(6, 9)
    left, right = top_directions(v, 2)
    u, s, r = torch.linalg.svd(v)
    torch.testing.assert_close(left @ right, u[:, :2] @ torch.diag(s[:2]) @ r[:2])
    assert torch.linalg.matrix_norm(v - left @ right, 2).item() == pytest.approx(s[2].item())


def test_the_fine_tune_starts_from_the_extrapolated_weights(tiny: Setting, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(Setting, "train", lambda *_: 0)
    moved = lox(tiny, alpha=1.5).model
    assign(trainable(moved), torch.zeros(sum(p.numel() for p in trainable(moved).values())))
    direction, dense = alignment(tiny), aligned()
    expected = {}
    for name, layer in linear_layers(dense).items():
        left, right = top_directions(direction.delta(name), RANK)
        expected[name] = left @ right
        layer.register_forward_hook(lambda _, x, y, step=expected[name]: y + 1.5 * x[0] @ step.T)
    torch.testing.assert_close(logits(moved), logits(dense), atol=1e-5, rtol=1e-4)
    assert (logits(moved) - logits(aligned())).abs().max() > 1e-2
