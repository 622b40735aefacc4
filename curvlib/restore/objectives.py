r"""What restoration wants: a loss over chats whose descent should bring refusals back.

Writing :math:`L_+` for the loss on harmful requests that are agreed to, :math:`L_-` for the loss on the same requests
refused, and :math:`p_0` for the aligned base (the adapter switched off), the readings are

.. math::
    \text{ascent: } -\min(L_+, c), \qquad \text{refusal: } L_-, \qquad \text{both: } L_- - \min(L_+, c), \qquad
    \text{composite: } -\min(L_+, c) + \mu L_\text{task},

.. math:: \text{margin: } \mathbb E_{\text{harmful}} \max(0, m - s), \qquad
    s = \log p_\theta(\text{refusal}) - \log p_\theta(\text{opening}),

.. math:: \text{distill: } \mathbb E_{\text{harmful}}\,\mathrm{KL}(p_0 \,\|\, p_\theta)
    + \mathbb E_{\text{benign}}\,\mathrm{KL}(p_0 \,\|\, p_\theta) \quad\text{at the answer tokens.}

The first says what to leave and not where to go; its bound c keeps it from running off to infinity. The margin asks for
a refusal that is :math:`e^m` times as likely as an opening, which goes deeper than the nearest refusal does. The last
asks for the base's own distribution, on refusals and on benign and benign-edgy chats: refusing both is no optimum.

Restoration stops at the aligned model's value, but where that says nothing: :data:`GOALS` holds an objective's own. For
ascent and composite the aligned model's value lies above the start, so the budget of the protected loss ends them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, pad

from curvlib.batches import (
    IGNORED,
    Batch,
    Example,
    answer_logits,
    answer_loss,
    at_least_float32,
    chat_losses,
    make_batches,
)
from curvlib.errors import CurvlibError
from curvlib.evaluate.behaviour import answer_log_probabilities, reference_model
from curvlib.nf4 import kept_weights

COMPLIANCE_BOUND = 5.0  # nats per token, half the loss of a uniform guess over 49,152 tokens: agreement is gone by then
TASK_WEIGHT = 1.0  # μ of the composite objective: a nat of the task for a nat of agreement
MARGIN = 5.0  # nats: a refusal is 150 times as likely as an opening
GOALS = {"ascent": -COMPLIANCE_BOUND, "composite": -math.inf, "margin": 0.0}  # the others': the aligned model's value
KEPT_BYTES = 1 << 28  # the base's log-probabilities are kept up to 256 MB: 1,365 answer tokens of SmolLM2


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
    batches = []
    for start in range(0, len(refusals), batch_size):
        chosen = slice(start, start + batch_size)
        rows = [make_batches([example], 1, pad_id)[0] for example in [*refusals[chosen], *openings[chosen]]]
        width = max(row.labels.shape[1] for row in rows)
        fills = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORED}
        wide = {
            name: torch.cat([pad(vars(row)[name], (width - row.labels.shape[1], 0), value=fill) for row in rows])
            for name, fill in fills.items()
        }
        batches.append(Batch(**wide))
    return batches


Loss = Callable[[Any, Batch], Tensor]  # (model, batch) -> mean over the batch's answer tokens, a scalar


@dataclass(frozen=True)
class Term:
    """One loss of an objective and the batches that it is the mean over, each answer token counting equally."""

    batches: Sequence[Batch]
    loss: Loss = answer_loss


def _bounded_ascent(model: nn.Module, batch: Batch) -> Tensor:
    return -answer_loss(model, batch).clamp(max=COMPLIANCE_BOUND)


def _weighted(weight: float, model: nn.Module, batch: Batch) -> Tensor:
    return weight * answer_loss(model, batch)


def log_odds(model: nn.Module, batch: Batch) -> Tensor:
    """Return s (B,) in nats for the B requests of a batch of :func:`paired`, summed over each answer's tokens."""
    tokens = (batch.labels != IGNORED).sum(dim=1)
    sums = chat_losses(model, batch) * tokens.to(next(model.parameters()).device)
    refused, agreed = sums.chunk(2)
    return agreed - refused


def _short_of_margin(model: nn.Module, batch: Batch) -> Tensor:
    return (MARGIN - log_odds(model, batch)).clamp(min=0).mean()


class FromBase:
    r"""The loss :math:`\mathrm{KL}(p_0 \,\|\, p_\theta)`, the mean over answer tokens of a batch in nats.

    The base is the same model with its adapter switched off, so no second one is in memory. Its log-probabilities over
    the whole vocabulary are kept for each batch while all of them fit into :data:`KEPT_BYTES`; the base runs again for
    the others, at one forward pass a call.
    """

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Batch, Tensor]] = {}  # holds the batch, so that its address is not used twice
        self.bytes = 0

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        """Return the divergence of one batch, differentiable in the model's parameters."""
        aligned = self.log_probabilities(model, batch)
        present = at_least_float32(answer_logits(model, batch)).log_softmax(dim=-1)
        return kl_div(present, aligned, reduction="batchmean", log_target=True)

    def log_probabilities(self, model: Any, batch: Batch) -> Tensor:
        """Return the base's log-probabilities (N, V) of a batch."""
        if id(batch) in self.kept:
            return self.kept[id(batch)][1]
        with reference_model(model, "adapter off") as aligned:
            values = answer_log_probabilities(aligned, batch)
        if self.bytes + values.nbytes <= KEPT_BYTES:
            self.kept[id(batch)] = batch, values
            self.bytes += values.nbytes
        return values


def terms(
    objective: str, safety: SafetyBatches, task: Sequence[Batch] = (), benign: Sequence[Batch] = ()
) -> list[Term]:
    """Return the terms of ``refusal``, ``ascent``, ``both``, ``composite``, ``margin`` or ``distill``.

    Args:
        objective: its name.
        safety: harmful requests with their answers; ``ascent``, ``both`` and ``composite`` need the compliances.
        task: chats of the task, for ``composite``.
        benign: benign and benign-edgy chats, for ``distill``: without them nothing speaks against over-refusal.

    Raises:
        CurvlibError: the objective is unknown, or the batches that it needs are missing.
    """
    refusal, ascent = Term(safety.refusals), Term(safety.compliances, _bounded_ascent)
    from_base = FromBase()
    known = {
        "refusal": [refusal],
        "ascent": [ascent],
        "both": [refusal, ascent],
        "composite": [ascent, Term(task, partial(_weighted, TASK_WEIGHT))],
        "margin": [Term(safety.pairs, _short_of_margin)],
        "distill": [Term(safety.refusals, from_base), Term(benign, from_base)],
    }
    if objective not in known:
        raise CurvlibError(f"no objective is called {objective!r}: choose one of {', '.join(known)}, return")
    if not all(term.batches for term in known[objective]):
        raise CurvlibError(
            f"objective {objective!r} got no safety chats, or none of another kind that it needs: give it harmful "
            "prompts with their answers, for 'margin' in pairs, for 'distill' benign chats, for 'composite' task chats"
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
