"""Each metric's solver against the dense matrix that it stands for."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from curvlib.curvature.ggn import ggn
from curvlib.curvature.hessian import hessian
from curvlib.curvature.kfac import ekfac
from curvlib.curvature.lowrank import sampled_fisher
from curvlib.errors import CurvlibError
from curvlib.restore import metrics
from curvlib.restore.metrics import METRICS, build_metric
from tests import cases

TASK, COMPLIANCES = cases.batches(4, seed=1), cases.batches(4, seed=3)


@cache
def fisher() -> Any:
    return sampled_fisher(cases.pair()[0], TASK, samples=metrics.DRAWS, seed=0)


def test_identity_is_the_identity() -> None:
    b = cases.random(5, dtype=torch.float32)
    assert torch.equal(build_metric("identity", cases.pair()[0], [], damping=1.0, products=1).solve(b).solution, b)


@pytest.mark.parametrize(("name", "damping"), [("fisher", 0.1), ("ggn", 0.1), ("ekfac", 0.1), ("hessian", 3.0)])
def test_a_solver_inverts_its_damped_matrix(name: str, damping: float) -> None:
    model, shift = cases.pair()[0], damping * fisher().scale
    operators = {
        "fisher": fisher,
        "ggn": lambda: ggn(model, TASK),
        "hessian": lambda: hessian(model, TASK),
        "ekfac": lambda: ekfac(model, TASK, rank=metrics.EKFAC_RANK),
    }
    matrix = operators[name]().damped(shift)
    b = cases.random(matrix.size, dtype=torch.float32)
    found = build_metric(name, model, TASK, damping=damping, products=80).solve(b)
    product = matrix.matvec(found.solution)
    assert cases.relative_error(product, b) < 2e-2
    assert float(found.solution @ product) == pytest.approx(float(found.solution @ b), rel=1e-3)
    assert (found.products > 0) == (name in ("ggn", "hessian"))
    assert cases.relative_error(matrix.matvec(b / shift), b) > 2e-2  # so that the matrix is seen


@pytest.mark.parametrize(("name", "passes"), [("identity", 0), ("fisher", 1), ("ggn", 1), ("ekfac", 3)])
def test_building_a_metric_counts_its_passes(name: str, passes: int) -> None:
    model, counted = cases.pair()[0], metrics.DRAWS * sum(map(len, TASK))
    assert build_metric(name, model, TASK, damping=0.1, products=1).gradients == passes * counted


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


@pytest.mark.parametrize("name", ["lbfgs", "composite"])
def test_lbfgs_stays_positive_where_the_curvature_is_not(name: str) -> None:
    metric = build_metric(name, cases.pair()[0], TASK, damping=1e-6, products=6, compliances=COMPLIANCES)
    for seed in range(5):
        b = cases.random(fisher().size, seed=seed, dtype=torch.float32)
        assert float(b @ metric.solve(b).solution) > 0


def test_negative_curvature_of_the_hessian_is_told() -> None:
    b = cases.random(fisher().size, dtype=torch.float32)
    for name, found in (("hessian", True), ("ggn", False)):
        metric = build_metric(name, cases.pair()[0], TASK[:1], damping=1e-4, products=12)
        assert (metric.solve(b).negative_curvature is not None) == found


def test_unknown_names_and_missing_chats_are_refused() -> None:
    model = cases.pair()[0]
    with pytest.raises(CurvlibError, match="no metric is called 'euclid': choose one of identity, fisher"):
        build_metric("euclid", model, TASK, damping=1.0, products=3)
    for name in METRICS[1:]:
        with pytest.raises(CurvlibError, match="got no chats to protect"):
            build_metric(name, model, [], damping=1.0, products=3)
    with pytest.raises(CurvlibError, match="'composite' got no compliances"):
        build_metric("composite", model, TASK, damping=1.0, products=3)


def test_a_saved_metric_inverts_its_damped_model_without_chats() -> None:
    model = ekfac(cases.pair()[0], TASK, rank=metrics.EKFAC_RANK)
    b = cases.random(model.size, dtype=torch.float32)
    shift = 0.5 * sum(float(block.trace) for block in model.blocks) / 8
    found = metrics.SavedMetric(model, rows=8).damped(0.5).solve(b)
    assert cases.relative_error(model.matvec(found.solution) + shift * found.solution, b) < 1e-3
    assert found.products == 0
