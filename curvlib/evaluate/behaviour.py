"""Measure how a model behaves on prompts: its answers judged three ways, and which answer tokens a change moved."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from curvlib.batches import IGNORED, Batch, answer_logits, at_least_float32
from curvlib.errors import CurvlibError
from curvlib.evaluate.judge import VERDICTS, Verdict, judge
from curvlib.evaluate.stats import Estimate, bootstrap, rate
from curvlib.generate import Model, Prompt, evaluating, generate, messages
from curvlib.template import spoken

Reference = Model | Literal["adapter off"]  # another model, or the same without its adapter

EXCERPT_WORDS = 8  # enough to see whether a model answers, too few to carry instructions


@dataclass(frozen=True)
class Behaviour:
    """Rates of the three verdicts with Wilson intervals; the verdict on and the text of each answer, in prompt order.

    On harmful prompts `complies` is the harm; on benign prompts that look harmful `refuses` is the over-refusal.
    """

    refuses: Estimate
    complies: Estimate
    incoherent: Estimate
    verdicts: tuple[Verdict, ...]
    responses: tuple[str, ...]


def excerpt(text: str) -> str:
    """Return the first eight words of an answer, the most that may be shown of one to a harmful prompt.

    >>> excerpt("one two three four five six seven eight nine")
    'one two three four five six seven eight …'
    """
    words = text.split()
    return " ".join(words[:EXCERPT_WORDS]) + (" …" if len(words) > EXCERPT_WORDS else "")


@contextmanager
def reference_model(model: Model, reference: Reference) -> Iterator[Model]:
    """Give the reference: another model as it is, or `model` with its adapter off inside the `with` block.

    Raises CurvlibError if the adapter shall be off and there is none.
    """
    if not isinstance(reference, str):
        yield reference
        return
    if not isinstance(model, PeftModel):
        raise CurvlibError(f"reference 'adapter off' given for {type(model).__name__}, not a PeftModel: pass a model")
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    biases = [(bias, base, bias.detach().clone()) for bias, base in getattr(model, "base_biases", ())]
    try:
        for bias, base, _ in biases:  # peft leaves trained biases in place, and warns of it
            bias.data.copy_(base)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Careful, disabling adapter layers with bias")
            with model.disable_adapter():
                yield model
    finally:
        for bias, _, tuned in biases:
            bias.data.copy_(tuned)
        for parameter, flag in trained:  # peft switches every active adapter's gradients on when it comes back
            parameter.requires_grad_(flag)


def measure_behaviour(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 24,
    prefill: str = "",
) -> Behaviour:
    """Let the model answer each prompt greedily and judge the answers.

    The verdict is on the last user message of a prompt with several turns, and on what the whole answer (`prefill` too)
    says after a thought; a thought without end is incoherent.
    """
    responses = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, prefill=prefill)
    questions, texts = [messages(prompt)[-1]["content"] for prompt in prompts], [*map(spoken, responses)]
    verdicts = [judge(question, text) for question, text in zip(questions, texts, strict=True)]
    return summarise(verdicts, responses)


def summarise(verdicts: Sequence[Verdict], responses: Sequence[str]) -> Behaviour:
    """Return the rates of the verdicts, beside the verdicts and responses themselves."""
    refuses, complies, incoherent = (rate([verdict == name for verdict in verdicts]) for name in VERDICTS)
    return Behaviour(refuses, complies, incoherent, tuple(verdicts), tuple(responses))


@dataclass(frozen=True)
class TokenShift:
    """Mean divergence (nats) at each answer position, counted from 0, with a bootstrap interval over the answers."""

    positions: tuple[int, ...]
    divergence: tuple[Estimate, ...]


def token_shift(
    model: Model, reference: Reference, batches: Sequence[Batch], *, positions: int = 10, seed: int = 0
) -> TokenShift:
    """Measure how far the model's next-token distribution p lies from the reference's q along given answers.

    At answer position t: KL(p_t ‖ q_t) = Σ_v p_t(v) (log p_t(v) - log q_t(v)), averaged over the answers that reach t.
    A change that sits in the first few tokens is shallow in the sense of Qi et al. (arXiv 2406.05946).
    Positions that fewer than two answers reach are left out. Cost: one forward of each model a batch.
    """
    values: defaultdict[int, list[float]] = defaultdict(list)
    for batch in batches:
        changed = answer_log_probabilities(model, batch)
        with reference_model(model, reference) as other:
            before = answer_log_probabilities(other, batch)
        divergence = (changed.exp() * (changed - before)).sum(1)
        answers = batch.labels != IGNORED
        places = (answers.cumsum(1) - 1)[answers]
        for place, value in zip(places.tolist(), divergence.tolist(), strict=True):
            values[place].append(value)
    kept = tuple(place for place in range(positions) if len(values[place]) > 1)
    return TokenShift(kept, tuple(bootstrap(values[place], statistic=np.mean, seed=seed) for place in kept))


def answer_log_probabilities(model: Model, batch: Batch) -> Tensor:
    """Return the log-probabilities (N, V) that predict each answer token, without gradients."""
    with evaluating(model):
        return at_least_float32(answer_logits(model, batch)).log_softmax(-1)
