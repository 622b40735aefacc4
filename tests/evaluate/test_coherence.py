from __future__ import annotations

import math

import pytest

from curvlib.evaluate.coherence import NEUTRAL, PERPLEXITY, Evidence, is_broken, is_loop, plain, response_evidence
from curvlib.evaluate.generate import render
from tests.evaluate.toys import dense_losses, llama, tokenizer


@pytest.mark.parametrize("shift", [1, 0])
def test_evidence_is_its_definition(shift: int) -> None:
    tok, model = tokenizer(), llama()
    prompts, answers = (
        ["red", "one two three", "A B"],
        ["list of red words" if shift else "blue", "blue . blue", "six five"],
    )
    found = response_evidence(model, tok, prompts, answers, batch_size=2)
    for view, prompt, answer in zip(found, prompts, answers, strict=True):
        tail = tok(answer, add_special_tokens=False)["input_ids"]
        start = 1 if len(tail) > 1 else 0
        given, neutral = (dense_losses(model, render(tok, text), tail)[start:].mean() for text in (prompt, NEUTRAL))
        assert view.perplexity == pytest.approx(math.exp(given), rel=1e-4)
        assert view.relevance == pytest.approx(float(neutral - given), abs=1e-4)


def test_only_the_first_tokens_count() -> None:
    tok, model = tokenizer(), llama()
    short, long = response_evidence(model, tok, ["red", "red"], ["one two three", "one two three A B C"], max_tokens=3)
    assert short.perplexity == pytest.approx(long.perplexity, rel=1e-5)


def test_either_measure_can_speak_against() -> None:
    assert not Evidence(PERPLEXITY, 0.0).speaks_against
    assert Evidence(PERPLEXITY + 1, 1.0).speaks_against
    assert Evidence(2.0, -0.01).speaks_against


def test_form() -> None:
    assert plain("  **I’m  Sorry**") == "i'm sorry"
    assert is_loop("go to the go to the go to the go to the")
    assert not is_loop("I can't help with that. I can't help with that.")
    assert not is_loop("The cost is 1000000 pounds, which is more than the plan allows for")
    assert is_broken("?!")
    assert not is_broken("x = f(y)")
