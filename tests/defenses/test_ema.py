"""The moving average against its closed form."""

from __future__ import annotations

import pytest
import torch

from curvlib.defenses.ema import Average, ema
from curvlib.defenses.method import Setting
from curvlib.parameters import flatten, trainable
from tests import cases
from tests.defenses.tiny import tiny  # noqa: F401  a fixture


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.97])
def test_the_average_is_its_closed_form(beta: float) -> None:
    walk = [cases.random(4, seed=seed) for seed in range(6)]
    theta = walk[0].clone()
    average = Average([theta], beta)
    for point in walk[1:]:
        theta.copy_(point)
        average.update()
    closed = beta**5 * walk[0] + sum((1 - beta) * beta ** (5 - t) * walk[t] for t in range(1, 6))
    torch.testing.assert_close(average.value, closed)


def test_quadratic_descent_averages_to_the_geometric_sum() -> None:
    theta, beta, rate = torch.ones(1, dtype=torch.float64), 0.9, 0.3
    average = Average([theta], beta)
    for _ in range(20):  # θ_t = 0.7ᵗ on ½θ²
        theta -= rate * theta
        average.update()
    q = 1 - rate
    closed = beta**20 + (1 - beta) * q * (q**20 - beta**20) / (q - beta)
    assert average.value.item() == pytest.approx(closed)


def test_beta_zero_is_the_fine_tune_and_beta_one_the_start(tiny: Setting) -> None:  # noqa: F811
    plain = tiny.start()
    tiny.train(plain, tiny.examples())
    last, first = (flatten(trainable(ema(tiny, beta).model)) for beta in (0.0, 1.0))
    torch.testing.assert_close(last, flatten(trainable(plain)))
    torch.testing.assert_close(first, flatten(trainable(tiny.start())))
    assert not torch.equal(first, last)
