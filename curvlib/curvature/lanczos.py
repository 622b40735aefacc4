r"""Lanczos: eigenvalues of a symmetric operator from its products with a few vectors.

From a unit vector :math:`v_1` each product adds one direction: :math:`A v_m` minus its part in the span of all earlier
ones is :math:`\beta_m v_{m+1}`. In the basis V of these vectors A is tridiagonal,

.. math:: A V = V T + \beta_m v_{m+1} e_m^\top, \qquad T_{jj} = v_j^\top A v_j = \alpha_j, \quad T_{j,j+1} = \beta_j ,

and the eigenvalues of the small T approach those of A, the outermost first. In exact arithmetic three vectors would do;
rounding loses orthogonality and yields false copies of converged eigenvalues, hence all vectors are kept and projected
out (full reorthogonalisation). Memory: one vector of the operator's size for each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlib.curvature.operator import CurvatureOperator, check_vector
from curvlib.curvature.trace import Estimate
from curvlib.errors import CurvlibError


@dataclass(frozen=True)
class Krylov:
    """The state after m steps: ``basis`` (m, size), ``alpha`` (m,), ``beta`` (m,); the last beta leads outside."""

    basis: Tensor
    alpha: tuple[float, ...]
    beta: tuple[float, ...]

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Return T's eigenvalues, ascending (m,), and its eigenvectors as columns (m, m), float64 on the CPU."""
        inner = torch.tensor(self.beta[:-1], dtype=torch.float64)
        matrix = torch.diag(torch.tensor(self.alpha, dtype=torch.float64)) + inner.diag(1) + inner.diag(-1)
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors


@dataclass(frozen=True)
class Eigenpairs:
    r"""Eigenvalues (k,), descending, with ``vectors`` (size, k) and ``residuals`` (k,).

    The residual :math:`\|Ay - \theta y\|` bounds the distance of :math:`\theta` to an exact eigenvalue.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    products: int


@dataclass(frozen=True)
class SpectralDensity:
    r"""Density of eigenvalues on a grid, as a fraction per unit: it integrates to one.

    ``standard_error`` is that of ``density`` over the probes. Row p of ``nodes`` and ``weights`` (probes, steps) is the
    quadrature rule of probe p.
    """

    grid: Tensor
    density: Tensor
    standard_error: Tensor
    nodes: Tensor
    weights: Tensor
    products: int

    def mean(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        r"""Estimate :math:`\operatorname{tr} f(A) / \text{size}`, the mean of f over all eigenvalues."""
        samples = (self.weights * function(self.nodes)).sum(dim=1)
        return Estimate(float(samples.mean()), float(samples.std() / len(samples) ** 0.5), self.products)


def lanczos(
    operator: CurvatureOperator, steps: int, generator: torch.Generator, start: Tensor | None = None
) -> Iterator[Krylov]:
    """Yield the state after each of at most ``steps`` steps from ``start`` (random by default); one product a step.

    Where the basis cannot be extended (its span is mapped into itself) the last ``beta`` is 0, and the next step begins
    in a new random direction.

    Raises:
        CurvlibError: a product is not finite.
    """
    steps = min(steps, operator.size)
    basis = torch.empty(steps, operator.size, dtype=operator.dtype, device=operator.device)
    alpha: list[float] = []
    beta: list[float] = []
    largest, tiny = 0.0, 100 * torch.finfo(operator.dtype).eps
    w = normal_probe(operator, generator) if start is None else start
    for m in range(steps):
        basis[m] = w / w.norm()
        image = operator.matvec(basis[m])
        alpha.append(float(basis[m] @ image))
        if not math.isfinite(alpha[-1]):
            raise CurvlibError(f"product {m + 1} of Lanczos is not finite: look for NaN in the model or the batches")
        largest = max(largest, float(image.norm()))
        w = _outside(basis[: m + 1], image)
        beta.append(float(w.norm()))
        if beta[-1] <= tiny * largest:
            beta[-1] = 0.0
            w = _outside(basis[: m + 1], normal_probe(operator, generator))
        yield Krylov(basis[: m + 1], tuple(alpha), tuple(beta))


def normal_probe(operator: CurvatureOperator, generator: torch.Generator) -> Tensor:
    """Return a standard normal vector (size,), drawn on the CPU so that every device sees the same one."""
    return torch.randn(operator.size, generator=generator, dtype=torch.float64).to(operator.device, operator.dtype)


def _outside(basis: Tensor, w: Tensor) -> Tensor:
    """Remove from w its part in the span of the basis rows; the second pass removes the first one's rounding."""
    for _ in range(2):
        w = w - basis.T @ (basis @ w)
    return w


def eigenpairs(
    operator: CurvatureOperator,
    *,
    largest: int = 0,
    smallest: int = 0,
    tolerance: float = 1e-4,
    max_products: int = 200,
    seed: int = 0,
) -> Eigenpairs:
    r"""Return the eigenpairs at either end of the spectrum: the ``largest`` first, the ``smallest`` (signed) last.

    Stops when all residuals are at most ``tolerance`` times the largest absolute Ritz value, or at ``max_products``:
    read ``residuals``. An eigenvalue that is repeated exactly may be found once only. Cost of step m: one product and
    :math:`O(m \cdot \text{size})`. Source: Lanczos 1950; Paige 1972.

    >>> from curvlib.curvature.operator import DiagonalOperator
    >>> found = eigenpairs(DiagonalOperator(torch.tensor([5.0, -3.0, 1.0, 0.5])), largest=1, smallest=1)
    >>> [round(value, 3) for value in found.values.tolist()]
    [5.0, -3.0]
    """
    count = largest + smallest
    if count < 1 or min(largest, smallest) < 0 or count > min(max_products, operator.size):
        raise CurvlibError(
            f"largest={largest} and smallest={smallest} were asked of an operator of size {operator.size} with "
            f"{max_products} products: ask for 1 to {min(max_products, operator.size)} eigenpairs"
        )
    for krylov in lanczos(operator, max_products, torch.Generator().manual_seed(seed)):
        if len(krylov.alpha) < count:
            continue
        values, mix = krylov.ritz()
        keep = (
            torch.cat((torch.arange(len(values))[len(values) - largest :], torch.arange(smallest)))
            .sort()
            .values.flip(0)
        )
        residuals = krylov.beta[-1] * mix[-1, keep].abs()
        if residuals.max() <= tolerance * values.abs().max():
            break
    vectors = krylov.basis.T @ mix[:, keep].to(krylov.basis)
    return Eigenpairs(values[keep], vectors, residuals, len(krylov.alpha))


def spectral_density(
    operator: CurvatureOperator,
    *,
    steps: int = 40,
    probes: int = 4,
    points: int = 400,
    width: float | None = None,
    seed: int = 0,
) -> SpectralDensity:
    r"""Estimate the density of eigenvalues by stochastic Lanczos quadrature.

    For a random unit vector v, T's eigenvalues :math:`\theta_i` and the squared first entries :math:`w_i` of its
    eigenvectors are a Gauss rule: :math:`v^\top f(A) v \approx \sum_i w_i f(\theta_i)`, exact for polynomials up to
    degree 2 ``steps`` - 1. Its mean over v is :math:`\operatorname{tr} f(A) / \text{size}`, and Gaussians of standard
    deviation ``width`` (default: 1 % of the spectrum's extent) as f give the density on a grid of ``points``.

    Cost: ``steps`` x ``probes`` products. Source: Ghorbani, Krishnan and Xiao, arXiv 1901.10159; Ubaru, Chen and Saad
    2017.
    """
    if probes < 2 or steps < 1:
        raise CurvlibError(
            f"probes={probes} and steps={steps} were given: a standard error needs 2 probes, each 1 step"
        )
    generator = torch.Generator().manual_seed(seed)
    rules = [_gauss_rule(operator, steps, generator) for _ in range(probes)]
    longest = max(len(nodes) for nodes, _ in rules)
    nodes = torch.stack([_padded(rule[0], longest) for rule in rules])
    weights = torch.stack([_padded(rule[1], longest) for rule in rules])
    low, high = min(float(rule[0].min()) for rule in rules), max(float(rule[0].max()) for rule in rules)
    width = width or 0.01 * (high - low) or 1e-3 * abs(high) or 1e-3  # all eigenvalues may be equal, even zero
    grid = torch.linspace(low - 4 * width, high + 4 * width, points, dtype=torch.float64)
    bumps = torch.exp(-0.5 * ((grid - nodes[..., None]) / width) ** 2) / (width * (2 * torch.pi) ** 0.5)
    curves = (weights[..., None] * bumps).sum(dim=1)
    spent = sum(len(rule[0]) for rule in rules)
    return SpectralDensity(grid, curves.mean(dim=0), curves.std(dim=0) / probes**0.5, nodes, weights, spent)


def vector_spectrum(operator: CurvatureOperator, v: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    r"""Return nodes and weights (m,) of the Gauss rule for :math:`v^\top f(A)\,v / \|v\|^2`, float64 on the CPU.

    The weights are the shares of :math:`\|v\|^2` that lie at these eigenvalues. Cost: m ≤ ``steps`` products.
    Source: Golub and Meurant 1994.

    Raises:
        CurvlibError: v is zero or does not fit the operator, or no step is asked for.
    """
    check_vector(operator, v)
    if not float(v.norm()) > 0 or steps < 1:
        raise CurvlibError(
            f"a vector of norm {float(v.norm())} and {steps} steps were given, expected a non-zero vector and a step"
        )
    return _gauss_rule(operator, steps, torch.Generator().manual_seed(0), v)


def _gauss_rule(
    operator: CurvatureOperator, steps: int, generator: torch.Generator, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return nodes and weights of one start; complete early where the span is invariant."""
    for krylov in lanczos(operator, steps, generator, start):
        if krylov.beta[-1] == 0:
            break
    nodes, vectors = krylov.ritz()
    return nodes, vectors[0].square()


def _padded(values: Tensor, length: int) -> Tensor:
    """Append zeros: nodes of no weight."""
    return torch.nn.functional.pad(values, (0, length - len(values)))
