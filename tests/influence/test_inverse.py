"""Inverses: each undoes its damped curvature, damping follows its rule, the displacement is the restoration step."""

from __future__ import annotations

import pytest
import torch

from curvlib.batches import make_batches
from curvlib.curvature.ggn import ggn
from curvlib.curvature.hessian import hessian
from curvlib.curvature.kfac import ekfac
from curvlib.curvature.lowrank import sampled_fisher
from curvlib.errors import CurvlibError
from curvlib.influence.inverse import METHODS, RULE, build_inverse, displacement
from curvlib.influence.toys import toy
from curvlib.parameters import trainable
from curvlib.restore.metrics import DRAWS, build_metric
from tests import cases

CASE = toy(chats=8, poison=2, queries=2)
CHATS = make_batches(CASE.examples, 8, pad_id=0)
SIZE = sum(parameter.numel() for parameter in trainable(CASE.model).values())
B = cases.random(SIZE, dtype=torch.float32)
DAMPING = 5.0


@pytest.mark.parametrize("name", METHODS)
def test_an_inverse_undoes_its_damped_curvature(name: str) -> None:
    inverse = build_inverse(name, CASE.model, CASE.examples, damping=DAMPING, products=100)
    curvature = {
        "fisher": lambda: sampled_fisher(CASE.model, CHATS, samples=1),
        "ekfac": lambda: ekfac(CASE.model, CHATS, rank=32),
        "hessian": lambda: hessian(CASE.model, CHATS),
    }.get(name, lambda: ggn(CASE.model, CHATS))()
    x = inverse(B)
    back = x if name == "identity" else curvature.matvec(x) + DAMPING * x
    assert cases.relative_error(back, B) < 5e-3
    assert cases.relative_error(back + 0.01 * B, B) > 5e-3  # the check can fail
    assert (inverse.solve(B).products > 0) == (name in ("cg", "lbfgs", "neumann", "hessian"))


def test_damping_follows_the_rule_and_is_the_same_for_all() -> None:
    rows = sampled_fisher(CASE.model, CHATS, samples=1).rows
    expected = RULE * float(rows.square().sum()) / len(CASE.examples)
    for name in ("fisher", "ekfac", "cg"):
        assert build_inverse(name, CASE.model, CASE.examples).damping == pytest.approx(expected, rel=1e-5)
    assert build_inverse("ekfac", CASE.model, CASE.examples, factor=1.0).damping == pytest.approx(10 * expected)


def test_the_displacement_of_a_set_is_the_restoration_step() -> None:
    scale = sampled_fisher(CASE.model, CHATS, samples=DRAWS).scale
    metric = build_metric("ekfac", CASE.model, CHATS, damping=0.5, products=1)
    inverse = build_inverse("ekfac", CASE.model, CASE.examples, damping=0.5 * scale)
    step = displacement(CASE.model, inverse, B)
    assert torch.cosine_similarity(step, -metric.solve(B).solution, dim=0) > 1 - 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "tea"}, "no inverse is called 'tea'"),
        ({"name": "cg", "damping": 0.0}, "damping is 0.0, expected a positive number"),
        ({"name": "ekfac", "examples": []}, "no training chats were given"),
    ],
)
def test_nonsense_is_one_line(settings: dict[str, object], message: str) -> None:
    given = {"model": CASE.model, "examples": CASE.examples, **settings}
    with pytest.raises(CurvlibError, match=message):
        build_inverse(**given)  # type: ignore[arg-type]


def test_a_gradient_of_another_size_is_one_line() -> None:
    inverse = build_inverse("identity", CASE.model, CASE.examples)
    with pytest.raises(CurvlibError, match=rf"a gradient of shape \(3,\) was given, expected \({SIZE},\)"):
        displacement(CASE.model, inverse, torch.ones(3))
