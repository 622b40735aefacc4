"""Losses on lines and grids through a model, several losses in one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from curvlib.errors import CurvlibError
from curvlib.landscape.directions import Direction, moved
from curvlib.nf4 import kept_weights
from curvlib.progress import bar

Array = NDArray[np.float64]
Losses = Callable[[], Mapping[str, Tensor]]


def grid(radius: float, count: int) -> Array:
    """Return ``count`` × ``count`` points from -radius to radius, (count², 2); the first factor varies slowest.

    >>> grid(1.0, 3)[[0, 1, 4]].tolist()
    [[-1.0, -1.0], [-1.0, 0.0], [0.0, 0.0]]
    """
    axis = np.linspace(-radius, radius, count)
    return np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)


@torch.no_grad()
def measure(
    model: nn.Module, directions: Sequence[Direction], points: Array, losses: Losses, *, label: str = "slice"
) -> dict[str, Array]:
    """Evaluate the losses at model + Σ factor · direction for each row of factors in ``points`` (K, d).

    Args:
        model: left as it is, see :func:`curvlib.landscape.directions.moved`.
        directions: d of them.
        points: (K, d).
        losses: called once a point; name -> the losses (n,) of its chats.
        label: name on the progress bar.

    Returns:
        name -> (K, n), each chat's loss at each point.

    Raises:
        CurvlibError: the points do not fit the directions.

    Cost: one call of ``losses`` a point; the 4-bit weights are dequantised once for all of them.
    """
    if points.ndim != 2 or points.shape[1] != len(directions):
        raise CurvlibError(
            f"points of shape {points.shape} were given for {len(directions)} directions, expected one column each"
        )
    seen: dict[str, list[Array]] = {}
    with kept_weights(model):
        for point in bar(points, desc=label):
            with moved(model, [*zip(directions, point.tolist(), strict=True)]):
                for name, values in losses().items():
                    seen.setdefault(name, []).append(values.double().cpu().numpy())
    return {name: np.stack(rows) for name, rows in seen.items()}


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
