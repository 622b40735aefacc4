"""What an algorithm sees of a curvature: its size and its product with a vector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from curvlib.errors import CurvlibError


@runtime_checkable
class CurvatureOperator(Protocol):
    """A symmetric matrix of shape (size, size) known only through its products."""

    @property
    def size(self) -> int:
        """Number of rows."""

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the vectors."""

    @property
    def device(self) -> torch.device:
        """Where the vectors live."""

    def matvec(self, v: Tensor) -> Tensor:
        """Return the product with v; both of shape (size,)."""


class Operator:
    """Arithmetic for curvature operators: ``a + b``, ``a - b``, ``c * a``, ``a.damped(c)``, ``a @ v``, ``a.dense()``.

    A subclass sets ``size``, ``dtype`` and ``device`` and defines ``matvec``.
    """

    size: int
    dtype: torch.dtype
    device: torch.device

    def matvec(self, v: Tensor) -> Tensor:
        """Return the product with v; both of shape (size,)."""
        raise NotImplementedError

    def __matmul__(self, v: Tensor) -> Tensor:
        """Multiply by a vector (size,), or by each column of a matrix (size, k)."""
        if v.ndim == 1:
            return self.matvec(v)
        return torch.stack([self.matvec(column) for column in v.unbind(dim=1)], dim=1)

    def __add__(self, other: CurvatureOperator) -> Operator:
        return SumOperator(self, other)

    def __sub__(self, other: CurvatureOperator) -> Operator:
        return SumOperator(self, ScaledOperator(other, -1.0))

    def __mul__(self, factor: float) -> Operator:
        return ScaledOperator(self, factor)

    __rmul__ = __mul__

    def damped(self, damping: float) -> Operator:
        r"""Return :math:`A + \lambda I`."""
        return SumOperator(self, damping * IdentityOperator(self.size, self.dtype, self.device))

    def dense(self) -> Tensor:
        """Return the whole matrix (size, size); costs ``size`` products."""
        return self @ torch.eye(self.size, dtype=self.dtype, device=self.device)


def check_vector(operator: CurvatureOperator, v: Tensor) -> None:
    """Refuse a vector that does not fit the operator."""
    if v.shape != (operator.size,):
        raise CurvlibError(
            f"a vector of shape {tuple(v.shape)} was given, expected ({operator.size},): flatten it first"
        )


class SumOperator(Operator):
    """The sum of two operators of one size."""

    def __init__(self, a: CurvatureOperator, b: CurvatureOperator) -> None:
        if a.size != b.size:
            raise CurvlibError(
                f"operators of sizes {a.size} and {b.size} cannot be added: use the same parameters in both"
            )
        self.a, self.b = a, b
        self.size, self.dtype, self.device = a.size, a.dtype, a.device

    def matvec(self, v: Tensor) -> Tensor:
        """Return a v + b v."""
        return self.a.matvec(v) + self.b.matvec(v)


class ScaledOperator(Operator):
    """A multiple of an operator."""

    def __init__(self, operator: CurvatureOperator, factor: float) -> None:
        self.operator, self.factor = operator, factor
        self.size, self.dtype, self.device = operator.size, operator.dtype, operator.device

    def matvec(self, v: Tensor) -> Tensor:
        """Return factor · (operator v)."""
        return self.factor * self.operator.matvec(v)


class IdentityOperator(Operator):
    """The identity."""

    def __init__(self, size: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        self.size, self.dtype, self.device = size, dtype, torch.device(device)

    def matvec(self, v: Tensor) -> Tensor:
        """Return v itself."""
        return v


class DiagonalOperator(Operator):
    """A diagonal matrix, given by its diagonal (size,)."""

    def __init__(self, diagonal: Tensor) -> None:
        self.diagonal = diagonal
        self.size, self.dtype, self.device = diagonal.numel(), diagonal.dtype, diagonal.device

    def matvec(self, v: Tensor) -> Tensor:
        """Return diagonal ⊙ v."""
        check_vector(self, v)
        return self.diagonal * v


class DenseOperator(Operator):
    """A matrix held in memory, (size, size).

    >>> a = DenseOperator(torch.tensor([[2.0, 1.0], [1.0, 3.0]]))
    >>> (2 * a + IdentityOperator(2)).dense()
    tensor([[5., 2.],
            [2., 7.]])
    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise CurvlibError(f"a matrix of shape {tuple(matrix.shape)} was given, expected a square one")
        self.matrix = matrix
        self.size, self.dtype, self.device = len(matrix), matrix.dtype, matrix.device

    def matvec(self, v: Tensor) -> Tensor:
        """Return matrix · v."""
        check_vector(self, v)
        return self.matrix @ v


class FunctionOperator(Operator):
    """A symmetric linear function of a vector, as an operator."""

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.function = function
        self.size, self.dtype, self.device = size, dtype, torch.device(device)

    def matvec(self, v: Tensor) -> Tensor:
        """Return function(v)."""
        check_vector(self, v)
        return self.function(v)


def asymmetry(operator: CurvatureOperator, seed: int = 0) -> float:
    r"""Return :math:`|u^\top Av - v^\top Au| / (\|Au\| + \|Av\|)` for two standard normal vectors; costs two products.

    It is about the relative rounding error for a symmetric operator and of order one for one without symmetry.
    """
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.randn(operator.size, generator=generator).to(operator.device, operator.dtype) for _ in range(2))
    au, av = operator.matvec(u), operator.matvec(v)
    scale = float(au.norm() + av.norm())
    return abs(float(u @ av - v @ au)) / scale if scale != 0 else 0.0  # nan stays nan
