"""Slices of losses and their bowls in closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from curvlib.errors import CurvlibError
from curvlib.landscape.directions import Direction
from curvlib.landscape.slices import grid, measure, without_bowl
from tests import cases

CURVATURE, CENTRE = cases.spd(3), cases.random(3, seed=1)


class Vector(nn.Module):
    """Three parameters as a linear layer: the model's output on the unit vectors is θ itself."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Linear(3, 1, bias=False, dtype=torch.float64)
        nn.init.zeros_(self.theta.weight)

    def losses(self) -> dict[str, Tensor]:
        """Two chats of a quadratic, and a linear loss."""
        theta = self.theta(torch.eye(3, dtype=torch.float64))[:, 0]
        bowl = quadratic(theta)
        return {"bowl": torch.stack([bowl, 3 * bowl]), "slope": theta.sum()[None]}


def quadratic(theta: Tensor) -> Tensor:
    return 0.5 * (theta - CENTRE) @ CURVATURE @ (theta - CENTRE)


def along(*vector: float) -> Direction:
    return Direction({"theta": (torch.tensor([vector], dtype=torch.float64),)})


PLANE = [along(1, 0, 2), along(0, 1, -1)]


def test_a_slice_of_a_quadratic_is_exact_and_the_model_stays() -> None:
    model, points = Vector(), grid(2.0, 5)
    found = measure(model, PLANE, points, model.losses)
    thetas = torch.from_numpy(points) @ torch.cat([step.delta("theta") for step in PLANE])
    exact = torch.stack([quadratic(theta) for theta in thetas]).numpy()
    np.testing.assert_allclose(found["bowl"], np.stack([exact, 3 * exact], 1), rtol=1e-12)
    np.testing.assert_allclose(found["slope"][:, 0], thetas.sum(1), rtol=1e-12, atol=1e-12)
    assert not np.allclose(found["bowl"], measure(model, PLANE, points[::-1], model.losses)["bowl"])
    assert not model.theta.weight.any()


def test_a_wrong_grid_is_refused() -> None:
    model = Vector()
    with pytest.raises(CurvlibError, match="expected one column each"):
        measure(model, PLANE, np.zeros((3, 1)), model.losses)


def test_a_quadratic_leaves_nothing_and_a_ripple_stays_what_it_is() -> None:
    points = grid(1.5, 9)
    x, y = points.T
    bowl, ripple = 2 * x**2 - x * y + y**2 + 0.3 * x + 5, np.cos(3 * y)
    assert np.abs(without_bowl(points, bowl)).max() < 1e-12
    left = without_bowl(points, np.stack([bowl + ripple, ripple], 1))
    np.testing.assert_allclose(left[:, 0], left[:, 1], atol=1e-12)
    assert np.abs(left).max() > 0.1
    odd = without_bowl(points, bowl + np.sin(3 * y))
    assert abs(np.corrcoef(left[:, 0], odd)[0, 1]) < 1e-9  # the bowls alone correlate
    with pytest.raises(CurvlibError, match="measure a finer grid"):
        without_bowl(grid(1, 2), np.zeros(4))
