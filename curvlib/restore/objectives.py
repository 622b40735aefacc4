r"""What restoration wants: a loss over chats whose descent should bring refusals back.

Writing :math:`L_+` for the loss on harmful requests that are agreed to, :math:`L_-` for the loss on the same requests
refused, and :math:`p_0` for the aligned base (the adapter switched off), the readings are

.. math::
    \text{refusal: } L_-, \qquad \text{ascent: } -\min(L_+, c), \qquad
    \text{composite: } -\min(L_+, c) + \mu L_\text{protected},

.. math:: \text{margin: } \mathbb E_{\text{harmful}} \max(0, m - s), \qquad
    s = \log p_\theta(\text{refusal}) - \log p_\theta(\text{opening}),

.. math:: \text{distill: } \mathbb E_{\text{harmful}}\,\mathrm{KL}(p_0 \,\|\, p_\theta)
    + \mathbb E_{\text{benign}}\,\mathrm{KL}(p_0 \,\|\, p_\theta) \quad\text{at the answer tokens.}

Ascent says what to leave and not where to go; its bound c keeps it from running off to infinity. The margin asks for a
refusal that is :math:`e^m` times as likely as an opening, which goes deeper than the nearest refusal does. The last
asks for the base's own distribution on refusals and on benign chats: refusing both is no optimum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from curvlib.batches import IGNORED, Batch, Example, answer_logits, answer_loss, at_least_float32, chat_losses, collate
from curvlib.errors import CurvlibError
from curvlib.evaluate.behaviour import answer_log_probabilities, reference_model
from curvlib.nf4 import kept_weights

COMPLIANCE_BOUND = 5.0  # nats per token, half the loss of a uniform guess over 49,152 tokens: agreement is gone by then
TASK_WEIGHT = 1.0  # μ of the composite objective: a nat of what must stay for a nat of agreement
MARGIN = 5.0  # nats: a refusal is 150 times as likely as an opening
GOALS = {"ascent": -COMPLIANCE_BOUND, "composite": -COMPLIANCE_BOUND, "margin": 0.0}  # others: the aligned model's loss
Loss = Callable[[Any, Batch], Tensor]  # (model, batch) -> mean over the batch's answer tokens, a scalar


@dataclass(frozen=True)
class SafetyBatches:
    """Harmful requests as ``refusals`` (refused) and ``compliances`` (agreed to in a content-free opening).

    ``pairs`` are batches of :func:`paired`, for the margin.
    """

    refusals: Sequence[Batch]
    compliances: Sequence[Batch] = ()
    pairs: Sequence[Batch] = ()


def paired(refusals: Sequence[Example], openings: Sequence[Example], batch_size: int, pad_id: int) -> list[Batch]:
    """Return batches of requests refused, followed by the same requests agreed to, in the same order.

    Raises:
        CurvlibError: there are not as many of the ones as of the others.
    """
    if len(refusals) != len(openings):
        raise CurvlibError(f"{len(refusals)} refusals and {len(openings)} openings: give both for each request")
    parts = [slice(start, start + batch_size) for start in range(0, len(refusals), batch_size)]
    return [collate([*refusals[part], *openings[part]], pad_id) for part in parts]


@dataclass(frozen=True)
class Term:
    """One loss of an objective and the batches that it is the mean over, each answer token counting equally."""

    batches: Sequence[Batch]
    loss: Loss = answer_loss


def bounded_ascent(model: nn.Module, batch: Batch) -> Tensor:
    """Return minus the loss of a batch, which counts up to the bound."""
    return -answer_loss(model, batch).clamp(max=COMPLIANCE_BOUND)


def short_of_margin(model: nn.Module, batch: Batch) -> Tensor:
    """Return how many nats s is short of the margin, the mean over a batch of :func:`paired`."""
    return (MARGIN - log_odds(model, batch)).clamp(min=0).mean()


def log_odds(model: nn.Module, batch: Batch) -> Tensor:
    """Return s (B,) in nats for the requests of a batch of :func:`paired`, summed over answer tokens."""
    tokens = (batch.labels != IGNORED).sum(dim=1)
    refused, agreed = (chat_losses(model, batch) * tokens.to(next(model.parameters()).device)).chunk(2)
    return agreed - refused


def from_base(model: Any, batch: Batch) -> Tensor:
    r"""Return :math:`\mathrm{KL}(p_0 \,\|\, p_\theta)` of a batch; the base is the same model with its adapter off."""
    with reference_model(model, "adapter off") as aligned:
        base = answer_log_probabilities(aligned, batch)
    present = at_least_float32(answer_logits(model, batch)).log_softmax(dim=-1)
    return kl_div(present, base, reduction="batchmean", log_target=True)


def terms(objective: str, safety: SafetyBatches, protected: Mapping[str, Sequence[Batch]] | None = None) -> list[Term]:
    """Return the terms of ``refusal``, ``ascent``, ``composite``, ``margin`` or ``distill``.

    Args:
        objective: its name.
        safety: harmful requests with the answers that the objective is about.
        protected: role -> chats that must stay, for ``composite``, and those of other roles than ``task`` for
            ``distill``: without them nothing speaks against over-refusal.

    Raises:
        CurvlibError: the objective is unknown, or the batches that it needs are missing.
    """
    roles = protected or {}
    stay = [batch for batches in roles.values() for batch in batches]
    benign = [batch for role, batches in roles.items() if role != "task" for batch in batches]
    ascent = Term(safety.compliances, bounded_ascent)
    known = {
        "refusal": [Term(safety.refusals)],
        "ascent": [ascent],
        "composite": [ascent, Term(stay, lambda model, batch: TASK_WEIGHT * answer_loss(model, batch))],
        "margin": [Term(safety.pairs, short_of_margin)],
        "distill": [Term(safety.refusals, from_base), Term(benign, from_base)],
    }
    if objective not in known:
        raise CurvlibError(f"no objective is called {objective!r}: choose one of {', '.join(known)}")
    if not all(term.batches for term in known[objective]):
        raise CurvlibError(
            f"objective {objective!r} lacks chats: give it harmful prompts with their answers, for 'margin' in pairs, "
            "for 'composite' and 'distill' chats that must stay"
        )
    return known[objective]


def gradient(model: nn.Module, parts: Sequence[Term], parameters: Sequence[Tensor]) -> Tensor:
    """Return the flat gradient (P,) of the objective; cost: one gradient of all its batches."""
    size = sum(parameter.numel() for parameter in parameters)
    total = torch.zeros(size, dtype=parameters[0].dtype, device=parameters[0].device)
    with kept_weights(model):
        for term in parts:
            tokens = sum(batch.tokens for batch in term.batches)
            for batch in term.batches:
                pieces = torch.autograd.grad(term.loss(model, batch), parameters)
                total.add_(torch.cat([piece.reshape(-1) for piece in pieces]), alpha=batch.tokens / tokens)
    if not bool(torch.isfinite(total).all()):
        raise CurvlibError(
            "the gradient is not finite: a weight or a loss of the model is broken, or a step was too large"
        )
    return total


@torch.no_grad()
def value(model: nn.Module, parts: Sequence[Term]) -> float:
    """Return the objective, in nats per answer token; cost: one forward of all its batches."""
    with kept_weights(model):
        return sum(_mean(model, term) for term in parts)


def _mean(model: nn.Module, term: Term) -> float:
    losses = [(term.loss(model, batch).item(), batch.tokens) for batch in term.batches]
    return sum(loss * tokens for loss, tokens in losses) / sum(tokens for _, tokens in losses)


def mean_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the mean loss over all answer tokens of ``batches`` (nats per token), without gradients."""
    return value(model, [Term(batches)])
