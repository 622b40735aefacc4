"""The quantiser's round trip, its gradients, and the layer that stays itself under the transformation."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from curvlib.defenses.quantiser import QuantisedLinear, fake_quantise
from tests import cases


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_round_trip(bits: int) -> None:
    values, top = cases.random(6, 64), 2 ** (bits - 1) - 1
    found = fake_quantise(values, bits)
    step = values.abs().amax(-1, keepdim=True) / top
    assert ((found - values).abs() <= step / 2 + 1e-12).all()
    levels = found / step
    torch.testing.assert_close(levels, levels.round())
    assert levels.abs().max() == pytest.approx(top)
    torch.testing.assert_close(fake_quantise(found, bits), found)  # what is on a level stays there


def test_clipping_cuts_what_lies_above_and_zero_stays_zero() -> None:
    found = fake_quantise(torch.tensor([[8.0, 3.0, -8.0, 0.0]]), bits=4, clip=0.5)
    torch.testing.assert_close(found, torch.tensor([[4.0, 20 / 7, -4.0, 0.0]]))
    assert torch.equal(fake_quantise(torch.zeros(1, 3), 4), torch.zeros(1, 3))


def test_gradients_pass_straight_through_inside_and_reach_the_clipping() -> None:
    values = torch.tensor([[0.4, 2.0]], requires_grad=True)
    clip = torch.tensor([[0.5]], requires_grad=True)
    fake_quantise(values, 4, clip)[0, 0].backward()
    assert values.grad is not None
    assert clip.grad is not None
    assert values.grad[0, 0].item() == pytest.approx(1.0)
    # 0.4 lies 2.8 steps of 1/7 up, on level 3: d(level·Δ)/dclip = (3 - 2.8)·2/7
    assert clip.grad.item() == pytest.approx(0.2 * 2 / 7, abs=1e-6)


def test_the_transformation_changes_nothing_but_what_is_rounded() -> None:
    weight, x = cases.random(5, 12), cases.random(3, 12, seed=1)
    fine = QuantisedLinear(weight, None, bits=20)
    with torch.no_grad():
        fine.scale.copy_(cases.random(12, seed=2))
        fine.clip.fill_(40.0)  # σ = 1: nothing is clipped
    torch.testing.assert_close(fine(x), linear(x, weight), atol=1e-4, rtol=1e-4)


def test_more_bits_are_nearer_and_quantised_inputs_cost() -> None:
    weight, x = cases.random(16, 128), cases.random(9, 128, seed=1)
    exact = linear(x, weight)
    errors = [
        cases.relative_error(QuantisedLinear(weight, None, *bits)(x), exact) for bits in ((4,), (8,), (8, 8), (8, 3))
    ]
    assert errors[0] > errors[2] > errors[1]
    assert errors[3] > errors[0]
    assert errors[1] < 0.02


def test_a_frozen_layer_is_the_same_and_learns_no_more() -> None:
    layer = QuantisedLinear(cases.random(4, 64), cases.random(4, seed=3), bits=4)
    before = layer(x := cases.random(2, 64, seed=1))
    layer.freeze()
    torch.testing.assert_close(layer(x), before)
    assert not layer(x).requires_grad
    assert layer.weight.untyped_storage().nbytes() == 0  # a slice of the weight would keep it
