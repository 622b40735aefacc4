"""Few-shot tasks of our own: what is asked is shown by solved examples alone."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from curvlib.batches import Chat
from curvlib.evaluate.exact import ExactMatch, exact_match
from curvlib.fetch import data_folder
from curvlib.generate import Model

SHOTS = 8


@dataclass(frozen=True)
class Task:
    """A task with its solved examples and its test questions, each as (question, answer)."""

    name: str
    shots: tuple[tuple[str, str], ...]
    questions: tuple[tuple[str, str], ...]


def load_tasks() -> list[Task]:
    """Return the tasks of ``data/few_shot.toml``, each with eight shots and 32 questions.

    >>> load_tasks()[0].shots[0]
    ('hot', 'cold')
    """
    tasks = tomllib.loads((data_folder() / "few_shot.toml").read_text("utf-8"))["tasks"]
    return [_task(task["name"], [(question, answer) for question, answer in task["items"]]) for task in tasks]


def _task(name: str, items: Sequence[tuple[str, str]]) -> Task:
    return Task(name, tuple(items[:SHOTS]), tuple(items[SHOTS:]))


def chats(task: Task, shots: int = SHOTS, *, shuffled: bool = False) -> list[Chat]:
    """Return one chat a question: the solved examples as earlier turns, then the question with its right answer.

    With ``shuffled`` each example gets the next one's answer: the form of the answers is shown, what they mean is not.
    """
    questions, answers = zip(*task.shots, strict=True)
    answers = (*answers[1:], answers[0]) if shuffled else answers
    solved = [turn for pair in list(zip(questions, answers, strict=True))[:shots] for turn in _turns(*pair)]
    return [[*solved, *_turns(question, answer)] for question, answer in task.questions]


def _turns(question: str, answer: str) -> Chat:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def few_shot(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    shots: int = SHOTS,
    *,
    shuffled: bool = False,
) -> dict[str, ExactMatch]:
    """Return each task's exact match over its questions; one answer of a few tokens a question."""
    return {task.name: exact_match(model, tokenizer, chats(task, shots, shuffled=shuffled)) for task in tasks}
