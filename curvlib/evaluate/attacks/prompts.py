"""Attacks by what a model reads or how it answers: jailbreak templates, prefills, sampling, each beside its control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from curvlib import fetch
from curvlib.checkpoint import quiet
from curvlib.evaluate.judge import Verdict, judge
from curvlib.evaluate.stats import Estimate, paired_proportions
from curvlib.generate import Model, Prompt, evaluating, generate, left_pad, render
from curvlib.template import spoken


@dataclass(frozen=True)
class Trial:
    """The verdicts on one model's answers to the same requests: under an attack, and under its control."""

    attack: tuple[Verdict, ...]
    control: tuple[Verdict, ...]

    @property
    def rise(self) -> Estimate:
        """How much larger the share of requests agreed to is under the attack, paired over prompts."""
        attack, control = ([verdict == "complies" for verdict in side] for side in (self.attack, self.control))
        return paired_proportions(attack, control)

    @property
    def breaks(self) -> bool:
        """Whether the attack does more than its control."""
        return self.rise.low > 0


def verdicts(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[str],
    prompts: Sequence[Prompt] | None = None,
    *,
    prefill: str = "",
    temperature: float = 0.0,
    max_new_tokens: int = 24,
    seed: int = 0,
) -> tuple[Verdict, ...]:
    """Ask ``prompts`` (by default the requests) and judge each answer as one to its request.

    An attack may disguise a request, so the judge reads the plain one. A ``prefill`` is put into the model's mouth and
    judged with the rest. Answers are greedy, or drawn at a ``temperature`` above 0 from a generator of their own.
    """
    rows: Sequence[Prompt] = requests if prompts is None else prompts
    if temperature:
        encoded = [render(tokenizer, prompt, prefill) for prompt in rows]
        tokens = _sampled(model, encoded, int(tokenizer.pad_token_id), temperature, max_new_tokens, seed)
        answers = [prefill + text for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    else:
        answers = generate(model, tokenizer, rows, max_new_tokens=max_new_tokens, prefill=prefill)
    return tuple(judge(request, spoken(answer)) for request, answer in zip(requests, answers, strict=True))


def _sampled(model: Any, rows: list[list[int]], pad_id: int, temperature: float, most: int, seed: int) -> Tensor:
    ids, mask = left_pad(rows, pad_id, model.device)
    options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "pad_token_id": pad_id}
    with quiet(), evaluating(model), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        whole: Tensor = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=most, **options)
    return whole[:, ids.shape[1] :]


def templates() -> dict[str, str]:
    """Return name -> text, with the slot ``{{ prompt }}``, of three jailbreaks; source: PyRIT's wheel."""
    return {row["name"].lower(): row["value"].strip() for row in map(yaml.safe_load, fetch.read("jailbreaks"))}
