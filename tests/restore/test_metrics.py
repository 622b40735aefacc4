"""The metrics of restoration: L-BFGS pairs, the unit of damping, and what is refused."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from curvlib.curvature.hessian import hessian
from curvlib.curvature.inverse import damped_inverse
from curvlib.curvature.lowrank import sampled_fisher
from curvlib.errors import CurvlibError
from curvlib.restore.metrics import DRAWS, METRICS, build_metric
from tests import cases

TASK, COMPLIANCES = cases.batches(4, seed=1), cases.batches(4, seed=3)


@cache
def fisher() -> Any:
    return sampled_fisher(cases.pair()[0], TASK, samples=DRAWS, seed=0)


@pytest.mark.parametrize(("name", "sign"), [("lbfgs", 1.0), ("composite", -1.0)])
def test_lbfgs_maps_the_newest_pair_back(name: str, sign: float) -> None:
    model, shift = cases.pair()[0], 100 * fisher().scale  # so much that no pair needs Powell's damping
    along = cases.random(fisher().size, dtype=torch.float32)
    product = hessian(model, TASK).matvec(along) + shift * along
    if sign < 0:
        product -= hessian(model, COMPLIANCES).matvec(along)
    settings = {"damping": 100, "products": 3, "compliances": COMPLIANCES, "along": along}
    metric = build_metric(name, model, TASK, **settings)
    assert cases.relative_error(metric.solve(product).solution, along) < 1e-4
    assert metric.products == 3
    path = [cases.random(fisher().size, seed=seed, dtype=torch.float32) for seed in range(4)]
    followed = build_metric(name, model, TASK, **settings, steps=path)
    assert cases.relative_error(followed.solve(product).solution, along) < 1e-4
    near = {**settings, "damping": 0.1}
    apart = [build_metric(name, model, TASK, **near, steps=steps).solve(path[0]).solution for steps in (path, ())]
    assert cases.relative_error(*apart) > 1e-3
    assert followed.products == 3


@pytest.mark.parametrize("name", ["lbfgs", "composite"])
def test_lbfgs_stays_positive_where_the_curvature_is_not(name: str) -> None:
    metric = build_metric(name, cases.pair()[0], TASK, damping=1e-6, products=6, compliances=COMPLIANCES)
    for seed in range(5):
        b = cases.random(fisher().size, seed=seed, dtype=torch.float32)
        assert float(b @ metric.solve(b).solution) > 0


def test_metrics_are_the_damped_inverses_in_the_unit_of_the_sampled_fisher() -> None:
    model, b = cases.pair()[0], cases.random(fisher().size, dtype=torch.float32)
    for name in ("fisher", "ekfac"):
        found = build_metric(name, model, TASK, damping=0.1, products=1)
        exact = damped_inverse(name, model, TASK, damping=0.1 * fisher().scale, draws=DRAWS)
        assert cases.relative_error(found(b), exact(b)) < 1e-6
        assert found.gradients == {"fisher": 1, "ekfac": 2}[name] * DRAWS * sum(map(len, TASK))
        assert cases.relative_error(build_metric(name, model, TASK, damping=1.0, products=1)(b), exact(b)) > 1e-3


def test_unknown_names_and_missing_chats_are_refused() -> None:
    model = cases.pair()[0]
    with pytest.raises(CurvlibError, match="no metric is called 'euclid': choose one of identity, diagonal, fisher"):
        build_metric("euclid", model, TASK, damping=1.0, products=3)
    for name in METRICS[1:]:
        with pytest.raises(CurvlibError, match=r"got no chats|lacks chats"):
            build_metric(name, model, [], damping=1.0, products=3)
    with pytest.raises(CurvlibError, match="for 'composite' compliances too"):
        build_metric("composite", model, TASK, damping=1.0, products=3)
