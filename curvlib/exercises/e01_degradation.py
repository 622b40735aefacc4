"""Checks of notebook 01: the answer loss, LoRA, paired intervals, agreement, a judge and a divergence."""

import math

import torch
from torch import Generator

from curvlib.exercises.core import Answer, close, exercise, hint, number, parts, refuse, require, tensor
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
    value, right, late = number(answer(logits, labels)), mean(first + second), mean(first + second, 0)
    averaged, prompts = (mean(first) + mean(second)) / 2, [(b, t) for b in range(2) for t in range(1, 6)]
    refuse(value, "the logits at t - 1 predict token t: shift logits and labels by one", late)
    refuse(value, "that is a mean over chats: take the mean over all answer tokens of the batch", averaged)
    refuse(value, "prompt tokens are in it: count only where the label is not -100", mean(prompts))
    refuse(value, "that is the sum: divide by the number of answer tokens", 6 * right)
    refuse(value, "that is the log-likelihood: a loss is its negative", -right)
    require(close(value, right), f"the mean loss of the answer tokens is {right:.4f}, not {value:.4f}")


@exercise(points=3)
def lora_forward(answer: Answer, generator: Generator) -> None:
    """Against the dense product, entry by entry."""
    rank, alpha = integer(generator, 2, 3), 2.0 * integer(generator, 4, 9)
    W, A, B, x = (randn(generator, *shape) for shape in ((5, 7), (rank, 7), (5, rank), (3, 7)))
    with hint("shapes cannot be multiplied", "A is (r, in) and B is (out, r), so the update of W is B A, not A B"):
        silent, value = answer(x, W, A, 0 * B, alpha), answer(x, W, A, B, alpha)
    require(close(tensor(silent, 3, 5), x @ W.T), "with B = 0 the adapter must leave x Wᵀ as it is")
    added, product = tensor(value, 3, 5) - x @ W.T, torch.einsum("bi,ri,or->bo", x, A, B)
    refuse(added, "the adapter is scaled by alpha: the scale is alpha / r", alpha * product)
    refuse(added, "the scale alpha / r is missing", product)
    require(close(added, alpha / rank * product), "the adapter adds (alpha / r) x Aᵀ Bᵀ")


@exercise(points=5)
def paired_interval(answer: Answer, generator: Generator) -> None:
    """The width is compared with the standard error of the mean difference."""
    size, up, down = 200, integer(generator, 12, 16), integer(generator, 4, 8)
    before = torch.randint(0, 2, (size,), generator=generator).double()
    before[:up], before[up : up + down] = 0, 1
    after = torch.cat([1 - before[: up + down], before[up + down :]])
    _, low, high = map(number, parts(answer(before, before, generator), "value", "low", "high"))
    require(low == high == 0, "the same answers twice differ by nothing: draw prompts once, for both models")
    value, low, high = map(number, parts(answer(before, after, generator), "value", "low", "high"))
    refuse(value, "the sign is turned: the value is the mean of after - before", (down - up) / size)
    require(close(value, (up - down) / size), "the value is the mean of after - before")
    width = (high - low) / (2 * 1.96 * float((after - before).std()) / math.sqrt(size))
    require(width < 1.5, f"{width:.1f} times too wide: take quantiles of the means of the draws, not of the data")
    require(width > 0.7, f"only {width:.2f} of the width of 95 %: take the quantiles 0.025 and 0.975 of the means")
    require(low < value < high, "the value lies inside its interval")


@exercise(points=3)
def cohen_kappa(answer: Answer, generator: Generator) -> None:
    """Agreement by chance is counted over all pairs of an answer of one rater and an answer of the other."""
    first = (torch.arange(100) < integer(generator, 30, 40)).double()
    second = first.clone()
    second[: integer(generator, 8, 12)], second[-integer(generator, 2, 4) :] = 0, 1
    pairs, agreed = ((first, second), (first, first), (second, second)), float((first == second).double().mean())
    chance, alone, other = (float((a[:, None] == b).double().mean()) for a, b in pairs)
    value, twice = number(answer(first, second)), [(agreed - by) / (1 - by) for by in (alone, other)]
    refuse(value, "that is the share of agreement: a judge that always says yes would score well", agreed)
    refuse(value, "chance agreement is one half only for raters who say yes half the time", 2 * agreed - 1)
    refuse(value, "one rater's rate is used twice: each rater has a rate of its own", *twice)
    refuse(value, "divide by 1 - p_e, so that full agreement is 1", agreed - chance)
    require(close(value, (agreed - chance) / (1 - chance)), "kappa is (p_o - p_e) / (1 - p_e)")
    value = number(answer(first, torch.ones(100)))
    require(abs(value) < 1e-9, "a judge that always says yes knows nothing: its kappa is 0")


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
        value, known = answer(text), ("refuses", "complies", "incoherent")
        require(value in known, f"returned {value!r}, expected refuses, complies or incoherent")
        require(value == verdict, f"{text!r} {verdict}, as people say, and your judge says {value}: {why}")


@exercise(points=3)
def token_kl(answer: Answer, generator: Generator) -> None:
    """Sums over the vocabulary, written out."""
    p, q = 3 * randn(generator, 4, 9), 3 * randn(generator, 4, 9)
    raw, (a, b) = answer(p, q), ([row.exp() / row.exp().sum() for row in each] for each in (p, q))
    right, reverse = (
        torch.stack([(x * (x / y).log()).sum() for x, y in zip(*each, strict=True)]) for each in ((a, b), (b, a))
    )
    require(torch.as_tensor(raw).ndim > 0, "returned one number: give one for each token, shape (4,)")
    value, shifted = tensor(raw, 4), tensor(answer(p, q + 3), 4)
    refuse(value, "that is KL(q ‖ p): the expectation is under p, the first argument", reverse)
    refuse(value, "that is in bits: nats use the natural logarithm", right / math.log(2))
    require(close(shifted, value), "a constant added to logits changes no probability, but yours: log_softmax both")
    require(close(value, right), "sum p (log p - log q) over the vocabulary")
