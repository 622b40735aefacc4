r"""Traces of diagonal blocks of a symmetric operator, from its products with random vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from curvlib.curvature.operator import CurvatureOperator
from curvlib.errors import CurvlibError


@dataclass(frozen=True)
class Estimate:
    """A number, its standard error in the same unit, and the products with the operator that it cost."""

    value: float
    standard_error: float
    products: int


def layer_traces(
    operator: CurvatureOperator, layers: Mapping[str, slice], probes: int, *, seed: int = 0
) -> dict[str, Estimate]:
    r"""Estimate the trace of each diagonal block, :math:`\mathbb E[z_L^\top (A z)_L]`, all from the same products.

    The mean is over vectors z of random signs. Its variance is :math:`2\,\sum_{i \ne j} A_{ij}^2 / \text{probes}` for
    one layer that holds everything, so a diagonal A costs one probe. Source: Hutchinson 1990; Girard 1989.

    Args:
        operator: A.
        layers: name to slice of the flat vector, as :func:`curvlib.parameters.layer_slices` returns them.
        probes: products, at least two; each estimate names them, since all layers share them.
        seed: of the signs, drawn on the CPU so that every device sees the same ones.

    >>> from curvlib.curvature.operator import DiagonalOperator
    >>> layer_traces(DiagonalOperator(torch.tensor([1.0, 2.0, 3.0])), {"all": slice(None)}, probes=2)
    {'all': Estimate(value=6.0, standard_error=0.0, products=2)}
    """
    if probes < 2:
        raise CurvlibError(f"{probes} products were given, but an estimate and its standard error need at least 2")
    generator = torch.Generator().manual_seed(seed)
    samples: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(probes):
        bits = torch.randint(0, 2, (operator.size,), generator=generator)
        z = (2 * bits - 1).to(operator.device, operator.dtype)
        image = operator.matvec(z)
        for name, where in layers.items():
            samples[name].append(float(z[where] @ image[where]))
    return {name: _mean(values) for name, values in samples.items()}


def _mean(samples: list[float]) -> Estimate:
    values = torch.tensor(samples, dtype=torch.float64)
    return Estimate(float(values.mean()), float(values.std() / len(samples) ** 0.5), len(samples))
