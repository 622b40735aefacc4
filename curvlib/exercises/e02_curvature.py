"""Checks of notebook 02: a Hessian product, a Gauss-Newton product, conjugate gradients and a trace."""

import math
from functools import partial

import torch
from torch import Tensor
from torch.autograd import functional as autograd
from torch.nn.functional import cross_entropy

from curvlib.exercises.core import Answer, Draw, Probe, close, hint, parts, refuse, require, tensor


def matrices(theta: Tensor) -> list[Tensor]:
    """The weights (5, 4) and (3, 5) of a network from its 35 parameters."""
    return [theta[:20].view(5, 4), theta[20:].view(3, 5)]


def logits(x: Tensor, params: list[Tensor]) -> Tensor:
    """Of three classes, for inputs (n, 4), through five hidden units."""
    return torch.tanh(x @ params[0].T) @ params[1].T


def loss(x: Tensor, y: Tensor, params: list[Tensor]) -> Tensor:
    """Mean cross-entropy."""
    return cross_entropy(logits(x, params), y)


def hessian_product(answer: Answer, draw: Draw) -> None:
    """Against the dense Hessian."""
    x, y, theta, v = draw.normal(9, 4), torch.randint(0, 3, (9,), generator=draw), draw.normal(35), draw.normal(35)
    params = [part.clone().requires_grad_() for part in matrices(theta)]
    g = autograd.jacobian(lambda flat: loss(x, y, matrices(flat)), theta)
    H = autograd.hessian(lambda flat: loss(x, y, matrices(flat)), theta)
    with hint("does not require grad", "autograd kept no graph of the first gradient: create_graph=True"):
        raw, other = (answer(partial(loss, x, y, params), params, each) for each in (v, -3 * v))
    value = tensor(raw, 35)
    refuse(value, "that is the gradient: differentiate gᵀv once more", g)
    refuse(value, "g (gᵀv) is the empirical Fisher's product: differentiate gᵀv once more", g * (g @ v))
    refuse(value, "the result does not depend on v: differentiate gᵀv, not gᵀg", tensor(other, 35))
    error = float((value - H @ v).norm() / (H @ v).norm())
    require(error < 1e-6, f"it differs from the dense Hessian's product by {error:.0e} of its length")
    graph = getattr(raw, "requires_grad", False)
    require(not graph, "right, but the result carries a graph: detach it, or memory grows with each product", earned=4)


def ggn_product(answer: Answer, draw: Draw) -> None:
    """Against the dense matrix, built from the Jacobian of each logit."""
    x, theta, u, v = draw.normal(9, 4), draw.normal(35), draw.normal(35), draw.normal(35)
    params = [part.clone().requires_grad_() for part in matrices(theta)]
    J, p = autograd.jacobian(lambda flat: logits(x, matrices(flat)), theta), logits(x, matrices(theta)).softmax(1)
    diagonal, eye = torch.diag_embed(p), torch.eye(3, dtype=torch.float64).expand(9, 3, 3)
    middles = (diagonal - p[:, :, None] * p[:, None], diagonal, eye)
    G, half, plain = (torch.einsum("ncp,ncd,ndq->pq", J, middle, J) / 9 for middle in middles)
    value, other = (tensor(answer(partial(logits, x, params), params, each), 35) for each in (v, u))
    refuse(value, "that is a sum over the examples: divide by their number", 9 * G @ v)
    refuse(value, "the - p pᵀ of the softmax's Hessian is missing", half @ v)
    refuse(value, "JᵀJ belongs to a squared error: put the softmax's Hessian between", plain @ v)
    slant = abs(u @ value - v @ other)
    require(slant < 1e-8, "uᵀGv differs from vᵀGu: subtract p (pᵀJv), with the sum over classes weighted by p")
    require(close(value, G @ v), "not Σ Jᵀ(diag p - p pᵀ) J v / N")


def conjugate_gradient(answer: Answer, draw: Draw) -> None:
    """Six different eigenvalues, condition 1,000: some six products solve it; the directions are looked at."""
    basis = torch.linalg.qr(draw.normal(30, 30)).Q
    spectrum = torch.cat([torch.linspace(1, 1000, 6), torch.ones(24)]).double()
    A, b = basis @ spectrum.diag() @ basis.T, 1e-3 * draw.normal(30)
    raw, (matvec, _) = answer.run(Probe(torch.mv, A), b)
    x, count = parts(raw, x=(30,), products=())
    require(matvec.log, "no step was taken: the tolerance is relative to the length of b")
    taken = len(matvec.log)
    require(count == taken, f"{taken} products were taken and {count:.0f} returned: count each product once")
    if taken > 1:
        first, second = (torch.tensor(call[0]).double() for call in matvec.log[:2])
        residual, slant = b - A @ first * (b @ b) / (b @ A @ b), abs(first @ A @ second) / (A @ second).norm()
        steepest = "the second direction is the residual itself, which is steepest descent: add β d"
        refuse(second / second.norm(), steepest, residual / residual.norm())
        conjugate = slant < 1e-6 * first.norm()
        require(conjugate, "the first two directions are not conjugate: β is new rᵀr over old rᵀr")
    error = float((A @ x - b).norm() / b.norm())
    require(error < 1e-6, f"the relative residual is {error:.0e} after {taken} products: is the step rᵀr / dᵀAd?")
    require(taken <= 12, f"{taken} products for six different eigenvalues: stop once the residual is small")
    bent = torch.diag(torch.tensor([1.0, -2.0], dtype=torch.float64))
    x, count = parts(answer(Probe(torch.mv, bent), torch.ones(2, dtype=torch.float64)), x=(2,), products=())
    stop = count == 1 and not x.any()
    require(stop, "dᵀAd ≤ 0 at the first direction: stop there and return x as it is, there is no minimum", earned=6)


def hutchinson_trace(answer: Answer, draw: Draw) -> None:
    """Against the exact trace and the estimator's own theory."""
    A, probes = draw.positive(40), draw.integer(300, 500)
    value, error = map(float, parts(answer(partial(torch.mv, A), 40, probes, draw), value=(), error=()))
    exact, theory = float(A.trace()), math.sqrt(2 / probes) * float((A - A.diag().diag()).norm())
    unit = close(40 * value, exact, 0.2)
    require(not unit, f"{value:.2f} is a fortieth of the trace, {exact:.1f}: probes of length one have E[vvᵀ] = I/n")
    require(abs(value - exact) < 0.3 * exact, f"{value:.2f} where the trace is {exact:.1f}: probes need E[vvᵀ] = I")
    require(error > 0, "the standard error must be positive: how far do the probes' values scatter?")
    require(error < 3 * theory, f"{error / theory:.0f} times too large: the error of a mean is std / sqrt(probes)")
    require(error > theory / 3, "the error is too small: divide the spread by sqrt(probes), not by probes")
    require(abs(value - exact) < 5 * error, f"{abs(value - exact) / error:.0f} standard errors from the trace")
