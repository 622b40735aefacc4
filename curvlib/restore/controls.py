r"""Null controls: what a restoration must beat before its direction, its chats or its curvature can be said to matter.

| control | what it takes away | where |
|---|---|---|
| random step of the same task norm | the direction | :func:`random_step` |
| shuffled answers | that refusals belong to harmful prompts | :func:`shuffled_answers` |
| plain gradient | the curvature | ``restore(…, metric="identity")`` |
| scaling the adapter down | the curvature of the return | ``restore(…, objective="return", metric="identity")`` |
| full reversion | the task | ``evaluate.behaviour.reference_model(model, "adapter off")`` |
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from curvlib.batches import Batch, Example, make_batches, taken_apart
from curvlib.curvature.operator import CurvatureOperator
from curvlib.errors import CurvlibError
from curvlib.evaluate.likelihood import continuation


def random_step(metric: CurvatureOperator, step: Tensor, *, seed: int) -> Tensor:
    r"""Return a Gaussian step :math:`\xi` (P,) with :math:`\xi^\top M\xi = \delta^\top M\delta`, as dear to the task.

    Args:
        metric: M, such as ``sampled_fisher(model, protected).damped(shift)`` at the start of the restoration.
        step: :math:`\delta` (P,), what the restoration changed: ``result.after - result.before``.
        seed: of the direction.

    Raises:
        CurvlibError: the step has no positive norm in the metric.

    Cost: two products.
    """
    noise = torch.randn(len(step), generator=torch.Generator().manual_seed(seed)).to(step)
    paid, price = (float(v @ metric.matvec(v)) for v in (step, noise))
    if not (paid > 0 and price > 0):
        raise CurvlibError(f"the step has squared norm {paid:.1e} in the metric, expected a positive one: add damping")
    return noise * math.sqrt(paid / price)


def shuffled_answers(
    refusals: Sequence[Batch], benign: Sequence[Batch], *, seed: int, pad_id: int, batch_size: int = 8
) -> tuple[list[Batch], list[Batch]]:
    """Return both sets with the answers of all their chats dealt out anew: refusing then has nothing to do with harm.

    Args:
        refusals: refused harmful requests.
        benign: answered benign requests.
        seed: of the permutation.
        pad_id: the tokenizer's padding token.
        batch_size: chats in a new batch.
    """
    chats = taken_apart([*refusals, *benign])
    prompts, answers = zip(*map(_parted, chats), strict=True)
    dealt = random.Random(seed).sample(answers, len(answers))
    joined = [continuation(prompt, answer) for prompt, answer in zip(prompts, dealt, strict=True)]
    harmful = sum(len(batch) for batch in refusals)
    return make_batches(joined[:harmful], batch_size, pad_id), make_batches(joined[harmful:], batch_size, pad_id)


def _parted(chat: Example) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens before the answer and those of the answer."""
    return chat.input_ids[: chat.prompt_length], chat.input_ids[chat.prompt_length :]
