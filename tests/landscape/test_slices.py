"""Slices of losses in closed form: values and ranges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from curvlib.errors import CurvlibError
from curvlib.landscape.directions import Direction
from curvlib.landscape.slices import adaptive_radius, grid, line, measure
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


def test_a_slice_of_a_quadratic_is_exact_around_any_origin() -> None:
    model, points = Vector(), grid(2.0, 5)
    found = measure(model, PLANE, points, model.losses, origin=[(along(1, 1, 1), 0.5)])
    matrix = torch.cat([step.delta("theta") for step in PLANE])
    thetas = 0.5 + torch.from_numpy(points) @ matrix
    exact = torch.stack([quadratic(theta) for theta in thetas]).numpy()
    np.testing.assert_allclose(found.losses["bowl"], np.stack([exact, 3 * exact], 1), rtol=1e-12)
    np.testing.assert_allclose(found.mean("slope"), thetas.sum(1), rtol=1e-12)
    assert not np.allclose(found.losses["bowl"], measure(model, PLANE, points, model.losses).losses["bowl"])
    assert not model.theta.weight.any()


@pytest.mark.parametrize("rise", [0.03, 0.3, 40.0])
def test_the_radius_reaches_the_rise_that_was_asked_for(rise: float) -> None:
    model = Vector()
    matrix = torch.cat([step.delta("theta") for step in PLANE])
    # the slope cancels between both signs; the mean over the losses is (2 × bowl + slope) / 2
    bend = float((matrix @ CURVATURE * matrix).sum()) / 2 / len(PLANE)
    exact = (rise / bend) ** 0.5
    assert adaptive_radius(model, PLANE, model.losses, rise=rise) == pytest.approx(exact, rel=0.07)
    assert adaptive_radius(model, PLANE, model.losses, rise=4 * rise) > 1.8 * exact


def test_a_rise_out_of_reach_and_a_wrong_grid_are_refused() -> None:
    model = Vector()
    with pytest.raises(CurvlibError, match="ask for another rise"):
        adaptive_radius(model, PLANE, lambda: {"flat": torch.zeros(1)}, rise=1.0)
    with pytest.raises(CurvlibError, match="expected one column each"):
        measure(model, PLANE, line(0, 1, 3), model.losses)


def test_a_broken_model_counts_as_risen() -> None:
    model = Vector()

    def broken() -> dict[str, Tensor]:
        loss = model.losses()["bowl"][:1]
        return {"bowl": torch.where(loss < 30, loss, torch.nan)}

    assert 0 < adaptive_radius(model, PLANE, broken, rise=1e6, start=4.0) < 4.0
