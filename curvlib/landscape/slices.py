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
DOUBLINGS, BISECTIONS = 6, 4  # from 1/64 of the first guess to 64 times it, then to about 5 % of the radius


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


def line(start: float, stop: float, count: int) -> Array:
    """Return ``count`` evenly spaced points on a line, (count, 1)."""
    return np.linspace(start, stop, count)[:, None]


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


def adaptive_radius(
    model: nn.Module, directions: Sequence[Direction], losses: Losses, *, rise: float, start: float = 0.25
) -> float:
    """Return the factor at which the losses have risen by ``rise`` (nats per token), so that a slice shows its shape.

    The loss is the mean over all losses, at the ends of every direction (both signs); the factor is doubled or halved
    from ``start`` until it brackets the rise, and then bisected.

    Raises:
        CurvlibError: no factor from 1/64 to 64 times ``start`` brackets the rise.

    Cost: about 8 calls of ``losses`` for each of 2 d points, d directions.
    """
    axes = np.eye(len(directions))

    def level(points: Array) -> float:
        means = [_evaluated(model, directions, point, losses).values() for point in points]
        return float(np.mean([values.mean() for row in means for values in row]))

    def risen(radius: float) -> bool:
        ends = np.concatenate((-radius * axes, radius * axes))
        return not level(ends) - centre < rise  # also where the model has broken and the loss is not a number

    with kept_weights(model):
        centre = level(0 * axes[:1])
        radius, growing = start, not risen(start)
        for _ in range(DOUBLINGS):
            tried = 2 * radius if growing else radius / 2
            if risen(tried) == growing:
                break
            radius = tried
        else:
            raise CurvlibError(
                f"no radius between {radius:g} and {start:g} raises the losses by {rise}: ask for another rise"
            )
        low, high = sorted((radius, tried))
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if risen(middle) else (middle, high)
    return high
