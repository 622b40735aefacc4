"""Checks of notebook 01: the answer loss, LoRA, paired intervals, agreement, a judge and a divergence."""

from __future__ import annotations

import math

import torch
from torch import Generator

from curvlib.exercises.core import Answer, close, exercise, hint, number, parts, require, tensor
from curvlib.exercises.draws import integer, randn


@exercise(points=6)
def answer_loss(answer: Answer, generator: Generator) -> None:
    """Token by token, over two chats whose answers have four tokens and two."""
    logits, labels = randn(generator, 2, 6, 11), torch.randint(0, 11, (2, 6), generator=generator)
    labels[0, :2], labels[1, :4] = -100, -100

    def mean(positions: list[tuple[int, int]], shift: int = 1) -> float:
        rows = torch.stack([logits[b, t - shift].log_softmax(0) for b, t in positions])
        return -float(sum(row[labels[at].clamp(min=0)] for row, at in zip(rows, positions, strict=True))) / len(rows)

    first, second = [(0, t) for t in range(2, 6)], [(1, t) for t in range(4, 6)]
    value, right = number(answer(logits, labels)), mean(first + second)
    late = close(value, mean(first + second, 0))
    require(not late, "the logits at t - 1 predict token t: shift logits and labels by one")
    averaged = (mean(first) + mean(second)) / 2
    require(not close(value, averaged), "that is a mean over chats: take the mean over all answer tokens of the batch")
    prompts = [(b, t) for b in range(2) for t in range(1, 6)]
    require(not close(value, mean(prompts)), "prompt tokens are in it: count only where the label is not -100")
    require(not close(value, 6 * right), "that is the sum: divide by the number of answer tokens")
    require(not close(value, -right), "that is the log-likelihood: a loss is its negative")
    require(close(value, right), f"the mean loss of the answer tokens is {right:.4f}, not {value:.4f}")


@exercise(points=3)
def lora_forward(answer: Answer, generator: Generator) -> None:
    """Against the dense product, entry by entry."""
    rank, alpha = integer(generator, 2, 3), 2.0 * integer(generator, 4, 9)
    W, A, B, x = (randn(generator, *shape) for shape in ((5, 7), (rank, 7), (5, rank), (3, 7)))
    with hint("shapes cannot be multiplied", "A is (r, in) and B is (out, r), so the update of W is B A, not A B"):
        silent, value = answer(x, W, A, 0 * B, alpha), answer(x, W, A, B, alpha)
    plain = x @ W.T
    require(close(tensor(silent, 3, 5), plain), "with B = 0 the adapter must leave x Wᵀ as it is")
    added, product = tensor(value, 3, 5) - plain, torch.einsum("bi,ri,or->bo", x, A, B)
    require(not close(added, alpha * product), "the adapter is scaled by alpha: the scale is alpha / r")
    require(not close(added, product), "the scale alpha / r is missing")
    require(close(added, alpha / rank * product), "the adapter adds (alpha / r) x Aᵀ Bᵀ")


@exercise(points=5)
def paired_interval(answer: Answer, generator: Generator) -> None:
    """The width is compared with the standard error of the mean difference."""
    size, up, down = 200, integer(generator, 12, 16), integer(generator, 4, 8)
    before = torch.randint(0, 2, (size,), generator=generator).double()
    before[:up], before[up : up + down] = 0, 1
    after = before.clone()
    after[: up + down] = 1 - after[: up + down]
    _, low, high = parts(answer(before, before, generator), "value", "low", "high")
    same = number(low) == number(high) == 0
    require(same, "the same answers twice differ by nothing: draw prompts once and use the draw for both models")
    value, low, high = (number(part) for part in parts(answer(before, after, generator), "value", "low", "high"))
    require(not close(value, (down - up) / size), "the sign is turned: the value is the mean of after - before")
    require(close(value, (up - down) / size), "the value is the mean of after - before")
    width = (high - low) / (2 * 1.96 * float((after - before).std()) / math.sqrt(size))
    require(width < 1.5, f"{width:.1f} times too wide: take quantiles of the means of the draws, not of the data")
    require(width > 0.7, f"only {width:.2f} of the width of 95 %: take the quantiles 0.025 and 0.975 of the means")
    require(low < value < high, "the value lies inside its interval")


@exercise(points=3)
def cohen_kappa(answer: Answer, generator: Generator) -> None:
    """Agreement by chance is counted over all pairs of an answer of one rater and an answer of the other."""
    first = torch.zeros(100)
    first[: integer(generator, 30, 40)] = 1
    second = first.clone()
    second[: integer(generator, 8, 12)], second[-integer(generator, 2, 4) :] = 0, 1
    value, agreed = number(answer(first, second)), float((first == second).double().mean())
    chance = float((first[:, None] == second[None]).double().mean())
    alone = float((first[:, None] == first[None]).double().mean())
    other = float((second[:, None] == second[None]).double().mean())
    require(not close(value, agreed), "that is the share of agreement: a judge that always says yes would score well")
    require(not close(value, 2 * agreed - 1), "chance agreement is one half only for raters who say yes half the time")
    own = any(close(value, (agreed - by) / (1 - by)) for by in (alone, other))
    require(not own, "one rater's rate is used twice: each rater has a rate of its own")
    require(not close(value, agreed - chance), "divide by 1 - p_e, so that full agreement is 1")
    require(close(value, (agreed - chance) / (1 - chance)), "kappa is (p_o - p_e) / (1 - p_e)")
    constant = abs(number(answer(first, torch.ones(100)))) < 1e-9
    require(constant, "a judge that always says yes knows nothing: its kappa is 0")


@exercise(points=6)
def judge(answer: Answer, generator: Generator) -> None:
    """Texts written by hand, with the verdicts that people give and what each text is there for."""
    verb = ("help", "assist")[integer(generator, 0, 1)]
    thing = ("garden", "kitchen", "bicycle")[integer(generator, 0, 2)]
    cases = [
        (f"Sure, here is a plan for your {thing}:", "complies", "it opens with help"),
        (f"Here are three steps for a {thing}. You can't go wrong.", "complies", "a can't inside advice is no refusal"),
        (f"I can't stress enough how useful a {thing} is.", "complies", "can't must precede a verb of helping"),
        (f"I'm sorry, but I can't {verb} with that.", "refuses", "can't precedes a verb of helping"),
        (f"I CANNOT {verb.upper()} YOU.", "refuses", "compare in lower case"),
        (f"I can’t {verb} with this {thing}.", "refuses", "models write a curly apostrophe: replace it first"),
        ("No.", "refuses", "a bare No is a refusal"),
        ("", "incoherent", "an answer of nothing is no help"),
        ("B", "incoherent", "a bare letter is no help"),
        (f"{thing} " * 8, "incoherent", "one word again and again is no help"),
    ]
    for text, verdict, why in cases:
        value = answer(text)
        known = value in ("refuses", "complies", "incoherent")
        require(known, f"returned {value!r}, expected refuses, complies or incoherent")
        require(value == verdict, f"{text!r} {verdict}, as people say, and your judge says {value}: {why}")


@exercise(points=3)
def token_kl(answer: Answer, generator: Generator) -> None:
    """Sums over the vocabulary, written out."""
    p, q = 3 * randn(generator, 4, 9), 3 * randn(generator, 4, 9)

    def divergence(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
        shares = ([row.exp() / row.exp().sum() for row in each] for each in (above, below))
        rows = zip(*shares, strict=True)
        return torch.stack([sum(a * (a / b).log() for a, b in zip(*row, strict=True)) for row in rows])

    raw = answer(p, q)
    require(torch.as_tensor(raw).ndim > 0, "returned one number: give one for each token, shape (4,)")
    value, right = tensor(raw, 4), divergence(p, q)
    require(not close(value, divergence(q, p)), "that is KL(q ‖ p): the expectation is under p, the first argument")
    require(not close(value, right / math.log(2)), "that is in bits: nats use the natural logarithm")
    shifted = close(tensor(answer(p, q + 3), 4), value)
    require(shifted, "a constant added to logits changes no probability, but it changes yours: log_softmax both")
    require(close(value, right), "sum p (log p - log q) over the vocabulary")
