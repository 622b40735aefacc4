from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from curvlib.data import Example
from curvlib.errors import CurvlibError
from curvlib.evaluate.utility import compare, letter_accuracy, question_turns, sentence_accuracy
from curvlib.generate import render
from tests.evaluate.toys import dense_losses, llama, tokenizer

OPTIONS = {"A": "red", "B": "one two three four", "C": "blue list"}
QUESTIONS = [
    Example(f"toy/{number}", prompt, "ABC"[number % 3], dict(list(OPTIONS.items())[: 2 + number % 2]))
    for number, prompt in enumerate(["plan", "a list of words", "one", "green green", "two three A", "six"])
]
QUESTIONS[2] = replace(QUESTIONS[2], options=OPTIONS)


@pytest.mark.parametrize("shots", [(), tuple(QUESTIONS[:2])])
def test_sentences_are_scored_by_mean_likelihood(shots: tuple[Example, ...]) -> None:
    tok, model = tokenizer(), llama()
    found = sentence_accuracy(model, tok, QUESTIONS, shots=shots, batch_size=4)
    for example, chosen in zip(QUESTIONS, found.chosen, strict=True):
        head = render(tok, question_turns(example, shots))
        tails = {key: tok(f"The answer is {key}: {text}. <end>")["input_ids"] for key, text in example.options.items()}
        assert chosen == min(tails, key=lambda key: float(dense_losses(model, head, tails[key]).mean()))
    assert found.correct == tuple(a == e.answer for a, e in zip(found.chosen, QUESTIONS, strict=True))
    assert found.accuracy.value == sum(found.correct) / len(QUESTIONS)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_letters_are_the_likeliest_next_token(batch_size: int) -> None:
    tok, model = tokenizer(), llama(seed=3)
    found = letter_accuracy(model, tok, QUESTIONS, batch_size=batch_size)
    for example, chosen in zip(QUESTIONS, found.chosen, strict=True):
        head = render(tok, question_turns(example), "The answer is")
        losses = {key: dense_losses(model, head, tok(key)["input_ids"]) for key in example.options}
        assert chosen == min(losses, key=lambda key: float(losses[key]))
    assert len(set(found.chosen)) > 1


def test_solved_questions_stand_before_the_question() -> None:
    turns = question_turns(QUESTIONS[1], QUESTIONS[:1])
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    assert turns[0]["content"] == "plan\nA: red\nB: one two three four"
    assert turns[1]["content"] == "The answer is A: red."
    assert turns[2]["content"].startswith("a list of words\nA: red")


def test_choices() -> None:
    found = compare(QUESTIONS[:2], [[0.1, 0.7], [0.2, 0.1, 0.2]])
    assert (found.chosen, found.correct, found.accuracy.value) == (("B", "A"), (False, False), 0.0)


def test_unusable_questions_are_refused() -> None:
    for examples in ([], [Example("toy/9", "red", "D", OPTIONS)]):
        for measure in (sentence_accuracy, letter_accuracy):
            with pytest.raises(CurvlibError, match="answer among their options"):
                measure(llama(), tokenizer(), examples)
    long_letter = Example("toy/8", "red", "A", {"A": "red", "A B": "blue"})
    with pytest.raises(CurvlibError, match="not one token"):
        letter_accuracy(llama(), tokenizer(), [long_letter])
    assert torch.is_grad_enabled()
