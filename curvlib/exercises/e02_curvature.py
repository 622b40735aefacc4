"""Checks of notebook 02: a Hessian product, a Gauss-Newton product, conjugate gradients and a trace."""

import math

import torch
from torch import Generator, Tensor
from torch.autograd import functional as autograd
from torch.nn import functional

from curvlib.exercises.core import Answer, Matvec, Probe, close, exercise, hint, number, parts, refuse, require, tensor
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
    refuse(value, "that is the gradient: differentiate gᵀv once more", g)
    refuse(value, "g (gᵀv) is the empirical Fisher's product: differentiate gᵀv once more", g * (g @ v))
    other = tensor(answer(net.loss, net.params, -3 * v), 35)
    refuse(value, "the result does not depend on v: differentiate gᵀv, not gᵀg", other)
    error = float((value - H @ v).norm() / (H @ v).norm())
    require(error < 1e-6, f"it differs from the dense Hessian's product by {error:.0e} of its length")
    graph = getattr(raw, "requires_grad", False)
    require(not graph, "right, but the result carries a graph: detach it, or memory grows with each product", earned=4)


@exercise(points=8)
def ggn_product(answer: Answer, generator: Generator) -> None:
    """Against the dense matrix, built from the Jacobian of each logit."""
    net = Network(generator)
    rows = [torch.autograd.grad(logit, net.params, retain_graph=True) for logit in net.logits().flatten()]
    J = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]).view(9, 3, 35)
    p = net.logits().detach().softmax(1)
    diagonal, eye = torch.diag_embed(p), torch.eye(3, dtype=torch.float64).expand(9, 3, 3)
    middles = (diagonal - p[:, :, None] * p[:, None], diagonal, eye)
    G, half, plain = (torch.einsum("ncp,ncd,ndq->pq", J, middle, J) / 9 for middle in middles)
    u, v = randn(generator, 35), randn(generator, 35)
    value, other = (tensor(answer(net.logits, net.params, each), 35) for each in (v, u))
    refuse(value, "that is a sum over the examples: divide by their number", 9 * G @ v)
    refuse(value, "the - p pᵀ of the softmax's Hessian is missing", half @ v)
    refuse(value, "JᵀJ belongs to a squared error: put the softmax's Hessian between", plain @ v)
    slant = abs(float(u @ value - v @ other))
    require(slant < 1e-8, "uᵀGv differs from vᵀGu: subtract p (pᵀJv), with the sum over classes weighted by p")
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
        residual, image = b - A @ met[0] * (b @ b) / (b @ A @ b), A @ met[1]
        unit, steepest = met[1] / met[1].norm(), residual / residual.norm()
        refuse(unit, "the second direction is the residual itself, which is steepest descent: add β d", steepest)
        slant = float(abs(met[0] @ image) / (met[0].norm() * image.norm()))
        require(slant < 1e-6, "the first two directions are not conjugate: β is new rᵀr over old rᵀr")
    error = float((A @ solution - b).norm() / b.norm())
    require(error < 1e-6, f"the relative residual is {error:.0e} after {count} products: is the step rᵀr / dᵀAd?")
    require(count <= 12, f"{count} products for six different eigenvalues: stop once the residual is small")
    bent = Matvec(torch.diag(torch.tensor([1.0, -2.0], dtype=torch.float64)))
    x, count = parts(answer(bent, torch.ones(2, dtype=torch.float64)), "x", "products")
    stop = count == 1 and not tensor(x, 2).any()
    require(stop, "dᵀAd ≤ 0 at the first direction: stop there and return x as it is, there is no minimum", earned=6)


@exercise(points=4)
def hutchinson_trace(answer: Answer, generator: Generator) -> None:
    """Against the exact trace and the estimator's own theory."""
    A, probes = positive(generator, 40), integer(generator, 300, 500)
    exact, estimate = float(A.trace()), answer(Matvec(A), 40, probes, generator)
    value, error = map(number, parts(estimate, "value", "standard error"))
    unit = close(40 * value, exact, 0.2)
    require(not unit, f"{value:.2f} is a fortieth of the trace, {exact:.1f}: probes of length one have E[vvᵀ] = I/n")
    require(abs(value - exact) < 0.3 * exact, f"{value:.2f} where the trace is {exact:.1f}: probes need E[vvᵀ] = I")
    theory = math.sqrt(2 / probes) * float((A - A.diag().diag()).norm())
    require(error > 0, "the standard error must be positive: how far do the probes' values scatter?")
    require(error < 3 * theory, f"{error / theory:.0f} times too large: the error of a mean is std / sqrt(probes)")
    require(error > theory / 3, "the error is too small: divide the spread by sqrt(probes), not by probes")
    require(abs(value - exact) < 5 * error, f"{abs(value - exact) / error:.0f} standard errors from the trace")
