"""The arc: norms and angles of its points, the linear limit, and the same output as dense weights give."""

from __future__ import annotations

import math

import pytest
import torch

from curvlib.defenses.method import Setting
from curvlib.defenses.slerp import angle_between, coefficients, slerp
from curvlib.landscape.directions import effective_weight, linear_layers
from tests import cases
from tests.defenses.tiny import aligned, logits, tiny  # noqa: F401  a fixture


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_equal_norms_are_kept_and_the_angle_is_shared_out(t: float) -> None:
    first, second = (cases.random(3, 4, seed=seed) for seed in (0, 1))
    second *= first.norm() / second.norm()
    angle = angle_between(first, second)
    a, b = coefficients(angle, t)
    point = a * first + b * second
    assert point.norm().item() == pytest.approx(first.norm().item())
    assert angle_between(first, point) == pytest.approx(t * angle, abs=1e-7)


def test_a_small_angle_is_exact_and_a_line_in_the_limit() -> None:
    first, second = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1e-5]])
    assert angle_between(first, second) == pytest.approx(1e-5, rel=1e-3)  # arccos would lose it in float32
    assert coefficients(0.0, 0.3) == (0.7, 0.3)
    assert coefficients(1e-5, 0.3) == pytest.approx((0.7, 0.3))
    assert coefficients(math.pi / 2, 0.5)[0] == pytest.approx(math.sqrt(0.5))


def test_the_model_computes_with_the_weights_on_the_arc(tiny: Setting) -> None:  # noqa: F811
    dense, tuned = aligned(), linear_layers(cases.nf4_llama())
    for name, layer in linear_layers(dense).items():
        base, end = effective_weight(layer), effective_weight(tuned[name])
        a, b = coefficients(angle_between(base, end), 0.4)
        layer.register_forward_hook(lambda _, x, __, w=a * base + b * end: x[0] @ w.T)
    torch.testing.assert_close(logits(slerp(tiny, 0.4).model), logits(dense), atol=1e-5, rtol=1e-4)


def test_the_ends_are_the_two_models(tiny: Setting) -> None:  # noqa: F811
    torch.testing.assert_close(logits(slerp(tiny, 0.0).model), logits(aligned()), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits(slerp(tiny, 1.0).model), logits(cases.nf4_llama()), atol=1e-5, rtol=1e-4)
