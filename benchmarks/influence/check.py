r"""Does a contestant compute influence at all? Its scores on a tiny Llama against float64 arithmetic.

Two questions, with planted faults for each in the tests. With a damping far above the curvature every method is
:math:`D = -\nabla f^\top \nabla r / \lambda`: sign, scale, order, damping and gradients must be right to rounding. With
a smaller one the approximations differ; yet they must rank the chats as the dense Gauss-Newton matrix does, and what
they change in D must point where its change points.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.influence.contestants import Contestant
from benchmarks.influence.work import Work
from curvlib.batches import Batch, Example, answer_logits, answer_loss, make_batches, taken_apart
from curvlib.influence.validate import rank_correlations
from curvlib.parameters import trainable
from tests import cases

LARGE, SMALL = 1e4, 0.1  # of the mean curvature that a chat sees
ROUNDING = 0.02  # products in bfloat16 are 0.2 % off; bitsandbytes' own product rounds as much
LEAST = 0.85  # rank correlation with the exact scores; 0.91 to 0.94 for all methods here
BENT = 0.25  # cosine of the changes; 0.42 for 16 chats' sampled Fisher matrix, 0.87 to 0.95 for the others


@dataclass(frozen=True)
class Agreement:
    """How near scores are to the exact ones.

    Attributes:
        dot_product_error: relative error at large damping.
        rank_correlation: at small damping, mean over queries.
        curvature_cosine: there, between what curvature changes in these scores and in the exact ones.
    """

    dot_product_error: float
    rank_correlation: float
    curvature_cosine: float

    @property
    def fault(self) -> str | None:
        """What is wrong in one line, or None."""
        if not self.dot_product_error < ROUNDING:
            return f"other scores: {self.dot_product_error:.2g} away from dot products of gradients at large damping"
        if not self.rank_correlation > LEAST:
            return f"another order: rank correlation {self.rank_correlation:.2g} with exact scores"
        if not self.curvature_cosine > BENT:
            return f"another curvature: its effect has a cosine of {self.curvature_cosine:.2g} with the exact one"
        return None


def agreement(contestant: Contestant, folder: Path, *, four_bit: bool = False, device: str = "cpu") -> Agreement:
    """Compare a contestant with exact scores on a tiny Llama, dense or in NF4; cost: seconds."""
    work, (far, near) = reference(four_bit)
    found = []
    for factor in (LARGE, SMALL):
        place = folder / f"check-{factor:g}"
        place.mkdir(parents=True)
        asked = replace(work, damping=work.damping * factor, folder=place)
        found.append(contestant.score(tiny(four_bit, contestant.installed).to(device), asked).double())
    dots = far * (LARGE / SMALL)  # at the small damping, if there were no curvature
    cosine = torch.cosine_similarity((found[1] - dots).flatten(), (near - dots).flatten(), dim=0)
    ranks = rank_correlations(found[1].numpy(), near.numpy()).mean()
    return Agreement(cases.relative_error(found[0], far), float(ranks), float(cosine))


def tiny(four_bit: bool, installed: bool = True) -> nn.Module:
    """Return a fresh one-layer Llama under LoRA with random weights."""
    if four_bit:
        return cases.nf4_llama(installed=installed, num_hidden_layers=1)
    return cases.add_lora(cases.llama(num_hidden_layers=1).requires_grad_(False))


@cache
def reference(four_bit: bool) -> tuple[Work, tuple[Tensor, Tensor]]:
    """Return the tiny work, λ of which is the mean curvature a chat sees, and its exact scores at both dampings."""
    chats = taken_apart(cases.batches(count=20, size=1))
    examples, queries = chats[:16], chats[16:]
    twin = cases.Twin(tiny(four_bit))
    curvature = gauss_newton(twin, examples)
    total = sum(example.tokens for example in examples)
    rows = torch.stack([gradient(twin, batch) * batch.tokens / total for batch in map(alone, examples)])
    asked = torch.stack([gradient(twin, batch) for batch in map(alone, queries)])
    unit = float(curvature.trace()) / len(examples)
    eye = torch.eye(len(curvature), dtype=curvature.dtype)
    far, near = [-torch.linalg.solve(curvature + unit * factor * eye, asked.T).T @ rows.T for factor in (LARGE, SMALL)]
    return Work(examples, queries, examples, unit, Path()), (far, near)


def alone(example: Example) -> Batch:
    """Return a batch of one chat."""
    return make_batches([example], 1, pad_id=0)[0]


def gradient(model: nn.Module, batch: Batch) -> Tensor:
    """Return the gradient of the mean loss by plain autograd, (P,)."""
    return cases.explicit_gradients(answer_loss(model, batch)[None], list(trainable(model).values()))[0]


def gauss_newton(model: nn.Module, examples: list[Example]) -> Tensor:
    r"""Return the dense Gauss-Newton matrix (P, P) of the mean loss over answer tokens, from explicit Jacobians.

    With p the probabilities of a token, :math:`\operatorname{diag} p - p p^\top = L L^\top` for
    :math:`L = (I - p 1^\top) \operatorname{diag} \sqrt p`. Cost: one backward pass a logit.
    """
    total = sum(example.tokens for example in examples)
    parameters = list(trainable(model).values())
    size = sum(parameter.numel() for parameter in parameters)
    result = torch.zeros(size, size, dtype=torch.float64)
    for batch in map(alone, examples):
        logits = answer_logits(model, batch)
        p = logits.detach().softmax(dim=-1)
        root = (torch.eye(p.shape[1], dtype=p.dtype) - p[:, :, None]) * p.sqrt()[:, None, :]  # (N, V, V)
        outputs = torch.einsum("nv,nvw->nw", logits, root).flatten()
        basis = torch.eye(len(outputs), dtype=outputs.dtype)
        pieces = torch.autograd.grad(outputs, parameters, basis, is_grads_batched=True)
        jacobian = torch.cat([piece.flatten(1) for piece in pieces], dim=1)
        result += jacobian.T @ jacobian / total
    return result
