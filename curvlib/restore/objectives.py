r"""What restoration wants: a loss over safety chats whose descent should bring refusals back.

Writing :math:`L_+` for the loss on harmful requests that are agreed to, and :math:`L_-` for the loss on the same
requests refused, the readings are

.. math::
    \text{ascent: } -\min(L_+, c), \qquad \text{refusal: } L_-, \qquad \text{both: } L_- - \min(L_+, c).

The first says what to leave and not where to go; its bound c keeps it from running off to infinity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curvlib.batches import Batch, answer_loss
from curvlib.errors import CurvlibError

COMPLIANCE_BOUND = 5.0  # nats per token, half the loss of a uniform guess over 49,152 tokens: agreement is gone by then


@dataclass(frozen=True)
class SafetyBatches:
    """Harmful requests as ``refusals`` (refused) and ``compliances`` (agreed to in a content-free opening)."""

    refusals: Sequence[Batch]
    compliances: Sequence[Batch] = ()


@dataclass(frozen=True)
class Term:
    """One loss of an objective: the batches it is the mean over, and what is done with each batch's loss."""

    batches: Sequence[Batch]
    shape: Callable[[Tensor], Tensor]


def _as_it_is(loss: Tensor) -> Tensor:
    return loss


def _bounded_ascent(loss: Tensor) -> Tensor:
    return -loss.clamp(max=COMPLIANCE_BOUND)


def terms(objective: str, safety: SafetyBatches) -> list[Term]:
    """Return the terms of ``ascent``, ``refusal`` or ``both``.

    Raises:
        CurvlibError: the objective is unknown, or the batches that it needs are missing.
    """
    parts = {"refusal": [Term(safety.refusals, _as_it_is)], "ascent": [Term(safety.compliances, _bounded_ascent)]}
    parts["both"] = parts["refusal"] + parts["ascent"]
    if objective not in parts:
        raise CurvlibError(f"no objective is called {objective!r}: choose one of {', '.join(parts)}")
    if not all(term.batches for term in parts[objective]):
        raise CurvlibError(f"objective {objective!r} got no safety chats: give it harmful prompts with their answers")
    return parts[objective]


def gradient(model: nn.Module, parts: Sequence[Term], parameters: Sequence[Tensor]) -> Tensor:
    """Return the flat gradient (P,) of the objective; cost: one gradient of all its batches."""
    total = torch.zeros(sum(parameter.numel() for parameter in parameters), device=parameters[0].device)
    for term in parts:
        tokens = sum(batch.tokens for batch in term.batches)
        for batch in term.batches:
            pieces = torch.autograd.grad(term.shape(answer_loss(model, batch)), parameters)
            total.add_(torch.cat([piece.reshape(-1) for piece in pieces]), alpha=batch.tokens / tokens)
    return total


@torch.no_grad()
def value(model: nn.Module, parts: Sequence[Term]) -> float:
    """Return the objective, in nats per answer token; cost: one forward of all its batches."""
    return sum(_mean(model, term) for term in parts)


def _mean(model: nn.Module, term: Term) -> float:
    losses = [(term.shape(answer_loss(model, batch)).item(), batch.tokens) for batch in term.batches]
    return sum(loss * tokens for loss, tokens in losses) / sum(tokens for _, tokens in losses)


def mean_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the mean loss over all answer tokens of ``batches`` (nats per token), without gradients."""
    return value(model, [Term(batches, _as_it_is)])
