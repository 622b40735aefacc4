"""Write a model's answers: greedy decoding in left-padded batches, with rows that have ended taken out.

The loop is written out (instead of `model.generate`) because it is short, the same for every decoder-only model,
and lets a batch shrink: a short refusal does not pay for its neighbour's long answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from curvlib.batches import Chat
from curvlib.errors import CurvlibError
from curvlib.nf4 import bfloat16_products, kept_weights
from curvlib.prefix import cache_argument, read_beginning
from curvlib.progress import bar
from curvlib.template import end_text, end_token, prompt_text

BATCH_SIZE = 96  # every new token reads all weights once a batch: 80 prompts at once take 30 % less time than by 32
Model = PreTrainedModel | PeftModel
Prompt = str | Chat  # a user's message, or the turns so far, the last one the user's


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put `model` in evaluation mode without gradients; give each submodule its own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), kept_weights(model):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def messages(prompt: Prompt) -> Chat:
    """Return `prompt` as a list of chat messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def render(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, prefill: str = "") -> list[int]:
    """Return the token ids of `prompt` in the model's own chat template, up to where the answer begins.

    `prefill` is put into the model's mouth: the answer continues from it.
    Raises CurvlibError if the tokenizer has no chat template, or one that does not say where the answer begins.
    """
    text = prompt_text(tokenizer, messages(prompt))
    return list(tokenizer(text + prefill, add_special_tokens=False)["input_ids"])


def left_pad(rows: Sequence[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return input ids and attention mask, both (rows, longest), aligned at the right edge."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def end_tokens(model: Model, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every token id that ends an answer: the tokenizer's, the template's, those of the generation config."""
    config: Any = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    more = ends if isinstance(ends, list) else [ends]
    return sorted({int(end) for end in (tokenizer.eos_token_id, end_token(tokenizer), *more) if end is not None})


def decode_batch(model: Model, ids: Tensor, mask: Tensor, ends: list[int], max_new: int) -> list[list[int]]:
    """Return the greedy continuation of each row of `ids` (B, T), the end token left out.

    Rows that have ended leave the batch and its key-value cache. Cost: one forward over (B, T), in which the
    tokens that all rows begin with count once, then one per new token.
    """
    answers: list[list[int]] = [[] for _ in ids]
    rows = torch.arange(len(ids), device=ids.device)
    stop = torch.tensor(ends, device=ids.device)
    given = read_beginning(model, ids, mask, int(mask.sum(dim=1).min()) - 1, keep=True)
    cache = given[cache_argument(model)]
    for _ in range(max_new):
        out: Any = model(**given, logits_to_keep=1)
        chosen = out.logits[:, -1].argmax(-1)
        if not bool(torch.isfinite(out.logits[:, -1].gather(1, chosen[:, None])).all()):  # argmax picks a nan
            raise CurvlibError("the model's logits are not finite: its weights or its adapter are broken")
        alive = (~torch.isin(chosen, stop)).nonzero().squeeze(1)
        if len(alive) == 0:
            break
        mask, positions = given["attention_mask"], given["position_ids"][:, -1:]
        if len(alive) < len(rows):
            cache.batch_select_indices(alive)
            rows, mask, positions, chosen = rows[alive], mask[alive], positions[alive], chosen[alive]
        for row, token in zip(rows.tolist(), chosen.tolist(), strict=True):
            answers[row].append(token)
        given["attention_mask"] = torch.nn.functional.pad(mask, (0, 1), value=1)
        given["input_ids"], given["position_ids"] = chosen[:, None], positions + 1
    return answers


def generate(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 24,
    batch_size: int = BATCH_SIZE,
    prefill: str = "",
) -> list[str]:
    """Return the model's greedy answer to each prompt, in the order given, special tokens skipped.

    A `prefill` is part of the answer returned. The model's mode and its gradients are left as they were. Deterministic
    up to rounding: padding changes the last bits of the logits, so a near tie may fall otherwise in another batch. On
    CUDA the 4-bit products of answers, and of no curvature, are in bfloat16.
    """
    ends, closing = end_tokens(model, tokenizer), end_text(tokenizer)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    encoded = [render(tokenizer, prompt, prefill) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]))
    answers = [""] * len(prompts)
    faster = bfloat16_products(model) if model.device.type == "cuda" else nullcontext()
    with evaluating(model), faster, bar(total=len(prompts), desc="answers") as progress:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            ids, mask = left_pad([encoded[index] for index in chosen], pad_id, model.device)
            tokens = decode_batch(model, ids, mask, ends, max_new_tokens)
            for index, text in zip(chosen, tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True):
                answers[index] = prefill + (text.partition(closing)[0] if closing else text)
            progress.update(len(chosen))
    return answers
