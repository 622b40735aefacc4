"""SafeLoRA's projector, its cosine in factors, and its threshold."""

from __future__ import annotations

import pytest
import torch

from curvlib.defenses.method import Setting
from curvlib.defenses.safelora import cosine, projector, safelora
from curvlib.landscape.directions import adapter_direction
from tests import cases
from tests.defenses.tiny import alignment, tiny  # noqa: F401  a fixture


def test_the_projector_by_hand() -> None:
    v = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    torch.testing.assert_close(projector(v), torch.diag(torch.tensor([9.0, 16.0, 0.0])) / 5)


def test_it_is_an_orthogonal_projector_for_a_unit_direction() -> None:
    v = cases.random(5, 1) @ cases.random(1, 4, seed=1)
    c = projector(v / v.norm())
    torch.testing.assert_close(c @ c, c)
    torch.testing.assert_close(c, c.T)
    assert float(c.trace()) == pytest.approx(1.0)


def test_the_cosine_in_factors_is_that_of_the_dense_matrices() -> None:
    left, right, c = cases.random(6, 2), cases.random(2, 5, seed=1), projector(cases.random(6, 3, seed=2))
    dense = left @ right
    exact = (dense * (c @ dense)).sum() / dense.norm() / (c @ dense).norm()
    assert cosine(left, right, c) == pytest.approx(float(exact))
    assert cosine(torch.zeros(6, 2), right.float(), c.float()) == 1.0


@pytest.mark.parametrize("threshold", [-1.1, 0.5, 1.1])
def test_layers_below_the_threshold_are_projected(tiny: Setting, threshold: float) -> None:  # noqa: F811
    before, after = adapter_direction(cases.nf4_llama()), adapter_direction(safelora(tiny, threshold).model)
    for name, (left, right) in before.chains.items():
        c = projector(alignment(tiny).delta(name))
        expected = c @ left @ right if cosine(left, right, c) < threshold else left @ right
        torch.testing.assert_close(after.delta(name), expected, atol=1e-6, rtol=1e-4)
