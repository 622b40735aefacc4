from __future__ import annotations

import pytest
import torch

from curvlib.data import Row, lettered, task_question
from curvlib.errors import CurvlibError
from curvlib.evaluate.utility import compare, letter_accuracy, letter_token
from curvlib.generate import render
from tests.evaluate.toys import dense_losses, llama, tokenizer

OPTIONS = ["red", "one two three four", "blue list"]
QUESTIONS: list[Row] = [
    {"id": f"toy/{number}", "prompt": prompt, "answer": "ABC"[number % 3], "options": OPTIONS[: 2 + number % 2]}
    for number, prompt in enumerate(["plan", "a list of words", "one", "green green", "two three A", "six"])
]
QUESTIONS[2] = {**QUESTIONS[2], "options": OPTIONS}


@pytest.mark.parametrize("batch_size", [1, 4])
def test_letters_are_the_likeliest_next_token(batch_size: int) -> None:
    tok, model = tokenizer(), llama(seed=3)
    found = letter_accuracy(model, tok, QUESTIONS, batch_size=batch_size)
    for example, chosen in zip(QUESTIONS, found.chosen, strict=True):
        head = render(tok, task_question(example), "The answer is")
        losses = {key: dense_losses(model, head, tok(key)["input_ids"]) for key in lettered(example)}
        assert chosen == min(losses, key=lambda key: float(losses[key]))
    assert len(set(found.chosen)) > 1


def test_choices() -> None:
    found = compare(QUESTIONS[:2], [[0.1, 0.7], [0.2, 0.1, 0.2]])
    assert (found.chosen, found.correct, found.accuracy.value) == (("B", "A"), (False, False), 0.0)


def test_unusable_questions_are_refused() -> None:
    for examples in ([], [{**QUESTIONS[2], "answer": "D"}]):
        with pytest.raises(CurvlibError, match="answer among their options"):
            letter_accuracy(llama(), tokenizer(), examples)
    with pytest.raises(CurvlibError, match="not one token"):
        letter_token(tokenizer(), "red", "A B")
    assert torch.is_grad_enabled()
