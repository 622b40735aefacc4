"""Agreement with curvlinops and hessian-eigenthings on a dense float64 network, where they are installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from curvlib.curvature.fisher import EmpiricalFisherOperator
from curvlib.curvature.ggn import GGNOperator
from curvlib.curvature.hessian import HessianOperator
from tests.cases import MLP, classification, relative_error

Data = tuple[Tensor, Tensor]
INPUTS, LABELS = classification(8)
BATCHES: list[Data] = [(INPUTS[:4], LABELS[:4]), (INPUTS[4:], LABELS[4:])]


def loss(model: nn.Module, batch: Data) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def losses(model: nn.Module, batch: Data) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def ours(model: nn.Module) -> dict[str, Tensor]:
    parameters = list(model.parameters())
    return {
        "hessian": HessianOperator(lambda batch: loss(model, batch), parameters, BATCHES).dense(),
        "ggn": GGNOperator(lambda batch: model(batch[0]), parameters, BATCHES).dense(),
        "fisher": EmpiricalFisherOperator(lambda batch: losses(model, batch), parameters, BATCHES).dense(),
    }


def check(model: nn.Module, peer: dict[str, Tensor]) -> None:
    errors = {name: relative_error(matrix, peer[name]) for name, matrix in ours(model).items()}
    assert max(errors.values()) < 1e-10, errors


def test_hessian_eigenthings() -> None:
    peer: Any = pytest.importorskip("hessian_eigenthings")
    model = MLP()
    operators = {
        "hessian": peer.HessianOperator(model, BATCHES, loss),
        "ggn": peer.GGNOperator(
            model, BATCHES, lambda net, batch: net(batch[0]), lambda z, batch: cross_entropy(z, batch[1])
        ),
        "fisher": peer.EmpiricalFisherOperator(model, BATCHES, losses),
    }
    basis = torch.eye(31, dtype=torch.float64)
    check(model, {name: torch.stack([a.matvec(row) for row in basis]) for name, a in operators.items()})


def test_curvlinops() -> None:
    peer: Any = pytest.importorskip("curvlinops")
    model = MLP()
    arguments = (model, nn.CrossEntropyLoss(), list(model.parameters()), BATCHES)
    kinds = {
        "hessian": peer.HessianLinearOperator,
        "ggn": peer.GGNLinearOperator,
        "fisher": peer.EFLinearOperator,
    }
    basis = torch.eye(31, dtype=torch.float64)
    check(model, {name: kind(*arguments) @ basis for name, kind in kinds.items()})
