"""Empirical Fisher products against explicit per-example gradients."""

from __future__ import annotations

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from curvlib.batches import chat_losses
from curvlib.curvature.fisher import EmpiricalFisherOperator, fisher
from curvlib.curvature.ggn import GGNOperator
from curvlib.parameters import trainable
from tests.cases import MLP, batches, classification, explicit_gradients, pair, random, relative_error

X, Y = classification()


def test_logistic_regression() -> None:
    w, t = random(3, seed=1).requires_grad_(), (Y > 0).double()
    slope = (torch.sigmoid(X @ w) - t).detach()
    exact = X.T @ (slope[:, None] ** 2 * X) / len(X)
    found = EmpiricalFisherOperator(
        lambda rows: binary_cross_entropy_with_logits(X[rows] @ w, t[rows], reduction="none"),
        [w],
        [slice(0, 5), slice(5, 7)],
        weights=[5, 2],
    )
    assert relative_error(found.dense(), exact) < 1e-10


def test_network_against_explicit_gradients_and_not_the_ggn() -> None:
    model = MLP()
    parameters = list(model.parameters())
    g = explicit_gradients(cross_entropy(model(X), Y, reduction="none"), parameters)
    operator = EmpiricalFisherOperator(lambda x: cross_entropy(model(x), Y, reduction="none"), parameters, [X])
    assert relative_error(operator.dense(), g.T @ g / len(X)) < 1e-10
    assert relative_error(GGNOperator(model, parameters, [X]).dense(), operator.dense()) > 0.1


def test_4bit_model_matches_its_float64_twin(device: str) -> None:
    model, twin = pair(device)
    g = torch.cat([explicit_gradients(chat_losses(twin, part), list(trainable(twin).values())) for part in batches()])
    v = random(g.shape[1], seed=3).float().to(device)
    exact = g.T @ (g @ v.double()) / len(g)
    assert relative_error(fisher(model, batches()).matvec(v), exact) < 1e-6
    for size in (1, 4):  # 4 + 2 chats: batches count by their chats
        assert relative_error(fisher(twin, batches(size=size)).matvec(v.double()), exact) < 1e-10
