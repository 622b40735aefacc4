"""The dense inverse, for small sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlib.curvature.operator import CurvatureOperator, DenseOperator, check_vector
from curvlib.curvature.solve.solution import Solution
from curvlib.errors import CurvlibError

LARGEST = 10_000  # a float32 matrix of this size holds 400 MB


def exact_inverse(operator: CurvatureOperator) -> DenseOperator:
    r"""Return :math:`A^{-1}` as a matrix; costs ``size`` products and :math:`O(\text{size}^3)`.

    >>> exact_inverse(DenseOperator(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))).matrix
    tensor([[0.5000, 0.0000],
            [0.0000, 0.2500]])

    Raises:
        CurvlibError: A is larger than 10 000, or singular.
    """
    if operator.size > LARGEST:
        raise CurvlibError(
            f"a matrix of size {operator.size} was to be inverted, expected at most {LARGEST}: use conjugate_gradient"
        )
    identity = torch.eye(operator.size, dtype=operator.dtype, device=operator.device)
    matrix = torch.stack([operator.matvec(row) for row in identity])
    inverse, info = torch.linalg.inv_ex((matrix + matrix.T) / 2)
    if int(info) != 0:
        raise CurvlibError("the matrix is singular, expected an invertible one: add damping, operator.damped(value)")
    return DenseOperator(inverse)


def exact_solve(operator: CurvatureOperator, b: Tensor) -> Solution:
    r"""Solve :math:`A x = b` by the dense inverse, with the true residual; see :func:`exact_inverse`."""
    check_vector(operator, b)
    x = exact_inverse(operator).matvec(b)
    residual = float((b - operator.matvec(x)).norm() / b.norm().clamp(min=torch.finfo(b.dtype).tiny))
    return Solution(x, residual, operator.size + 1, True, (1.0, residual))
