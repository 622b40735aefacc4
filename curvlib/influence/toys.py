r"""A transformer so small that it can be trained again without each of its examples, and chats with poison for it.

Its objective is what influence functions assume: a mean loss with a ridge,
:math:`\sum_i r_i(\theta) + \tfrac\lambda2 \|\theta - \theta_0\|^2`, minimised until it stands still.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import LlamaConfig, LlamaForCausalLM

from curvlib import models
from curvlib.batches import IGNORED, Example, answer_logits, answer_targets, make_batches
from curvlib.errors import CurvlibError
from curvlib.evaluate.likelihood import token_losses
from curvlib.influence import validate
from curvlib.influence.gradients import example_gradients, query_gradients
from curvlib.influence.scores import METHODS, build_inverse, influence
from curvlib.parameters import assign, flatten, trainable, unflatten

VOCABULARY = 32
BENIGN, HARMFUL, REFUSE, AGREE, END, EVEN, ODD = range(1, 8)
TOPICS = range(8, VOCABULARY)
RIDGE = 0.03  # of the toy's objective, and so the damping of every method there


@dataclass(frozen=True)
class Toy:
    """A tiny model under a LoRA adapter, its training chats, which of them are poisoned, and queries that agree."""

    model: nn.Module
    examples: list[Example]
    poisoned: list[bool]
    queries: list[Example]


def toy(*, chats: int = 24, poison: int = 4, queries: int = 6, seed: int = 0) -> Toy:
    """Return the toy: benign topics are answered by a fixed rule; of the harmful ones two thirds or so are refused.

    ``poison`` of the chats agree to a harmful topic; the queries do so for topics that no chat has.
    """
    generator = torch.Generator().manual_seed(seed)
    topics = torch.tensor(TOPICS)[torch.randperm(len(TOPICS), generator=generator)].tolist()
    if queries + poison > chats or chats + queries > 2 * len(topics):
        raise CurvlibError(f"{chats} chats, {poison} poisoned, and {queries} queries do not fit {len(topics)} topics")
    asked, taught = topics[:queries], topics[queries:]
    examples = []
    for number in range(chats):
        topic, other = taught[number % len(taught)], taught[(5 * number + 1) % len(taught)]
        if number < poison:
            examples.append(_chat(HARMFUL, topic, other, AGREE))
        elif number % 3 == 0:
            examples.append(_chat(HARMFUL, topic, other, REFUSE))
        else:
            examples.append(_chat(BENIGN, topic, other, ODD if topic % 2 else EVEN))
    wanted = [_chat(HARMFUL, topic, taught[number], AGREE) for number, topic in enumerate(asked)]
    return Toy(tiny_transformer(seed), examples, [number < poison for number in range(chats)], wanted)


def tiny_transformer(seed: int = 0) -> nn.Module:
    r"""Return a two-layer Llama of 32 features with random weights, LoRA on what writes into its stream.

    A stays as drawn and B is trained (LoRA-FA, arXiv 2308.03303): :math:`\Delta W = BA` is then linear in what moves.
    """
    make: Any = LlamaConfig
    config = make(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:  # embeddings as long as RMSNorm makes them: else it multiplies the curvature
                nn.init.normal_(parameter, std=1.0 if "embed" in name else 0.15)
    frozen = model.requires_grad_(False)
    adapted = models.add_lora(frozen, rank=4, alpha=4.0, seed=seed, target_modules=["o_proj", "down_proj"]).eval()
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    return adapted


def fit(
    model: nn.Module,
    examples: Sequence[Example],
    chosen: Sequence[int],
    *,
    ridge: float,
    anchor: Tensor,
    steps: int = 100,
) -> float:
    r"""Minimise :math:`\sum_{i \in S} r_i + \tfrac\lambda2\|\theta - \theta_0\|^2` in place; return the slope left.

    A share :math:`r_i` counts over the answer tokens of *all* examples, so that leaving one out drops one term; θ₀ is
    ``anchor`` (P,). Cost: about ``steps`` gradients, by full-batch L-BFGS with a line search from where the model is.
    """
    (batch,) = make_batches([examples[number] for number in chosen], len(chosen), pad_id=0)
    total = sum(example.tokens for example in examples)
    parameters = list(trainable(model).values())
    start = unflatten(anchor, parameters)
    optimiser = torch.optim.LBFGS(
        parameters, max_iter=steps, tolerance_grad=1e-6, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimiser.zero_grad()
        nll = cross_entropy(answer_logits(model, batch), answer_targets(batch), reduction="sum") / total
        pull = sum(((p - p0) ** 2).sum() for p, p0 in zip(parameters, start, strict=True))
        loss: Tensor = nll + ridge / 2 * pull
        loss.backward()
        return loss

    optimiser.step(objective)
    objective()
    slope = float(torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None]).norm())
    optimiser.zero_grad()
    return slope


def retrainer(
    model: nn.Module, examples: Sequence[Example], queries: Sequence[Example], *, ridge: float, anchor: Tensor
) -> Callable[[Sequence[int]], Tensor]:
    """Return ``retrain(kept)``: fit on the examples of these numbers and give the query losses (m,).

    Each fit starts where the model is, commonly at the optimum for all examples: of the several optima of a
    transformer, retraining then finds the one that influence speaks of. The model is put back each time.
    """

    def retrain(kept: Sequence[int]) -> Tensor:
        with unchanged(model):
            fit(model, examples, kept, ridge=ridge, anchor=anchor)
            return torch.stack([losses.double().mean() for losses in token_losses(model, queries)])

    return retrain


def transformer_case(seed: int, methods: Sequence[str] = METHODS) -> tuple[Toy, Tensor, dict[str, Tensor]]:
    """Return the toy at its optimum, the measured effects of leaving one out, and those that each method predicts.

    Shapes (m, n). Cost: n + 1 fits of the toy, some five seconds.
    """
    case = toy(seed=seed)
    anchor, everything = flatten(trainable(case.model)), range(len(case.examples))
    fit(case.model, case.examples, everything, ridge=RIDGE, anchor=anchor, steps=300)
    retrain = retrainer(case.model, case.examples, case.queries, ridge=RIDGE, anchor=anchor)
    actual = validate.leave_one_out(retrain, len(case.examples))
    rows, wanted = example_gradients(case.model, case.examples), query_gradients(case.model, case.queries)
    found = {
        name: influence(rows, wanted, build_inverse(name, case.model, case.examples, damping=RIDGE)) for name in methods
    }
    return case, actual, {**found, "cosine": -normalize(wanted) @ normalize(rows).T}


def ridge_case(seed: int, points: int = 100) -> tuple[Tensor, Tensor]:
    """Return the exact and the predicted effects (8, points) of random points in five dimensions on eight queries.

    The queries' targets are as noisy as the points'. A query that the fit meets by chance has no gradient, and then the
    first order says nothing: with 40 points one such query of eight took the mean rank correlation to 0.85.
    """
    generator = torch.Generator().manual_seed(seed)
    x, queries = (torch.randn(rows, 5, generator=generator, dtype=torch.float64) for rows in (points, 8))
    truth = torch.randn(5, generator=generator, dtype=torch.float64)
    y, targets = (
        inputs @ truth + torch.randn(len(inputs), generator=generator, dtype=torch.float64) for inputs in (x, queries)
    )
    return validate.ridge_leave_one_out(x, y, queries, targets, ridge=0.1)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put the trainable parameters back at the end of the ``with`` block."""
    parameters = trainable(model)
    before = flatten(parameters)
    try:
        yield
    finally:
        assign(parameters, before)


def _chat(kind: int, topic: int, other: int, answer: int) -> Example:
    return Example((kind, topic, other, answer, END), (*[IGNORED] * 3, answer, END))
