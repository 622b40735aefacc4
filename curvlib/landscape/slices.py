"""Losses on lines and grids through a model, several losses in one pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from curvlib.errors import CurvlibError
from curvlib.landscape.directions import Direction, moved
from curvlib.nf4 import kept_weights
from curvlib.progress import bar

Array = NDArray[np.float64]
Losses = Callable[[], Mapping[str, Tensor]]  # name -> the losses (n,) of its chats


@dataclass(frozen=True)
class Slice:
    """Losses at points of a line or a plane through a model.

    Attributes:
        points: (K, d), the factor of each of the d directions at each point.
        losses: name -> (K, n), each chat's loss (nats per token) at each point.
        seconds: that the points measured in this call took.
    """

    points: Array
    losses: dict[str, Array]
    seconds: float = 0.0

    def mean(self, name: str) -> Array:
        """Return the mean loss over the chats at each point, (K,)."""
        mean: Array = self.losses[name].mean(axis=1)
        return mean


def grid(radius: float, count: int) -> Array:
    """Return ``count`` × ``count`` points from -radius to radius, (count², 2); the first factor varies slowest.

    >>> grid(1.0, 3)[[0, 1, 4]].tolist()
    [[-1.0, -1.0], [-1.0, 0.0], [0.0, 0.0]]
    """
    axis = np.linspace(-radius, radius, count)
    return np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)


@torch.no_grad()
def _evaluated(
    model: nn.Module,
    directions: Sequence[Direction],
    point: Array,
    losses: Losses,
    origin: Sequence[tuple[Direction, float]] = (),
) -> dict[str, Array]:
    """Return the losses (1, n) at one point (d,), without a graph."""
    with moved(model, [*origin, *zip(directions, point.tolist(), strict=True)]):
        return {name: values.double().cpu().numpy()[None] for name, values in losses().items()}


def measure(
    model: nn.Module,
    directions: Sequence[Direction],
    points: Array,
    losses: Losses,
    *,
    origin: Sequence[tuple[Direction, float]] = (),
    label: str = "slice",
) -> Slice:
    """Evaluate the losses at ``origin`` + Σ factor · direction for each row of factors in ``points`` (K, d).

    Args:
        model: left as it is, see :func:`curvlib.landscape.directions.moved`.
        directions: d of them.
        points: (K, d).
        losses: called once a point.
        origin: steps that lead from the model to the slice's own origin, such as a fine-tuning step.
        label: name on the progress bar.

    Raises:
        CurvlibError: the points do not fit the directions.

    Cost: one call of ``losses`` a point; the 4-bit weights are dequantised once for all of them.
    """
    if points.ndim != 2 or points.shape[1] != len(directions):
        raise CurvlibError(
            f"points of shape {points.shape} were given for {len(directions)} directions, expected one column each"
        )
    begin = time.perf_counter()
    with kept_weights(model):
        blocks = [_evaluated(model, directions, point, losses, origin) for point in bar(points, desc=label)]
    found = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    return Slice(points, found, time.perf_counter() - begin)


def without_bowl(points: Array, values: Array) -> Array:
    r"""Return what the best quadratic in ``points`` (K, d) leaves of ``values`` (K, ...), by least squares.

    Any two minima look alike: a bowl correlates with every other bowl.

    Raises:
        CurvlibError: no more points than coefficients of :math:`1, x_i, x_i x_j`, so that nothing would be left.

    >>> x = grid(1.0, 5)
    >>> bool(abs(without_bowl(x, 3 + x[:, 0] + x[:, 0] * x[:, 1])).max() < 1e-12)
    True
    """
    scaled = points / (np.abs(points).max() or 1.0)
    first, second = np.triu_indices(points.shape[1])
    design = np.column_stack([np.ones(len(points)), scaled, scaled[:, first] * scaled[:, second]])
    if len(points) <= design.shape[1]:
        raise CurvlibError(f"{len(points)} points for {design.shape[1]} coefficients of the bowl: measure a finer grid")
    left: Array = values - np.tensordot(design @ np.linalg.pinv(design), values, 1)
    return left
