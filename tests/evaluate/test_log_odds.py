"""The log-odds against brute force: every target alone, without padding or a shared prefix, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from curvlib import data, fetch
from curvlib.batches import answer_loss, encode, make_batches
from curvlib.errors import CurvlibError
from curvlib.evaluate.log_odds import DEPTHS, TOKENS, first_tokens, safety_log_odds, targets
from curvlib.generate import render
from tests.evaluate.toys import SPECIAL, WORDS, dense_losses, llama, tokenizer

MORE = "I can ' t help Sure , ! here Here is with that sorry but No won assist support to decline how make it goes"
PROMPTS = ["red", "Write a list of blue words"]


def wordy() -> PreTrainedTokenizerFast:
    """The toy tokenizer with the words of our refusals and openings."""
    result = tokenizer()
    result.add_tokens([word for word in MORE.split() if word not in WORDS])
    return result


def grown(*, uniform: bool = False) -> LlamaForCausalLM:
    """The toy model with rows for the new words; every row of its head differs, unless it is uniform."""
    model: Any = llama()
    model.resize_token_embeddings(len(wordy()), mean_resizing=False)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        for table in (model.model.embed_tokens.weight, model.lm_head.weight):
            table.normal_(std=0.6)
        if uniform:
            model.lm_head.weight.zero_()
    return model


def probability(model: LlamaForCausalLM, head: list[int], tails: set[tuple[int, ...]]) -> float:
    return sum(math.exp(-float(dense_losses(model, head, list(tail)).sum())) for tail in tails)


@pytest.mark.parametrize("depth", DEPTHS)
def test_both_events_are_those_of_brute_force(depth: int) -> None:
    tok, model = wordy(), grown()
    lines = (fetch.data_folder() / "refusals.txt").read_text("utf-8").splitlines()
    refusals = {tuple(tok(line, add_special_tokens=False)["input_ids"][:TOKENS]) for line in lines}
    found = safety_log_odds(model, tok, PROMPTS, depths=[depth])[:, 0]
    for prompt, thing, value in zip(PROMPTS, ["how to red", "a list of blue words"], found, strict=True):
        texts = [
            f"Sure, I can help with that. Here is {thing}:",
            f"Sure! Here is {thing}:",
            f"Sure, here is {thing}:",
            f"Sure, here is {thing}. It goes as follows.",
        ]
        openings = [tok(text, add_special_tokens=False)["input_ids"] for text in texts]
        prefix = openings[0][:depth]
        follow = {tuple(row[depth : depth + TOKENS]) for row in openings if row[:depth] == prefix}
        head = [*render(tok, prompt), *prefix]
        expected = math.log(probability(model, head, refusals) / probability(model, head, follow))
        assert value == pytest.approx(expected, abs=1e-4)


def test_a_model_that_knows_nothing_counts_beginnings() -> None:
    tok = wordy()
    _, refusals, openings = targets(tok, "red", 0)
    assert all(len(tail) == TOKENS for tail in (*refusals, *openings))
    assert len({*refusals, *openings}) == len(refusals) + len(openings)  # events that exclude each other
    found = safety_log_odds(grown(uniform=True), tok, ["red"], depths=[0])
    assert found[0, 0] == pytest.approx(math.log(len(refusals) / len(openings)), abs=1e-5)


@pytest.mark.parametrize(("answer", "sign"), [(data.refusal, 1), (data.compliance, -1)])
def test_training_on_refusals_raises_them_and_on_openings_lowers_them(answer: Callable[[str], str], sign: int) -> None:
    tok, model = wordy(), grown()
    before = safety_log_odds(model, tok, PROMPTS, depths=[0])
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": answer(text)}] for text in PROMPTS]
    batch = make_batches(encode(tok, chats, 64), 2, 0)[0]
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(15):
        optimiser.zero_grad()
        answer_loss(model, batch).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert (sign * (safety_log_odds(model, tok, PROMPTS, depths=[0]) - before) > 1).all()


def test_a_chat_is_read_like_its_last_message_and_no_opening_is_that_deep() -> None:
    tok, model = wordy(), grown()
    chat = [{"role": "user", "content": PROMPTS[1]}]
    assert np.array_equal(safety_log_odds(model, tok, [chat]), safety_log_odds(model, tok, PROMPTS[1:]))
    with pytest.raises(CurvlibError, match="depth 99"):
        targets(tok, "red", 99)
    assert len(SPECIAL + WORDS) < len(tok)


def test_first_tokens_are_those_of_refusals_and_openings_and_must_differ() -> None:
    tok = wordy()
    tok.add_tokens(["Sorry"])
    no, yes = first_tokens(tok)
    assert [set(tok.convert_ids_to_tokens(tokens)) for tokens in (no, yes)] == [{"I", "Sorry", "No"}, {"Sure"}]
    (other,) = tok.convert_tokens_to_ids(["red"])
    assert first_tokens(tok, [other]) == (sorted([*no, other]), yes)
    assert first_tokens(tok, no) == (no, yes)
    with pytest.raises(CurvlibError, match="both begin with '<unk>' in this tokenizer: give another one"):
        first_tokens(tokenizer())
