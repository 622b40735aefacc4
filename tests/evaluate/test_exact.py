"""Exact match: what counts as right, and nats against a dense model."""

from __future__ import annotations

import numpy as np
import pytest

from curvlib.batches import Chat
from curvlib.evaluate import exact
from curvlib.evaluate.exact import exact_match, normalise
from curvlib.generate import render
from tests.evaluate import toys

CHATS: list[Chat] = [
    [{"role": "user", "content": "Write a list"}, {"role": "assistant", "content": "red"}],
    [{"role": "user", "content": "a plan of words"}, {"role": "assistant", "content": "three blue"}],
]


@pytest.mark.parametrize(
    ("answer", "right", "hit"),
    [
        ("The copper.", "copper", (True, True)),
        ("It is made of copper.", "copper", (False, True)),
        ("coppers", "copper", (False, False)),
        ("New  york", "New York", (True, True)),
        ("", "copper", (False, False)),
    ],
)
def test_what_counts_as_right(monkeypatch: pytest.MonkeyPatch, answer: str, right: str, hit: tuple[bool, bool]) -> None:
    monkeypatch.setattr(exact, "generate", lambda *_, **__: [answer] * 2)
    chat = [{"role": "user", "content": "red"}, {"role": "assistant", "content": right}]
    score = exact_match(toys.llama(), toys.tokenizer(), [chat] * 2)
    assert (score.exact.value, score.mentioned.value) == hit
    assert score.correct == (hit[0],) * 2


def test_nats_are_those_of_the_right_answers_tokens() -> None:
    tokenizer = toys.tokenizer()
    losses = []
    for chat in CHATS:
        tail = tokenizer(f"{chat[1]['content']} <end>", add_special_tokens=False)["input_ids"]
        losses += toys.dense_losses(toys.llama(), render(tokenizer, chat[:1]), tail).tolist()
    score = exact_match(toys.llama(), tokenizer, CHATS)
    assert score.nats.value == pytest.approx(np.mean(losses), rel=1e-4)
    uniform = exact_match(toys.llama(uniform=True), tokenizer, CHATS)
    assert uniform.nats.value == pytest.approx(np.log(len(toys.SPECIAL + toys.WORDS)), rel=1e-4)


def test_normalising_keeps_a_lone_article() -> None:
    assert normalise("A") == "a"
    assert normalise("an Oak!") == "oak"
