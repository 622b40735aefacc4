"""Unlearning and hypergradients, against closed forms, finite differences and the unrolled truth."""

from __future__ import annotations

from copy import deepcopy
from itertools import islice

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from curvlib.curvature.forward import flat_gradient
from curvlib.curvature.hessian import HessianOperator, hessian_vector_product
from curvlib.curvature.operator import DenseOperator, Operator
from curvlib.diffusion.model import CODES, Denoiser, Noised, denoising_loss, handwritten, noised
from curvlib.diffusion.unlearn import after_fine_tuning, ascend, erase, gauss_newton, imitation_loss, matched, released
from curvlib.parameters import assign, flatten, trainable
from tests.cases import random, relative_error

DATA = handwritten()["train"]
FORGET, RETAIN = DATA.rows(DATA.y == 4), DATA.rows(DATA.y != 4)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spectrum(*eigenvalues: float) -> tuple[Operator, Tensor]:
    """A symmetric matrix with these eigenvalues, and its eigenvectors as columns."""
    n = len(eigenvalues)
    q, _ = torch.linalg.qr(random(n, n, seed=3))
    return DenseOperator(q @ torch.diag(torch.tensor(eigenvalues, dtype=q.dtype)) @ q.T), q


class Tiny(nn.Module):
    """Eighteen weights in float64, curved, with the signature of a denoiser."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.5 * random(3, 6, seed=5))

    def forward(self, x: Tensor, t: Tensor, code: Tensor) -> Tensor:
        features = torch.cat([x.flatten(1)[:, 20:23], code[:, :2], t[:, None] / 200], 1).double()
        out = torch.tanh(features @ self.weight.T).sum(1)
        return out.view(-1, 1, 1, 1).expand_as(x)


def batch(images: object, seed: int) -> Noised:
    drawn = noised(images.draw(16, generator(seed)), generator(seed))  # type: ignore[attr-defined]
    return drawn._replace(noise=drawn.noise.double())


def proximal(model: Tiny, tune: Noised, start: Tensor, rho: float) -> None:
    """Newton's method with dense matrices on L(u) + ρ/2 |u - θ|²."""
    parameters = trainable(model)
    assign(parameters, start)
    for _ in range(8):
        here = flatten(parameters)
        slope = flat_gradient(denoising_loss(model, tune), list(parameters.values())) + rho * (here - start)
        H = HessianOperator(lambda b: denoising_loss(model, b), parameters, [tune]).dense()
        assign(parameters, here - torch.linalg.solve(H + rho * torch.eye(len(H), dtype=H.dtype), slope))


def test_matched_is_the_resolvent() -> None:
    H, _ = spectrum(0.0, 0.5, 4.0, 30.0)
    g, reach = random(4, seed=1), 0.2
    exact = torch.linalg.solve(torch.eye(4, dtype=g.dtype) + reach * H.dense(), g)
    assert relative_error(matched(H, g, reach, products=4), exact) < 1e-8
    assert relative_error(matched(H, g, 1.0, products=4), exact) > 0.1  # another reach is another gradient


@pytest.mark.parametrize(("largest", "step"), [(0.9, 1.0), (6.0, 0.25), (40.0, 1 / 32)])
def test_released_is_a_truncated_geometric_series(largest: float, step: float) -> None:
    values = (0.0, 0.3, largest)
    H, q = spectrum(*values)
    g = q @ torch.tensor([1.0, 1.0, 1.0], dtype=q.dtype)
    h = torch.tensor(values, dtype=q.dtype)
    series = (1 - (1 - step * (1 + h)) ** 5) / (1 + h)
    assert relative_error(q.T @ released(H, g, 0.1), series) < 1e-10
    assert torch.equal(released(H, g, 0.1), released(H, g, 5.0))  # it knows nothing of the reach


def test_released_gives_up_where_every_step_diverges() -> None:
    H, q = spectrum(0.0, 300.0)
    assert not released(H, q[:, 1], 0.1).any()


def test_implicit_gradient_against_a_finite_difference_of_the_proximal_fine_tune() -> None:
    model, tune, bad, rho = Tiny(), batch(RETAIN, 0), batch(FORGET, 1), 5.0
    parameters, start = trainable(model), flatten(trainable(model))
    proximal(model, tune, start, rho)
    g = flat_gradient(-denoising_loss(model, bad), list(parameters.values()))
    H = HessianOperator(lambda b: denoising_loss(model, b), parameters, [tune])
    implicit = matched(H, g, 1 / rho, products=18)

    def value(theta: Tensor) -> float:
        proximal(model, tune, theta, rho)
        return -denoising_loss(model, bad).item()

    step = 1e-5
    slopes = [(value(start + step * e) - value(start - step * e)) / (2 * step) for e in torch.eye(18).double()]
    assert relative_error(implicit, torch.tensor(slopes, dtype=g.dtype)) < 1e-5
    assert relative_error(g, torch.tensor(slopes, dtype=g.dtype)) > 0.05


def test_three_matched_products_are_near_the_unrolled_truth_and_the_released_rule_is_not() -> None:
    model = Denoiser()
    parameters = list(model.parameters())
    tune, bad = (noised(images.draw(8, generator(1)), generator(2)) for images in (RETAIN, FORGET))
    path, a = [], 0.01
    for _ in range(5):
        path.append(flatten(parameters))
        assign(parameters, path[-1] - a * flat_gradient(denoising_loss(model, tune), parameters))
    g = flat_gradient(-denoising_loss(model, bad), parameters)
    H = HessianOperator(lambda b: denoising_loss(model, b), trainable(model), [tune], check=False)
    guesses = [matched(H, g, 0.05), matched(gauss_newton(model, [tune]), g, 0.05), released(H, g, 0.05)]
    truth = g.clone()
    for u in reversed(path):
        assign(parameters, u)
        truth = truth - a * hessian_vector_product(lambda: denoising_loss(model, tune), parameters, truth)
    by_hessian, by_gauss_newton, by_released, none = (relative_error(v, truth) for v in (*guesses, g))
    assert by_hessian < 0.25 < by_released
    assert by_gauss_newton < none  # far from a fit the two matrices differ


def test_imitation_is_zero_of_oneself_and_its_target_is_constant() -> None:
    model, tune = Tiny(), batch(RETAIN, 0)
    assert imitation_loss(model, tune, model, tune.code).item() == 0
    loss = imitation_loss(model, tune, model, CODES[7])
    fixed = model(tune.x, tune.t, CODES[7].expand_as(tune.code)).detach()
    exact = flat_gradient((model(tune.x, tune.t, tune.code) - fixed).square().mean(), list(model.parameters()))
    assert relative_error(flat_gradient(loss, list(model.parameters())), exact) < 1e-10


def test_erase_takes_relabelling_steps_whose_weight_is_the_codes_rule() -> None:
    model = Denoiser()
    before = flatten(model.parameters())
    steps = list(islice(erase(model, FORGET, RETAIN), 5))
    assert all(share == max(0.1 - cosine, 0) for _, _, cosine, share in steps)
    assert all(-1 <= cosine <= 1 and kept > 0 and gone > 0 for kept, gone, cosine, _ in steps)
    assert not torch.equal(flatten(model.parameters()), before)


def test_inner_steps_of_erase_act_through_adams_moments_alone() -> None:
    """With Adam's moments thrown away, and the same batches, runs with and without inner steps are one run."""

    class Forgetful(SGD):
        """Gradient descent in Adam's place: it has no moments."""

    def first(inner: int, optimiser: type, monkeypatch: pytest.MonkeyPatch) -> Tensor:
        monkeypatch.setattr("curvlib.diffusion.unlearn.Adam", optimiser)
        model, seen = Denoiser(), deepcopy(RETAIN)
        next(erase(model, FORGET.rows(slice(1)), seen.rows(slice(1)), inner=inner, weight=0.1))
        return flatten(model.parameters())

    with pytest.MonkeyPatch.context() as patch:
        still = [first(inner, Forgetful, patch) for inner in (0, 3)]
        moved = [first(inner, torch.optim.Adam, patch) for inner in (0, 3)]
    assert relative_error(still[1], still[0]) < 1e-2
    assert relative_error(moved[1], moved[0]) > 0


def test_ascent_raises_the_loss_on_what_is_forgotten_and_imitation_spares_the_rest() -> None:
    bad, good = (noised(images.draw(64, generator(8)), generator(9)) for images in (FORGET, RETAIN))
    rise = {}
    for keep in (0.0, 20.0):
        model = Denoiser()
        base = [denoising_loss(model, part).item() for part in (bad, good)]
        assert list(islice(ascend(model, FORGET, RETAIN, 0.5, keep=keep), 6)) == pytest.approx([0.5] * 6)
        rise[keep] = [denoising_loss(model, part).item() - was for part, was in zip((bad, good), base, strict=True)]
    assert rise[0.0][0] > 0
    assert abs(rise[20.0][1]) < rise[0.0][1]


def test_ahead_is_the_first_order_gradient_after_the_fine_tune_and_leaves_the_weights() -> None:
    model, bad = Denoiser(), noised(FORGET.draw(8, generator(1)), generator(2))
    parameters, reaches = list(model.parameters()), []

    def rule(curvature: Operator, gradient: Tensor, reach: float) -> Tensor:
        reaches.append(reach)
        assert curvature.size == gradient.numel()
        return gradient

    start, here = flatten(parameters), flat_gradient(-denoising_loss(model, bad), parameters)
    still = after_fine_tuning(model, RETAIN, rule, [(SGD, 0.0, 2)])(bad, generator())
    ahead = after_fine_tuning(model, RETAIN, rule, [(SGD, 0.01, 5), (SGD, 0.05, 1)])(bad, generator())
    after_fine_tuning(model, RETAIN, rule, [(torch.optim.Adam, 1e-3, 3)])(bad, generator())
    assert torch.equal(flatten(parameters), start)
    assert relative_error(still, here) < 1e-6
    assert relative_error(ahead, here) > 1e-3
    assert reaches[:2] == [0.0, 0.05]
    assert reaches[2] > 0
