"""Patches stack, spare the aligned model, and name what is missing; the setting counts and refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from curvlib import stages
from curvlib.defenses.layers import added, instead, patch, scaled
from curvlib.defenses.method import Setting
from curvlib.errors import CurvlibError
from curvlib.landscape.directions import linear_layers
from curvlib.stages import FineTune
from tests import cases
from tests.defenses.tiny import TIER, TRAINING, alignment, tiny  # noqa: F401  a fixture

NAME = "model.layers.0.mlp.down_proj"


def test_patches_stack_in_order_and_leave_the_base_alone() -> None:
    model, x = cases.nf4_llama(), cases.random(2, cases.INTERMEDIATE).float()
    layer: Any = linear_layers(model)[NAME]
    plain, left, right = layer(x), cases.random(cases.HIDDEN, 3).float(), cases.random(3, cases.INTERMEDIATE).float()
    patch(model, {NAME: added((left, right), 0.5)})
    patch(model, {NAME: scaled(2.0)})
    torch.testing.assert_close(layer(x), 2 * (plain + 0.5 * x @ (left @ right).T), rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(layer(x), layer.base_layer(x))
    patch(model, {NAME: instead(lambda _: plain)})
    assert layer(x) is plain


def test_an_unknown_layer_is_one_line() -> None:
    with pytest.raises(CurvlibError, match="no adapted layer 'tea'"):
        patch(cases.nf4_llama(), {"tea": scaled(1.0)})


def test_a_longer_run_is_counted(tiny: Setting) -> None:  # noqa: F811
    config = tiny.longer(2.0)
    assert config.steps == 2 * TRAINING.steps
    assert tiny.train(tiny.start(), tiny.examples(), config=config) == config.steps * config.batch_size


def test_full_fine_tunes_and_foreign_alignments_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CurvlibError, match="expected method='lora'"):
        Setting.of(TIER, FineTune(method="full"))
    monkeypatch.setattr(stages, "aligned_source", lambda _: TIER.model)
    setting = Setting(TIER, FineTune(), None, None)  # type: ignore[arg-type]
    with pytest.raises(CurvlibError, match="was aligned by its makers"):
        setting.alignment()


def test_the_tiny_alignment_has_every_layer(tiny: Setting) -> None:  # noqa: F811
    assert set(alignment(tiny).chains) == set(linear_layers(tiny.tuned()))
