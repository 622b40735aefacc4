"""One curvature product by several routes: curvlib, plain double backward, hessian-eigenthings, curvlinops.

All routes get the same chats of equal length, the same answer positions and the same vector. The peers are called as
their documentation shows; the functions that they differentiate hold no mask, so that torch.func can map them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from curvlib import nf4
from curvlib.batches import Batch, answer_loss, at_least_float32
from curvlib.curvature.fisher import fisher
from curvlib.curvature.forward import flat_gradient
from curvlib.curvature.ggn import ggn
from curvlib.curvature.hessian import hessian
from curvlib.nf4 import four_bit_layers
from curvlib.parameters import flatten, trainable, unflatten

Product = Callable[[Tensor], Tensor]
Sample = dict[str, Tensor]  # input_ids (B, T) and targets (B, K), the last K tokens
PARTS = 4  # chats at once in the Hessian product that works in parts


@dataclass(frozen=True)
class Contestant:
    """A product of one kind by one package; ``installed`` says whether 4-bit layers run on :mod:`curvlib.nf4`."""

    package: str
    kind: str
    make: Callable[[nn.Module, Batch], Product]
    installed: bool = False

    @property
    def measures(self) -> str:
        """The matrix that is multiplied: hessian, ggn or fisher; or the gradient."""
        return self.kind.split()[0]


def sample(batch: Batch) -> Sample:
    """Return a batch of chats of equal length in the form that the peers get."""
    length = batch.answer_length
    return {"input_ids": batch.input_ids, "targets": batch.input_ids[:, -length:]}


def logits(model: Any, chats: Sample) -> Tensor:
    """Return the logits (B K, V) that predict the answer tokens, with operations that every transform can map."""
    ids, targets = chats["input_ids"], chats["targets"]
    end = ids.shape[-1] - 1
    places = torch.arange(end - targets.shape[-1], end, device=ids.device)
    return at_least_float32(model(input_ids=ids, use_cache=False, logits_to_keep=places).logits.flatten(0, 1))


def loss(model: Any, chats: Sample) -> Tensor:
    """Return the mean negative log-likelihood over answer tokens."""
    return cross_entropy(logits(model, chats), chats["targets"].flatten())


def chat_loss(model: Any, chat: Sample) -> Tensor:
    """Return the loss of one chat without a batch dimension."""
    return loss(model, {name: value[None] for name, value in chat.items()})


def chat_losses(model: Any, chats: Sample) -> Tensor:
    """Return each chat's loss, (B,)."""
    targets = chats["targets"]
    return cross_entropy(logits(model, chats), targets.flatten(), reduction="none").view(targets.shape).mean(dim=1)


def gradient(model: nn.Module, batch: Batch) -> Product:
    """The unit of cost: one gradient; the vector is not used."""
    targets = list(trainable(model).values())
    return lambda _: flat_gradient(answer_loss(model, batch), targets)


def plain_hessian(model: nn.Module, batch: Batch) -> Product:
    """Differentiate the gradient, as every tutorial does."""
    targets, chats = list(trainable(model).values()), sample(batch)

    def product(v: Tensor) -> Tensor:
        grads = torch.autograd.grad(loss(model, chats), targets, create_graph=True)
        return flatten(torch.autograd.grad(grads, targets, unflatten(v, targets)))

    return product


def jacobian_product(value: Tensor, targets: list[Tensor], v: Tensor) -> Tensor:
    """Return J v by differentiating Jᵀ w with respect to w."""
    w = torch.zeros_like(value, requires_grad=True)
    pulled = torch.autograd.grad(value, targets, w, create_graph=True)
    (tangent,) = torch.autograd.grad(pulled, w, unflatten(v, targets), retain_graph=True)
    return tangent


def plain_ggn(model: nn.Module, batch: Batch) -> Product:
    """J v by two reverse passes, the loss's Hessian by autograd, one more reverse pass."""
    targets, chats = list(trainable(model).values()), sample(batch)

    def product(v: Tensor) -> Tensor:
        value = logits(model, chats)
        tangent = jacobian_product(value, targets, v)
        leaf = value.detach().requires_grad_()
        (slope,) = torch.autograd.grad(cross_entropy(leaf, chats["targets"].flatten()), leaf, create_graph=True)
        (u,) = torch.autograd.grad(slope, leaf, tangent)
        return flat_gradient(value, targets, u)

    return product


def plain_fisher(model: nn.Module, batch: Batch) -> Product:
    """The chats' slopes along v by two reverse passes, then one more."""
    targets, chats = list(trainable(model).values()), sample(batch)

    def product(v: Tensor) -> Tensor:
        value = chat_losses(model, chats)
        return flat_gradient(value, targets, jacobian_product(value, targets, v) / len(value))

    return product


def eigenthings(kind: str, model: nn.Module, batch: Batch) -> Product:
    """Return hessian-eigenthings' product."""
    peer: Any = importlib.import_module("hessian_eigenthings")
    data = [sample(batch)]
    if kind == "hessian":
        return peer.HessianOperator(model, data, loss).matvec  # type: ignore[no-any-return]
    if kind == "fisher":
        return peer.EmpiricalFisherOperator(model, data, chat_loss).matvec  # type: ignore[no-any-return]
    operator = peer.GGNOperator(model, data, logits, lambda z, chats: cross_entropy(z, chats["targets"].flatten()))
    return operator.matvec  # type: ignore[no-any-return]


class Logits(nn.Module):
    """The model as curvlinops wants it: a module of one argument."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, chats: Sample) -> Tensor:
        """Return :func:`logits`."""
        return logits(self.model, chats)


def curvlinops(kind: str, model: nn.Module, batch: Batch) -> Product:
    """Return curvlinops' product; its Fisher counts each token as an example and is another matrix."""
    peer: Any = importlib.import_module("curvlinops")
    kinds = {"hessian": "HessianLinearOperator", "ggn": "GGNLinearOperator", "fisher": "EFLinearOperator"}
    chats = sample(batch)
    operator = getattr(peer, kinds[kind])(
        Logits(model),
        nn.CrossEntropyLoss(),
        list(trainable(model).values()),
        [(chats, chats["targets"].flatten())],
        check_deterministic=False,  # it would cost another product
        batch_size_fn=lambda X: len(X["input_ids"]),
    )
    return lambda v: operator @ v


def ours(kind: Callable[..., Any], model: nn.Module, batch: Batch, **options: Any) -> Product:
    """Return curvlib's product."""
    product: Product = kind(model, [batch], check=False, **options).matvec
    return product


OURS = (
    Contestant("curvlib", "gradient", gradient, installed=True),
    Contestant("curvlib", "hessian", partial(ours, hessian), installed=True),
    Contestant("curvlib", f"hessian in parts of {PARTS}", partial(ours, hessian, rows=PARTS), installed=True),
    Contestant("curvlib", "ggn", partial(ours, ggn), installed=True),
    Contestant("curvlib", "fisher", partial(ours, fisher), installed=True),
)
PLAIN = (
    Contestant("double backward", "gradient", gradient),
    Contestant("double backward", "hessian", plain_hessian),
    Contestant("double backward", "ggn", plain_ggn),
    Contestant("double backward", "fisher", plain_fisher),
)
OTHERS = tuple(
    Contestant(name, kind, partial(make, kind))
    for name, make in (("hessian-eigenthings", eigenthings), ("curvlinops", curvlinops))
    for kind in ("hessian", "ggn", "fisher")
)
HELPED = (
    Contestant("hessian-eigenthings on curvlib.nf4", "ggn", partial(eigenthings, "ggn"), installed=True),
    Contestant("curvlinops on curvlib.nf4", "ggn", partial(curvlinops, "ggn"), installed=True),
)


def contestants(model: nn.Module) -> tuple[Contestant, ...]:
    """Return all that can be tried on a model; peers on curvlib's 4-bit layer only where there is one."""
    return OURS + PLAIN + OTHERS + (HELPED if four_bit_layers(model) else ())


@contextmanager
def matmul(model: nn.Module, installed: bool) -> Iterator[None]:
    """Run the model's 4-bit layers on :mod:`curvlib.nf4`, or on bitsandbytes' own product."""
    handle = nf4.install(model)
    if not installed:
        handle.remove()
    try:
        yield
    finally:
        nf4.install(model)
