r"""A small space of weight changes that two models share, with curvature in it.

All of effective-weight space is too large for eigenvectors (SmolLM2: 106 million numbers, 425 MB each). Fixing r
orthonormal input directions :math:`Q` (r, in) for each layer leaves :math:`\Delta W = C\,Q` with free C (out, r), and
:math:`\langle \Delta W, \Delta W'\rangle = \langle C, C'\rangle`: lengths and angles of the flat vector of all C are
those of weight space. Where Q spans the inputs that a LoRA adapter reads, the adapter's step lies inside, and nothing
depends on how its factors are scaled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curvlib.errors import CurvlibError
from curvlib.landscape.directions import Chain, Direction, moved
from curvlib.parameters import flatten, layer_slices, unflatten


@dataclass(frozen=True)
class Subspace:
    """Orthonormal input directions of each layer: name -> Q (r, in), and name -> number of outputs."""

    bases: dict[str, Tensor]
    outputs: dict[str, int]

    def zeros(self) -> dict[str, Tensor]:
        """Return name -> C = 0 (out, r), a leaf that requires a gradient."""
        return {
            name: torch.zeros(
                self.outputs[name], len(basis), device=basis.device, dtype=basis.dtype, requires_grad=True
            )
            for name, basis in self.bases.items()
        }

    @property
    def size(self) -> int:
        """The number of coordinates P."""
        return sum(self.outputs[name] * len(basis) for name, basis in self.bases.items())

    @property
    def layers(self) -> dict[str, slice]:
        """Decoder layer -> slice of the flat vector."""
        return layer_slices(self.zeros())

    def direction(self, vector: Tensor) -> Direction:
        r"""Return the direction :math:`\Delta W = C\,Q` of a flat vector (P,)."""
        pieces = unflatten(vector, self.zeros())
        names = self.bases.items()
        return Direction({name: (piece, basis) for (name, basis), piece in zip(names, pieces, strict=True)})

    def project(self, direction: Direction) -> tuple[Tensor, float]:
        r"""Return the coordinates :math:`C = \Delta W\,Q^\top` (P,) and the share of the squared norm that they hold.

        Raises:
            CurvlibError: the direction has other layers than the subspace.
        """
        if direction.chains.keys() != self.bases.keys():
            raise CurvlibError(
                f"a direction of {len(direction.chains)} layers was given to a subspace of {len(self.bases)}: "
                "make both from the same model"
            )
        pieces = []
        for name, basis in self.bases.items():
            left, *right = direction.chains[name]
            pieces.append(left @ (right[0] @ basis.T) if right else left @ basis.T)
        vector = flatten(pieces)
        return vector, float(vector.square().sum()) / direction.size**2

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Add :math:`C Q`, with C = 0, to the model inside the ``with`` block; yield name -> C to differentiate.

        Pass the mapping as ``parameters`` to any operator of :mod:`curvlib.curvature`.
        """
        parameters = self.zeros()
        chains: dict[str, Chain] = {name: (parameters[name], basis) for name, basis in self.bases.items()}
        with moved(model, [(Direction(chains), 1.0)]):
            yield parameters


def spanned_by(direction: Direction, rank: int) -> Subspace:
    r"""Return the subspace of the top ``rank`` right singular vectors of each layer's :math:`\Delta W`.

    It holds a direction of that rank or less whole. Cost: one eigenproblem a layer, of size r (low-rank) or of its
    shorter side (dense).
    """
    bases = {name: _right_vectors(chain, rank) for name, chain in direction.chains.items()}
    return Subspace(bases, {name: len(chain[0]) for name, chain in direction.chains.items()})


def _right_vectors(chain: Chain, rank: int) -> Tensor:
    """Return the top right singular vectors of a product of matrices, (rank, in).

    From the Gram matrix of the shorter side, in float64: torch's float32 ``eigh`` returned NaN for a layer of SmolLM2.
    """
    left, *right = (matrix.double() for matrix in chain)
    q, mix = torch.linalg.qr(right[0].T) if right else (None, None)
    core = left if mix is None else left @ mix.T
    if len(core) < core.shape[1]:
        top = torch.linalg.eigh(core @ core.T).eigenvectors.flip(1)[:, :rank]
        vectors: Tensor = torch.linalg.qr(core.T @ top).Q
    else:
        vectors = torch.linalg.eigh(core.T @ core).eigenvectors.flip(1)[:, :rank]
    return (vectors if q is None else q @ vectors).T.to(chain[0]).contiguous()
