"""Influence scores, the baselines that they must beat, and their pieces by token and sums by group.

All follow the convention of :mod:`curvlib.influence`: positive means that training on the chat raised the query loss.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from curvlib.batches import IGNORED, Batch, Example, answer_logits, answer_targets, at_least_float32, make_batches
from curvlib.curvature.forward import jacobian_vector_product
from curvlib.curvature.inverse import Inverse, damped_inverse
from curvlib.errors import CurvlibError
from curvlib.evaluate.likelihood import token_losses
from curvlib.generate import evaluating
from curvlib.influence.gradients import BATCH_SIZE, Gradients, check_examples, in_batches
from curvlib.parameters import trainable
from curvlib.prefix import token_positions

Solve = Callable[[Tensor], Tensor]
METHODS = ("identity", "fisher", "ekfac", "cg", "lbfgs", "neumann", "hessian")
RULE = 0.1  # λ as a share of the mean curvature that a chat sees


def influence(gradients: Gradients, queries: Tensor, solve: Solve) -> Tensor:
    r"""Return :math:`-\nabla f_q^\top (H + \lambda I)^{-1} \nabla r_i` for each query and chat, (m, n).

    Args:
        gradients: of the training chats' shares in the mean loss.
        queries: gradients of the query losses, (m, P).
        solve: the damped inverse as a function of one vector (P,), see :func:`build_inverse`.

    The inverse goes to the queries, since they are fewer. Cost: m solves and one pass over the stored gradients.

    >>> rows = torch.tensor([[1.0, 0.0], [0.0, -2.0]])
    >>> influence(Gradients(2, 2, ((torch.arange(2), rows),)), torch.ones(1, 2), lambda b: b / 2)
    tensor([[-0.5000,  1.0000]])

    Raises:
        CurvlibError: no query, or queries over other parameters.
    """
    _check(queries)
    return -gradients.dot(torch.stack([solve(query) for query in queries]))


def build_inverse(
    name: str,
    model: nn.Module,
    examples: Sequence[Example],
    *,
    damping: float | None = None,
    factor: float = RULE,
    products: int = 30,
    seed: int = 0,
) -> Inverse:
    r"""Return the damped inverse curvature of the training chats, or of a random part of them.

    See :func:`curvlib.curvature.inverse.damped_inverse`; ``cg`` is its ``ggn``. Where the training objective holds a
    ridge :math:`\tfrac\lambda2 \|\theta - \theta_0\|^2`, its λ is the damping to take.

    Raises:
        CurvlibError: unknown name, no chat, a chat beyond the context, or a damping that is not positive.
    """
    if name not in METHODS:
        raise CurvlibError(f"no inverse is called {name!r}: choose one of {', '.join(METHODS)}")
    check_examples(model, examples, "training chats")
    method, chats = "ggn" if name == "cg" else name, make_batches(examples, BATCH_SIZE, pad_id=0)
    return damped_inverse(method, model, chats, damping=damping, factor=factor, products=products, seed=seed)


def displacement(model: nn.Module, inverse: Solve, gradient: Tensor) -> Tensor:
    r"""Return :math:`-(H + \lambda I)^{-1} g`, (P,): where the optimum goes when a set with gradient g is added.

    This is influence read as a direction: an influence is its inner product with a query's gradient, and with g that of
    the safety set it is the restoration step in the metric of the training chats.
    """
    size = sum(parameter.numel() for parameter in trainable(model).values())
    if gradient.shape != (size,):
        raise CurvlibError(f"a gradient of shape {tuple(gradient.shape)} was given, expected ({size},)")
    return -inverse(gradient)


def dot_product(gradients: Gradients, queries: Tensor) -> Tensor:
    r"""Return :math:`-\nabla f_q^\top \nabla r_i`, (m, n): one plain gradient step (TracIn, arXiv 2002.08484)."""
    _check(queries)
    return -gradients.dot(queries)


def cosine(gradients: Gradients, queries: Tensor) -> Tensor:
    """Return minus the cosine between the gradients of each query and each chat, (m, n)."""
    _check(queries)
    return -gradients.dot(normalize(queries, dim=1)) / gradients.norms().clamp(min=1e-30).to(queries)


def gradient_norm(gradients: Gradients) -> Tensor:
    """Return minus the length of each chat's gradient, (n,): it takes every chat to lower every loss."""
    return -gradients.norms()


def loss_baseline(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    """Return minus each chat's mean loss, (n,): what the model finds hard is taken to have mattered most."""
    check_examples(model, examples, "training chats")
    return -torch.stack([losses.mean() for losses in token_losses(model, examples, BATCH_SIZE)])


def embedding_similarity(model: nn.Module, examples: Sequence[Example], queries: Sequence[Example]) -> Tensor:
    """Return minus the cosine between the last hidden states, averaged over the tokens, of queries and chats, (m, n).

    The states are centred first: their common mean is large and says nothing.
    """
    check_examples(model, examples, "training chats")
    check_examples(model, queries, "query chats")
    seen, asked = (_states(model, chats) for chats in (examples, queries))
    centre = seen.mean(dim=0)
    return -normalize(asked - centre, dim=1) @ normalize(seen - centre, dim=1).T


def token_influence(
    model: nn.Module, examples: Sequence[Example], direction: Tensor, *, batch_size: int = BATCH_SIZE
) -> list[Tensor]:
    r"""Return for each chat the influence of each of its answer tokens, (K_i,); they add up to the chat's.

    A share :math:`r_i` is a sum over answer tokens, hence :math:`I_i = -\sum_t \dot r_{it}` with the derivative
    along ``direction`` :math:`= (H + \lambda I)^{-1} \nabla f`, (P,). A forward-mode pass gives that of every token at
    once, so no gradient is stored: with one query this is the cheapest way to score a set.

    Cost: about two forward passes of all chats.
    """
    check_examples(model, examples, "training chats")
    total = sum(example.tokens for example in examples)
    found: dict[int, Tensor] = {}
    for index, batch in in_batches(examples, batch_size):
        _, rates = jacobian_vector_product(partial(_token_losses, model, batch), trainable(model), direction)
        found |= zip(index, (-rates / total).split((batch.labels != IGNORED).sum(1).tolist()), strict=True)
    return [found[number] for number in range(len(examples))]


def group_influence(scores: Tensor, groups: Sequence[Hashable]) -> dict[Hashable, Tensor]:
    """Return group -> the summed influence (m,) of its chats, from scores (m, n) and each chat's group.

    >>> group_influence(torch.tensor([[1.0, 2.0, 4.0]]), ["a", "b", "a"])
    {'a': tensor([5.]), 'b': tensor([2.])}
    """
    if scores.ndim != 2 or scores.shape[1] != len(groups):
        raise CurvlibError(f"scores of shape {tuple(scores.shape)} and {len(groups)} groups: give one group a chat")
    return {
        group: scores[:, [number for number, other in enumerate(groups) if other == group]].sum(dim=1)
        for group in dict.fromkeys(groups)
    }


def _check(queries: Tensor) -> None:
    if queries.ndim != 2 or len(queries) == 0:
        raise CurvlibError(
            f"query gradients of shape {tuple(queries.shape)} were given, expected (m, P) with m at least 1: "
            "give at least one query"
        )


def _token_losses(model: nn.Module, batch: Batch) -> Tensor:
    logits = at_least_float32(answer_logits(model, batch))
    return cross_entropy(logits, answer_targets(batch).to(logits.device), reduction="none")


def _states(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    """Return the mean over tokens of each chat's last hidden state, (n, d)."""
    found: dict[int, Tensor] = {}
    device = next(model.parameters()).device
    with evaluating(model):
        for index, batch in in_batches(examples, BATCH_SIZE):
            mask = batch.attention_mask.to(device)
            states = model(
                input_ids=batch.input_ids.to(device),
                attention_mask=mask,
                position_ids=token_positions(mask),
                use_cache=False,
                logits_to_keep=1,
                output_hidden_states=True,
            ).hidden_states[-1]
            means = (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
            found |= zip(index, means.float().cpu(), strict=True)
    return torch.stack([found[number] for number in range(len(examples))])
