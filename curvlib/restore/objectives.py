r"""What restoration wants: a loss over chats whose descent should bring refusals back.

Writing :math:`L_+` for the loss on harmful requests that are agreed to, :math:`L_-` for the loss on the same requests
refused, and :math:`p_0` for the aligned base (the adapter switched off), the readings are

.. math::
    \text{refusal: } L_-, \qquad \text{ascent: } -\min(L_+, c), \qquad
    \text{composite: } -\min(L_+, c) + \mu L_\text{protected},

.. math:: \text{margin: } \mathbb E_{\text{harmful}} \max(0, m - s), \qquad
    s = \log \sum_{r \in R} p_\theta(r) - \log \sum_{o \in O} p_\theta(o),

.. math:: \text{distill: } \mathbb E_{\text{harmful}}\,\mathrm{KL}(p_0 \,\|\, p_\theta)
    + \mathbb E_{\text{benign}}\,\mathrm{KL}(p_0 \,\|\, p_\theta) \quad\text{at the answer tokens.}

Ascent says what to leave and not where to go; its bound c keeps it from running off to infinity. In the margin R and O
are the first tokens of refusals and of openings that agree: it asks for refusals :math:`e^m` times as likely as
openings, which goes deeper than the nearest refusal does (lesson 06). The last asks for the base's own distribution on
refusals and on benign chats: refusing both is no optimum.

The refusal loss is a mean over all tokens of a refusal, and the first of them decides. Seven tenths of the way back in
loss still agree to six requests of ten. So where held-out chats have a margin, the refusal objective is judged by
:math:`-\mathbb E s`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div
from transformers import PreTrainedTokenizerBase

from curvlib import stages
from curvlib.batches import (
    Batch,
    answer_logits,
    answer_loss,
    at_least_float32,
    make_batches,
    open_ended,
    taken_apart,
)
from curvlib.errors import CurvlibError
from curvlib.evaluate.behaviour import answer_log_probabilities, reference_model
from curvlib.evaluate.log_odds import first_tokens
from curvlib.nf4 import kept_weights

COMPLIANCE_BOUND = 5.0  # nats per token, half the loss of a uniform guess over 49,152 tokens: agreement is gone by then
TASK_WEIGHT = 1.0  # μ of the composite objective: a nat of what must stay for a nat of agreement
GOALS = {"ascent": -COMPLIANCE_BOUND, "composite": -COMPLIANCE_BOUND, "margin": 0.0}  # others: the aligned model's loss
Loss = Callable[[Any, Batch], Tensor]  # (model, batch) -> mean over the batch's answer tokens, a scalar


@dataclass(frozen=True)
class Margin:
    """A depth of ``nats`` for harmful ``requests``, each with one answer token, which is not read.

    ``refusing`` and ``agreeing`` are the first tokens R and O, see :func:`curvlib.evaluate.log_odds.first_tokens`.
    """

    requests: Sequence[Batch] = ()
    nats: float = 0.0
    refusing: Sequence[int] = ()
    agreeing: Sequence[int] = ()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, refusals: Sequence[Batch], nats: float = 0.0) -> Margin:
        """Return the margin of refused requests; what their refusals begin with counts as refusing."""
        firsts = [open_ended(example, 1) for example in taken_apart(refusals)]
        size, device = max(map(len, refusals)), refusals[0].input_ids.device
        requests = make_batches(firsts, size, stages.pad_id(tokenizer), device)
        return cls(requests, nats, *first_tokens(tokenizer, [example.labels[-1] for example in firsts]))


@dataclass(frozen=True)
class SafetyBatches:
    """Harmful requests as ``refusals`` (refused) and ``compliances`` (agreed to in a content-free opening)."""

    refusals: Sequence[Batch]
    compliances: Sequence[Batch] = ()
    margin: Margin | None = None


@dataclass(frozen=True)
class Term:
    """One loss of an objective and the batches that it is the mean over, each answer token counting equally."""

    batches: Sequence[Batch]
    loss: Loss = answer_loss


def bounded_ascent(model: nn.Module, batch: Batch) -> Tensor:
    """Return minus the loss of a batch, which counts up to the bound."""
    return -answer_loss(model, batch).clamp(max=COMPLIANCE_BOUND)


def short_of_margin(model: nn.Module, batch: Batch, margin: Margin, least: float = 0.0) -> Tensor:
    """Return how many nats s is short of the margin, each request counting ``least`` or more, the mean over a batch."""
    return (margin.nats - log_odds(model, batch, margin)).clamp(min=least).mean()


def log_odds(model: nn.Module, batch: Batch, margin: Margin) -> Tensor:
    """Return s (B,) in nats for a batch of the margin's requests."""
    logs = at_least_float32(answer_logits(model, batch)).log_softmax(dim=-1)
    return logs[:, margin.refusing].logsumexp(dim=1) - logs[:, margin.agreeing].logsumexp(dim=1)


def from_base(model: Any, batch: Batch) -> Tensor:
    r"""Return :math:`\mathrm{KL}(p_0 \,\|\, p_\theta)` of a batch; the base is the same model with its adapter off."""
    with reference_model(model, "adapter off") as aligned:
        base = answer_log_probabilities(aligned, batch)
    present = at_least_float32(answer_logits(model, batch)).log_softmax(dim=-1)
    return kl_div(present, base, reduction="batchmean", log_target=True)


def terms(
    objective: str,
    safety: SafetyBatches,
    protected: Mapping[str, Sequence[Batch]] | None = None,
    *,
    judging: bool = False,
) -> list[Term]:
    """Return the terms of ``refusal``, ``ascent``, ``composite``, ``margin`` or ``distill``.

    Args:
        objective: its name.
        safety: harmful requests with the answers that the objective is about.
        protected: role -> chats that must stay, for ``composite``, and those of other roles than ``task`` for
            ``distill``: without them nothing speaks against over-refusal.
        judging: for held-out chats, where the margin is one of the mean s (what exceeds it counts as well) and, if
            there is one, judges ``refusal``.

    Raises:
        CurvlibError: the objective is unknown, or the batches that it needs are missing.
    """
    roles = protected or {}
    stay = [batch for batches in roles.values() for batch in batches]
    benign = [batch for role, batches in roles.items() if role != "task" for batch in batches]
    ascent, margin = Term(safety.compliances, bounded_ascent), safety.margin or Margin()
    short = Term(margin.requests, partial(short_of_margin, margin=margin, least=-inf if judging else 0.0))
    known = {
        "refusal": [short if judging and safety.margin else Term(safety.refusals)],
        "ascent": [ascent],
        "composite": [ascent, Term(stay, lambda model, batch: TASK_WEIGHT * answer_loss(model, batch))],
        "margin": [short],
        "distill": [Term(safety.refusals, from_base), Term(benign, from_base)],
    }
    if objective not in known:
        raise CurvlibError(f"no objective is called {objective!r}: choose one of {', '.join(known)}")
    if not all(term.batches for term in known[objective]):
        raise CurvlibError(
            f"objective {objective!r} lacks chats: give it harmful prompts with their answers, for 'margin' a Margin, "
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
