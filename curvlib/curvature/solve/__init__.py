r"""Solve :math:`A x = b` with a curvature operator A: one method a file, one result type."""

from curvlib.curvature.solve.conjugate_gradient import conjugate_gradient
from curvlib.curvature.solve.exact import exact_inverse, exact_solve
from curvlib.curvature.solve.lbfgs import LBFGSInverse, curvature_pairs, gradient_differences, lbfgs, lbfgs_inverse
from curvlib.curvature.solve.neumann import largest_eigenvalue, lissa, neumann
from curvlib.curvature.solve.solution import Preconditioner, Solution

__all__ = [
    "LBFGSInverse",
    "Preconditioner",
    "Solution",
    "conjugate_gradient",
    "curvature_pairs",
    "exact_inverse",
    "exact_solve",
    "gradient_differences",
    "largest_eigenvalue",
    "lbfgs",
    "lbfgs_inverse",
    "lissa",
    "neumann",
]
