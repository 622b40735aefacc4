"""Influence scores, the damped inverses behind them, and two baselines that they must beat.

All follow the convention of :mod:`curvlib.influence`: positive means that training on the chat raised the query loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from curvlib.batches import Example, make_batches
from curvlib.curvature.inverse import Inverse, damped_inverse
from curvlib.errors import CurvlibError
from curvlib.evaluate.likelihood import token_losses
from curvlib.generate import evaluating
from curvlib.influence.gradients import BATCH_SIZE, check_examples, in_batches
from curvlib.prefix import token_positions

Solve = Callable[[Tensor], Tensor]
METHODS = ("identity", "fisher", "ekfac", "cg", "lbfgs", "neumann", "hessian")
RULE = 0.1  # λ as a share of the mean curvature that a chat sees


def influence(rows: Tensor, queries: Tensor, solve: Solve) -> Tensor:
    r"""Return :math:`-\nabla f_q^\top (H + \lambda I)^{-1} \nabla r_i` for each query and chat, (m, n).

    Args:
        rows: gradients of the training chats' shares in the mean loss, (n, P).
        queries: gradients of the query losses, (m, P).
        solve: the damped inverse as a function of one vector (P,), see :func:`build_inverse`.

    The inverse goes to the queries, since they are fewer. Cost: m solves.

    >>> rows = torch.tensor([[1.0, 0.0], [0.0, -2.0]])
    >>> influence(rows, torch.ones(1, 2), lambda b: b / 2)
    tensor([[-0.5000,  1.0000]])

    Raises:
        CurvlibError: no query, or queries over other parameters.
    """
    if queries.ndim != 2 or len(queries) == 0 or queries.shape[1] != rows.shape[1]:
        raise CurvlibError(
            f"query gradients of shape {tuple(queries.shape)} were given, expected (m, {rows.shape[1]}) with m at "
            "least 1: give at least one query, over the parameters of the chats"
        )
    return -torch.stack([solve(query) for query in queries]) @ rows.T


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
    chats = make_batches(examples, BATCH_SIZE, 0, next(model.parameters()).device)
    method = "ggn" if name == "cg" else name
    return damped_inverse(method, model, chats, damping=damping, factor=factor, products=products, seed=seed)


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
