"""Checks of notebook 02: a Hessian product, a Gauss-Newton product, conjugate gradients and a trace."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.autograd import functional as autograd
from torch.nn import functional

from curvlib.exercises.core import Answer, Matvec, Probe, close, exercise, hint, number, parts, require, tensor
from curvlib.exercises.draws import integer, positive, randn


class Network(Probe):
    """Nine examples, four inputs, five hidden units, three classes; 35 parameters in two tensors."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.params = [randn(generator, *shape).requires_grad_() for shape in ((5, 4), (3, 5))]
        self.x, self.y = randn(generator, 9, 4), torch.randint(0, 3, (9,), generator=generator)

    def logits(self) -> Tensor:
        """(9, 3), differentiable in the parameters."""
        return torch.tanh(self.x @ self.params[0].T) @ self.params[1].T

    def loss(self) -> Tensor:
        """Mean cross-entropy."""
        return functional.cross_entropy(self.logits(), self.y)

    def loss_at(self, theta: Tensor) -> Tensor:
        """The loss as a function of all 35 parameters in one vector."""
        logits = torch.tanh(self.x @ theta[:20].view(5, 4).T) @ theta[20:].view(3, 5).T
        return functional.cross_entropy(logits, self.y)


@exercise(points=6)
def hessian_product(answer: Answer, generator: Generator) -> None:
    """Against the dense Hessian."""
    net, v = Network(generator), randn(generator, 35)
    theta = torch.cat([param.detach().flatten() for param in net.params])
    g, H = autograd.jacobian(net.loss_at, theta), autograd.hessian(net.loss_at, theta)
    with hint("does not require grad", "autograd kept no graph of the first gradient: create_graph=True"):
        raw = answer(net.loss, net.params, v)
    value = tensor(raw, 35)
    require(not close(value, g), "that is the gradient: differentiate gᵀv once more")
    require(not close(value, g * (g @ v)), "g (gᵀv) is the empirical Fisher's product: differentiate gᵀv once more")
    other = tensor(answer(net.loss, net.params, -3 * v), 35)
    require(not close(value, other), "the result does not depend on v: differentiate gᵀv, not gᵀg")
    error = float((value - H @ v).norm() / (H @ v).norm())
    require(error < 1e-6, f"it differs from the dense Hessian's product by {error:.0e} of its length")
    graph = isinstance(raw, Tensor) and raw.requires_grad
    require(not graph, "right, but the result carries a graph: detach it, or memory grows with each product", earned=4)


@exercise(points=8)
def ggn_product(answer: Answer, generator: Generator) -> None:
    """Against the dense matrix, built from the Jacobian of each logit."""
    net = Network(generator)
    rows = [torch.autograd.grad(logit, net.params, retain_graph=True) for logit in net.logits().flatten()]
    J = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]).view(9, 3, 35)
    p = net.logits().detach().softmax(1)

    def matrix(middle: Tensor) -> Tensor:
        return torch.einsum("ncp,ncd,ndq->pq", J, middle, J) / 9

    diagonal, eye = torch.diag_embed(p), torch.eye(3, dtype=torch.float64).expand(9, 3, 3)
    G, u, v = matrix(diagonal - p[:, :, None] * p[:, None]), randn(generator, 35), randn(generator, 35)
    value, other = (tensor(answer(net.logits, net.params, each), 35) for each in (v, u))
    require(not close(value, 9 * G @ v), "that is a sum over the examples: divide by their number")
    require(not close(value, matrix(diagonal) @ v), "the - p pᵀ of the softmax's Hessian is missing")
    require(not close(value, matrix(eye) @ v), "JᵀJ belongs to a squared error: put the softmax's Hessian between")
    symmetric = abs(float(u @ value - v @ other)) < 1e-8
    require(symmetric, "uᵀGv differs from vᵀGu: subtract p (pᵀJv), with the sum over classes weighted by p")
    require(close(value, G @ v), "not Σ Jᵀ(diag p - p pᵀ) J v / N")


@exercise(points=8)
def conjugate_gradient(answer: Answer, generator: Generator) -> None:
    """Six different eigenvalues, condition 1,000: some six products solve it; the directions are looked at."""
    basis = torch.linalg.qr(randn(generator, 30, 30)).Q
    spectrum = torch.cat([torch.linspace(1, 1000, 6), torch.ones(24)]).double()
    A, b = basis @ spectrum.diag() @ basis.T, 1e-3 * randn(generator, 30)
    (solution, count), (matvec, _) = answer.run(Matvec(A), b)
    solution, count, met = tensor(solution, 30), int(number(count)), torch.tensor(matvec.log).double()
    require(len(met), "no step was taken: the tolerance is relative to the length of b")
    require(count == len(met), f"{len(met)} products were taken and {count} returned: count each product once")
    require(close(met[0] / met[0].norm(), b / b.norm()), "the first direction is b, the residual at x = 0")
    if len(met) > 1:
        residual = b - A @ met[0] * (b @ b) / (b @ A @ b)
        gradient = close(met[1] / met[1].norm(), residual / residual.norm())
        require(not gradient, "the second direction is the residual itself, which is steepest descent: add β d")
        slant = float(abs(met[0] @ A @ met[1]) / (met[0].norm() * (A @ met[1]).norm()))
        require(slant < 1e-6, "the first two directions are not conjugate: β is new rᵀr over old rᵀr")
    error = float((A @ solution - b).norm() / b.norm())
    require(error < 1e-6, f"the relative residual is {error:.0e} after {count} products: is the step rᵀr / dᵀAd?")
    require(count <= 12, f"{count} products for six different eigenvalues: stop once the residual is small")
    bent = Matvec(torch.diag(torch.tensor([1.0, -2.0], dtype=torch.float64)))
    x, count = parts(answer(bent, torch.ones(2, dtype=torch.float64)), "x", "products")
    stopped = count == 1 and not tensor(x, 2).any()
    require(stopped, "dᵀAd ≤ 0 at the first direction: stop there and return x as it is, there is no minimum", earned=6)


@exercise(points=4)
def hutchinson_trace(answer: Answer, generator: Generator) -> None:
    """Against the exact trace and the estimator's own theory."""
    A, probes = positive(generator, 40), integer(generator, 300, 500)
    exact = float(A.trace())
    estimate = answer(Matvec(A), 40, probes, generator)
    value, error = (number(part) for part in parts(estimate, "value", "standard error"))
    unit = abs(value - exact / 40) < 0.2 * exact / 40
    require(not unit, f"{value:.2f} is a fortieth of the trace, {exact:.1f}: probes of length one have E[vvᵀ] = I/n")
    require(abs(value - exact) < 0.3 * exact, f"{value:.2f} where the trace is {exact:.1f}: probes need E[vvᵀ] = I")
    theory = math.sqrt(2 / probes) * float((A - A.diag().diag()).norm())
    require(error > 0, "the standard error must be positive: how far do the probes' values scatter?")
    require(error < 3 * theory, f"{error / theory:.0f} times too large: the error of a mean is std / sqrt(probes)")
    require(error > theory / 3, "the error is too small: divide the spread by sqrt(probes), not by probes")
    require(abs(value - exact) < 5 * error, f"{abs(value - exact) / error:.0f} standard errors from the trace")
