"""The damped inverses: each undoes its damped curvature, dampings are told in the right unit, nonsense is refused."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from curvlib.curvature.ggn import ggn
from curvlib.curvature.hessian import hessian
from curvlib.curvature.inverse import METHODS, Fit, fit
from curvlib.curvature.kfac import ekfac
from curvlib.curvature.lowrank import sampled_fisher
from curvlib.curvature.operator import DiagonalOperator
from curvlib.errors import CurvlibError
from tests import cases

CHATS = cases.batches(4)
WEIGHTS = (0.25, 4.0)


@cache
def fisher(device: str = "cpu") -> Any:
    return sampled_fisher(cases.pair(device)[0], CHATS, samples=1)


def curvature(name: str, device: str = "cpu") -> Any:
    """The matrix that a method stands for, made another way."""
    model = cases.pair(device)[0]
    if name == "diagonal":
        return DiagonalOperator((fisher(device).rows.T @ fisher(device).rows).diagonal())
    if name in ("fisher", "ekfac"):
        return fisher(device) if name == "fisher" else ekfac(model, CHATS, rank=32)
    return (hessian if name == "hessian" else ggn)(model, CHATS)


@pytest.mark.parametrize("name", METHODS)
def test_an_inverse_undoes_its_damped_curvature(name: str, device: str) -> None:
    b, damping = cases.random(fisher().size, dtype=torch.float32).to(device), 10 * fisher(device).scale
    inverse = fit(name, cases.pair(device)[0], CHATS).inverse(damping, products=100)
    x = inverse(b)
    back = x if name == "identity" else curvature(name, device).matvec(x) + damping * x
    assert cases.relative_error(back, b) < 5e-3
    assert cases.relative_error(back + 0.01 * b, b) > 5e-3  # the check can fail
    assert (inverse.solve(b).products > 0) == (name in ("ggn", "lbfgs", "hessian"))


def test_all_dampings_share_one_space() -> None:
    model, b = cases.pair()[0], fisher().rows.sum(dim=0)  # where the curvature is
    fitted, dampings = fit("ggn", model, CHATS), [fisher().scale, 10 * fisher().scale]
    for damping, x in zip(dampings, fitted.solutions(b, dampings, products=12), strict=True):
        assert cases.relative_error(x, fitted.inverse(damping, products=20, tolerance=1e-4)(b)) < 2e-3
        assert cases.relative_error(x, b / damping) > 5e-3  # so that the curvature is seen


def test_a_few_products_for_every_damping_are_those_of_conjugate_gradients() -> None:
    model, b, damping = cases.pair()[0], cases.random(fisher().size, dtype=torch.float32), fisher().scale
    fitted = Fit("ggn", ggn(model, CHATS))
    (x,) = fitted.solutions(b, [damping], products=3)
    assert cases.relative_error(x, fitted.inverse(damping, products=3, tolerance=0)(b)) < 1e-4


@pytest.mark.parametrize("name", ["diagonal", "fisher", "ekfac", "ggn", "hessian"])
def test_a_batch_counts_by_its_weight(name: str) -> None:
    model, v = cases.pair()[0], cases.random(fisher().size, dtype=torch.float32)
    weighted, plain = (_form(fit(name, model, CHATS, weights=weights), v) for weights in (WEIGHTS, None))
    alone = [_form(fit(name, model, [batch]), v) * batch.tokens for batch in CHATS]
    if name in ("ggn", "hessian"):  # nothing is sampled and nothing shared between the batches
        total = sum(batch.tokens for batch in CHATS)
        assert weighted == pytest.approx(sum(w * a for w, a in zip(WEIGHTS, alone, strict=True)) / total, rel=1e-4)
    everything = _form(fit(name, model, CHATS, weights=(3.0, 3.0)), v)
    assert everything == pytest.approx(3 * plain, rel=0.05 if name == "ekfac" else 1e-4)  # of a noisy basis
    assert weighted != pytest.approx(plain, rel=0.01)


def _form(fitted: Fit, v: Tensor) -> float:
    assert fitted.operator
    return float(v @ fitted.operator.matvec(v))


def test_units_and_eigenvalues_are_those_of_the_curvature_itself() -> None:
    model, rows = cases.pair()[0], fisher().rows
    values = {"diagonal": rows.square().sum(dim=0), "fisher": torch.linalg.eigvalsh(rows @ rows.T)}
    for name, spectrum in values.items():
        fitted = fit(name, model, CHATS)
        assert fitted.unit == pytest.approx(float(spectrum.mean()), rel=1e-4)
        assert fitted.above(fitted.unit) == int((spectrum > fitted.unit).sum()) > 0
    layers = fit("ekfac", model, CHATS)
    assert layers.unit == pytest.approx(sum(float(b.trace) for b in layers.operator.blocks) / rows.shape[1])  # type: ignore[union-attr]
    assert layers.unit < fisher().scale / 100  # the unit that damped it to the identity
    assert 0 < (layers.above(layers.unit) or 0) < rows.shape[1]
    exact = fit("ggn", model, CHATS)
    assert exact.unit == pytest.approx(fisher().scale * len(fisher().rows) / fisher().size)
    assert exact.above(1.0) is None
    with pytest.raises(CurvlibError, match="the scale of 'hessian' is not known"):
        _ = fit("hessian", model, CHATS).unit


@pytest.mark.parametrize(
    ("settings", "damping", "message"),
    [
        ({"name": "tea"}, 1.0, "no damped inverse is called 'tea': choose one of identity, diagonal"),
        ({}, 0.0, "damping is 0.0, expected a positive number"),
        ({"name": "ekfac", "batches": []}, 1.0, "'ekfac' got no chats"),
    ],
)
def test_nonsense_is_one_line(settings: dict[str, Any], damping: float, message: str) -> None:
    with pytest.raises(CurvlibError, match=message):
        fit(**{"model": cases.pair()[0], "batches": CHATS, "name": "ggn", **settings}).inverse(damping)
