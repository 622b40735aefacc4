"""The subspace keeps lengths and angles of weight space, holds the adapter's step, and has its curvature."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from curvlib.batches import answer_loss
from curvlib.curvature.ggn import ggn
from curvlib.curvature.hessian import hessian
from curvlib.errors import CurvlibError
from curvlib.landscape.directions import Direction, adapter_direction, effective_weight, linear_layers, random_direction
from curvlib.landscape.subspace import spanned_by
from tests import cases
from tests.landscape.test_directions import rescaled

BATCHES = cases.batches(3)


def test_an_adapters_step_lies_inside_with_its_length() -> None:
    step = adapter_direction(cases.nf4_llama())
    vector, share = spanned_by(step, rank=2).project(step)
    assert share == pytest.approx(1, abs=1e-4)
    assert float(vector.norm()) == pytest.approx(step.size, rel=1e-4)
    back = spanned_by(step, rank=2).direction(vector)
    assert all(torch.allclose(back.delta(name), step.delta(name), atol=1e-5) for name in step.chains)
    _, less = spanned_by(step, rank=1).project(step)
    assert 0.4 < less < 0.99


@pytest.mark.parametrize("dense", [False, True])
def test_the_bases_are_the_top_right_singular_vectors(dense: bool) -> None:
    step = random_direction(cases.llama(), seed=0, rank=4)
    step = Direction({name: (step.delta(name),) for name in step.chains}) if dense else step
    for name, basis in spanned_by(step, rank=2).bases.items():
        exact = torch.linalg.svd(step.delta(name), full_matrices=False).Vh[:2]
        assert torch.allclose(basis @ basis.T, torch.eye(2), atol=1e-4)
        assert torch.linalg.svdvals(basis @ exact.T).min() > 0.999


def test_curvature_and_gradient_do_not_depend_on_lora_factors() -> None:
    found = []
    for model in (cases.nf4_llama(), rescaled(cases.nf4_llama(), 7.0)):
        space = spanned_by(adapter_direction(model), rank=2)
        vector, _ = space.project(random_direction(cases.llama(), seed=5))
        with space.attached(model) as parameters:
            product = ggn(model, BATCHES, parameters).matvec(vector)
        found.append(space.direction(product))
    assert all(cases.relative_error(found[1].delta(n), found[0].delta(n)) < 1e-3 for n in found[0].chains)


def test_the_hessian_is_that_of_the_dense_weights() -> None:
    model: Any = cases.llama()
    space = spanned_by(random_direction(model, seed=0, rank=2), rank=2)
    v = cases.random(space.size).float()
    with space.attached(model) as parameters:
        found = hessian(model, BATCHES, parameters).matvec(v)
    weights = {name: layer.weight for name, layer in linear_layers(model).items()}
    direction = space.direction(v)
    whole = hessian(model, BATCHES, weights).matvec(torch.cat([direction.delta(n).reshape(-1) for n in weights]))
    pieces = dict(zip(weights, whole.split([w.numel() for w in weights.values()]), strict=True))
    exact, _ = space.project(Direction({n: (piece.view_as(weights[n]),) for n, piece in pieces.items()}))
    assert cases.relative_error(found, exact) < 1e-3
    assert answer_loss(model, BATCHES[0]).isfinite()


def test_layers_cover_the_vector_and_strangers_are_refused() -> None:
    model = cases.llama()
    step = random_direction(model, seed=0)
    space = spanned_by(step, rank=3)
    assert list(space.layers) == ["layers.0", "layers.1"]
    assert sum(where.stop - where.start for where in space.layers.values()) == space.size
    assert space.size == sum(3 * effective_weight(layer).shape[0] for layer in linear_layers(model).values())
    with pytest.raises(CurvlibError, match="make both from the same model"):
        space.project(Direction(dict(list(step.chains.items())[1:])))
