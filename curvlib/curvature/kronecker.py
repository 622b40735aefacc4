r"""A block-diagonal matrix, each block a Kronecker basis with a free spectrum: what EK-FAC fits.

The block of one linear map W (out, in) acts on a matrix V of its shape as

.. math:: V \mapsto U_S \left(\Lambda \odot (U_S^\top V\, U_A)\right) U_A^\top,

with orthonormal :math:`U_S` (out, out), :math:`U_A` (in, in) and eigenvalues :math:`\Lambda` (out, in). Any function of
the matrix is the same function of :math:`\Lambda`. A basis may hold only the k leading columns; the space that they
leave out is then one isotropic piece with one shared eigenvalue for each column of the other basis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvlib.curvature.operator import Operator, check_vector
from curvlib.errors import CurvlibError

ROUNDS = 3  # of subspace iteration; more move the last few columns only


@dataclass(frozen=True)
class Basis:
    """Orthonormal columns ``vectors`` (d, k); where k < d, the rest of the space is one isotropic piece."""

    vectors: Tensor

    @property
    def rest(self) -> int:
        """Dimension of the space that the columns leave out."""
        return self.vectors.shape[0] - self.vectors.shape[1]

    @property
    def counts(self) -> Tensor:
        """Dimensions that each pooled coordinate stands for: k ones, then the rest if there is one."""
        ones = self.vectors.new_ones(self.vectors.shape[1])
        return torch.cat((ones, ones.new_tensor([self.rest]))) if self.rest else ones

    def into(self, x: Tensor) -> Tensor:
        """Map the last axis (d) to k coordinates, followed by the d numbers of the remainder if there is a rest."""
        top = x @ self.vectors
        return torch.cat((top, x - top @ self.vectors.mT), dim=-1) if self.rest else top

    def back(self, x: Tensor) -> Tensor:
        """Undo :meth:`into`."""
        top, remainder = x.tensor_split([self.vectors.shape[1]], dim=-1)
        return top @ self.vectors.mT + remainder if self.rest else top @ self.vectors.mT

    def pool(self, squares: Tensor) -> Tensor:
        """Average the remainder's squares over the rest: last axis k + d to k + 1 (k to k without a rest)."""
        top, remainder = squares.tensor_split([self.vectors.shape[1]], dim=-1)
        return torch.cat((top, remainder.sum(dim=-1, keepdim=True) / self.rest), dim=-1) if self.rest else top

    def spread(self, pooled: Tensor) -> Tensor:
        """Repeat the rest's value for each of the remainder's d numbers: last axis k + 1 to k + d."""
        top, rest = pooled.tensor_split([self.vectors.shape[1]], dim=-1)
        return torch.cat((top, rest.expand(*rest.shape[:-1], self.vectors.shape[0])), dim=-1) if self.rest else top


@dataclass(frozen=True)
class Block:
    """One linear map's share of the flat vector, its weight, and its spectrum.

    ``values`` (outputs, inputs) are the eigenvalues in both bases, pooled as by :meth:`Basis.pool`.
    """

    name: str
    weight: int  # where the weight starts in the flat vector
    left: Basis
    right: Basis
    values: Tensor

    @property
    def trace(self) -> Tensor:
        """Sum of all eigenvalues."""
        return self.left.counts @ self.values @ self.right.counts

    def apply(self, vector: Tensor, out: Tensor) -> None:
        """Write this block's product with its share of ``vector`` into the same share of ``out``."""
        rows, columns = self.left.vectors.shape[0], self.right.vectors.shape[0]
        share = slice(self.weight, self.weight + rows * columns)
        x = rotate(self.left, self.right, vector[share].view(rows, columns))
        x = x * self.left.spread(self.right.spread(self.values).mT).mT
        out[share] = self.left.back(self.right.back(x).mT).mT.reshape(-1)


def eigenvectors(factor: Tensor, rank: int | None, sketch: torch.Generator) -> Basis:
    """Return the (leading) eigenvectors of a positive semi-definite matrix."""
    if rank is None or rank >= len(factor):
        return Basis(torch.linalg.eigh(factor).eigenvectors)
    columns = torch.randn(len(factor), rank, generator=sketch, device=factor.device, dtype=factor.dtype)
    for _ in range(ROUNDS):
        columns = torch.linalg.qr(factor @ columns).Q
    return Basis(columns @ torch.linalg.eigh(columns.mT @ factor @ columns).eigenvectors)


def rotate(left: Basis, right: Basis, x: Tensor) -> Tensor:
    """Return (..., out, in) in the coordinates of both bases."""
    return left.into(right.into(x).mT).mT


@dataclass(frozen=True)
class EKFAC(Operator):
    """A block-diagonal curvature model as an operator of shape (size, size); its functions are operators of this type.

    Cost of a product: two small matrix products a side and block, no pass through the model.
    """

    size: int
    dtype: torch.dtype
    device: torch.device
    blocks: tuple[Block, ...]

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product with ``vector`` (size,), in the order of :func:`curvlib.parameters.trainable`."""
        check_vector(self, vector)
        out = torch.zeros_like(vector)
        for block in self.blocks:
            block.apply(vector, out)
        return out

    @property
    def damping_scale(self) -> float:
        """Mean eigenvalue over all parameters: the unit in which a damping is best given (say 0.1 times it)."""
        return float(sum(float(block.trace) for block in self.blocks) / self.size)

    def above(self, value: float) -> int:
        """Return the number of eigenvalues above ``value``, those of isotropic pieces with their dimensions."""
        return int(sum(float(b.left.counts @ (b.values > value).to(b.values) @ b.right.counts) for b in self.blocks))

    def inverse(self, damping: float) -> EKFAC:
        r"""Return :math:`(C + \text{damping}\, I)^{-1}`; ``damping`` > 0, in units of the curvature."""
        return self._function(lambda values: 1 / (values + _positive(damping)))

    def _function(self, function: Callable[[Tensor], Tensor]) -> EKFAC:
        return replace(self, blocks=tuple(replace(block, values=function(block.values)) for block in self.blocks))


def _positive(damping: float) -> float:
    if damping <= 0:
        raise CurvlibError(f"damping {damping} was given, expected a number > 0: try 0.1 * ekfac.damping_scale")
    return damping
