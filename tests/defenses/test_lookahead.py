"""Token sequences of both previews, written out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from curvlib.batches import Example, encode
from curvlib.defenses import lookahead
from curvlib.defenses.lookahead import Preview, preview_of
from curvlib.defenses.method import Setting
from curvlib.errors import CurvlibError
from curvlib.stages import chat
from tests.defenses.tiny import TOKENIZER, tiny  # noqa: F401  a fixture

PREVIEW = Preview(connector=(50, 51), closing=(8, 9), end=3)
CHAT = Example((7, 20, 21, 8, 9, 30, 31, 32, 3), (*[-100] * 5, 30, 31, 32, 3))


def test_the_real_preview_shows_the_first_answer_tokens() -> None:
    found = PREVIEW.real(CHAT, 2)
    assert found.input_ids == (7, 20, 21, 50, 51, 30, 31, 8, 9, 30, 31, 32, 3)
    assert found.labels == (*[-100] * 9, 30, 31, 32, 3)


def test_a_short_answer_is_shown_without_its_end() -> None:
    assert PREVIEW.real(CHAT, 6).input_ids == (7, 20, 21, 50, 51, 30, 31, 32, 8, 9, 30, 31, 32, 3)


def test_the_virtual_preview_stands_in_prompt_and_answer() -> None:
    found = PREVIEW.virtual(CHAT, (60, 61))
    assert found.input_ids == (7, 20, 21, 50, 51, 60, 61, 8, 9, 60, 61, 30, 31, 32, 3)
    assert found.labels == (*[-100] * 9, 60, 61, 30, 31, 32, 3)


def test_the_template_is_taken_apart_and_put_together() -> None:
    preview = preview_of(TOKENIZER)
    example = encode(TOKENIZER, [chat("Write a plan", "red green blue")], 64)[0]
    text = TOKENIZER.decode(preview.real(example, 2).input_ids)
    shown = "The answer <unk> <unk> : red green"  # the tiny vocabulary lacks "begins" and "with"
    assert text == f"<user> Write a plan {shown} <end> <assistant> red green blue <end>"


def test_a_prompt_of_another_form_is_one_line() -> None:
    with pytest.raises(CurvlibError, match="LookAhead needs one user message at its end"):
        PREVIEW.real(Example((7, 20, 30), (-100, -100, 30)), 1)


def test_training_sees_the_previews_and_nothing_else(tiny: Setting, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    seen: list[Any] = []
    monkeypatch.setattr(Setting, "train", lambda *given: seen.append(given[2]) or 6)
    preview = preview_of(TOKENIZER)
    assert lookahead.real(tiny, 2).gradients == 6
    lookahead.virtual(tiny, "red blue")
    phrase = lookahead.tokens(TOKENIZER, "red blue")
    assert seen[0] == [preview.real(example, 2) for example in tiny.examples()]
    assert seen[1] == [preview.virtual(example, phrase) for example in tiny.examples()]
