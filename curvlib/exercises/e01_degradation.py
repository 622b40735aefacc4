"""Checks of notebook 01: the answer loss, LoRA, paired intervals, agreement, a judge and a divergence."""

import math

import torch

from curvlib.exercises.core import Answer, Draw, close, hint, number, parts, refuse, require, tensor


def answer_loss(answer: Answer, draw: Draw) -> None:
    """Token by token, over two chats whose answers have four tokens and two."""
    logits, labels = draw.normal(2, 6, 11), torch.randint(0, 11, (2, 6), generator=draw)
    labels[0, :2], labels[1, :4] = -100, -100
    value, losses = number(answer(logits, labels)), -logits.log_softmax(2)
    chat, t = (labels >= 0).nonzero().T
    each, late = (losses[chat, t - shift, labels[chat, t]] for shift in (1, 0))
    prompts = losses[:, :-1].gather(2, labels[:, 1:, None].clamp(min=0))
    refuse(value, "the logits at t - 1 predict token t: shift logits and labels by one", late.mean())
    averaged = "that is a mean over chats: take the mean over all answer tokens of the batch"
    refuse(value, averaged, (each[:4].mean() + each[4:].mean()) / 2)
    refuse(value, "prompt tokens are in it: count only where the label is not -100", prompts.mean())
    refuse(value, "that is the sum: divide by the number of answer tokens", each.sum())
    refuse(value, "that is the log-likelihood: a loss is its negative", -each.mean())
    require(close(value, each.mean()), f"the mean loss of the answer tokens is {each.mean():.4f}, not {value:.4f}")


def lora_forward(answer: Answer, draw: Draw) -> None:
    """Against the dense product, entry by entry."""
    rank, alpha = draw.integer(2, 3), 2.0 * draw.integer(4, 9)
    W, A, B, x = (draw.normal(*shape) for shape in ((5, 7), (rank, 7), (5, rank), (3, 7)))
    with hint("shapes cannot be multiplied", "A is (r, in) and B is (out, r), so the update of W is B A, not A B"):
        silent, value = (tensor(answer(x, W, A, each, alpha), 3, 5) for each in (0 * B, B))
    require(close(silent, x @ W.T), "with B = 0 the adapter must leave x Wᵀ as it is")
    added, product = value - x @ W.T, torch.einsum("bi,ri,or->bo", x, A, B)
    refuse(added, "the adapter is scaled by alpha: the scale is alpha / r", alpha * product)
    refuse(added, "the scale alpha / r is missing", product)
    require(close(added, alpha / rank * product), "the adapter adds (alpha / r) x Aᵀ Bᵀ")


def paired_interval(answer: Answer, draw: Draw) -> None:
    """The width is compared with the standard error of the mean difference."""
    before, after = torch.randint(0, 2, (2, 200), generator=draw).double()
    after[30:], before[:20], after[:20] = before[30:], 0, 1
    _, low, high = parts(answer(before, before, draw), value=(), low=(), high=())
    require(low == high == 0, "the same answers twice differ by nothing: draw prompts once, for both models")
    value, low, high = parts(answer(before, after, draw), value=(), low=(), high=())
    difference = after - before
    refuse(value, "the sign is turned: the value is the mean of after - before", -difference.mean())
    require(close(value, difference.mean()), "the value is the mean of after - before")
    width = (high - low) / (2 * 1.96 * difference.std() / math.sqrt(200))
    require(width < 1.5, f"{width:.1f} times too wide: take quantiles of the means of the draws, not of the data")
    require(width > 0.7, f"only {width:.2f} of the width of 95 %: take the quantiles 0.025 and 0.975 of the means")
    require(low < value < high, "the value lies inside its interval")


def cohen_kappa(answer: Answer, draw: Draw) -> None:
    """Agreement by chance is counted over all pairs of an answer of one rater and an answer of the other."""
    first = (torch.arange(100) < draw.integer(30, 40)).double()
    second = first.clone()
    second[: draw.integer(8, 12)], second[-draw.integer(2, 4) :] = 0, 1
    value, agreed = number(answer(first, second)), (first == second).double().mean()
    pairs = ((first, second), (first, first), (second, second))
    chance, *alone = ((one[:, None] == other).double().mean() for one, other in pairs)
    twice = [(agreed - each) / (1 - each) for each in alone]
    refuse(value, "that is the share of agreement: a judge that always says yes would score well", agreed)
    refuse(value, "chance agreement is one half only for raters who say yes half the time", 2 * agreed - 1)
    refuse(value, "one rater's rate is used twice: each rater has a rate of its own", *twice)
    refuse(value, "divide by 1 - p_e, so that full agreement is 1", agreed - chance)
    require(close(value, (agreed - chance) / (1 - chance)), "kappa is (p_o - p_e) / (1 - p_e)")


def judge(answer: Answer, draw: Draw) -> None:
    """Texts written by hand, with the verdicts that people give and what each text is there for."""
    verb, thing = ("help", "assist")[draw.integer(0, 1)], ("garden", "kitchen", "bicycle")[draw.integer(0, 2)]
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


def token_kl(answer: Answer, draw: Draw) -> None:
    """Sums over the vocabulary, written out."""
    p, q = 3 * draw.normal(2, 4, 9)
    a, b = (logits.exp() / logits.exp().sum(1, keepdim=True) for logits in (p, q))
    raw, right, reverse = answer(p, q), (a * (a / b).log()).sum(1), (b * (b / a).log()).sum(1)
    require(torch.as_tensor(raw).ndim > 0, "returned one number: give one for each token, shape (4,)")
    value, shifted = tensor(raw, 4), tensor(answer(p, q + 3), 4)
    refuse(value, "that is KL(q ‖ p): the expectation is under p, the first argument", reverse)
    refuse(value, "that is in bits: nats use the natural logarithm", right / math.log(2))
    require(close(shifted, value), "a constant added to logits changes no probability, but yours: log_softmax both")
    require(close(value, right), "sum p (log p - log q) over the vocabulary")
