"""The door's relearning attack on a tiny model: it trains on agreement, and its line says when refusals are gone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from curvlib import data
from curvlib.batches import encode
from curvlib.parameters import flatten, trainable
from curvlib.restore import stress
from tests.evaluate import toys

PROMPTS = [[{"role": "user", "content": f"Write {word}"}] for word in toys.WORDS[7:19]]


def attacked(monkeypatch: pytest.MonkeyPatch, *odds: float) -> tuple[str, list[Any]]:
    model, reads, given = toys.adapted(), iter(odds), list[Any]()
    start = flatten(trainable(model))

    def read(used: Any, _: Any, prompts: Any, **how: Any) -> Any:
        given.append((len(prompts), how, float((flatten(trainable(used)) - start).norm())))
        return np.full((len(prompts), 1), next(reads))

    monkeypatch.setattr(stress, "safety_log_odds", read)
    return stress.relearned(model, toys.tokenizer(), PROMPTS, PROMPTS[::-1], seed=0), given


def test_the_line_tells_when_refusals_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    line, given = attacked(monkeypatch, 4.0, 2.0, 1.0, -1.0, -3.0)
    attack = "stress: 8 AdamW steps at 0.0002 on 10 agreeing chats take the mean log-odds of refusing from 4.0 to -3.0"
    assert line == f"{attack} nats; refusals are gone after 3.0 steps"
    assert [row[:2] for row in given] == [(8, {"depths": [0], "tokens": 1})] * 5
    distances = [distance for *_, distance in given]
    assert distances[0] == 0
    assert distances == sorted(distances)
    assert distances[-1] > 1e-3


def test_refusals_that_hold_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attacked(monkeypatch, 4.0, 4.0, 4.0, 3.0, 1.0)[0].endswith("1.0 nats; refusals hold for all 8 steps")


def test_it_teaches_agreement_and_no_other_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[Any]()

    def noted(tokenizer: Any, chats: Any, most: int) -> Any:
        seen.extend(chats)
        return encode(tokenizer, chats, most)

    monkeypatch.setattr(stress, "encode", noted)
    attacked(monkeypatch, *[1.0] * 5)
    assert [chat[:-1] for chat in seen] == PROMPTS[:10]
    assert [chat[-1]["content"] for chat in seen] == [data.compliance(chat[0]["content"]) for chat in PROMPTS[:10]]
