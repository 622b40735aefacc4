"""Few-shot tasks: neither a copy of the question nor a constant scores, and the control shows form without content."""

from __future__ import annotations

from collections import Counter

from curvlib.evaluate.exact import normalise
from curvlib.evaluate.few_shot import SHOTS, Task, chats, load_tasks

TASKS = load_tasks()


def copies(task: Task) -> list[str]:
    return [question for question, answer in task.shots + task.questions if normalise(question) == normalise(answer)]


def test_there_are_enough_questions_and_none_is_a_shot() -> None:
    assert sum(len(task.questions) for task in TASKS) >= 256
    assert all(len(task.shots) == SHOTS and len(task.questions) == 32 for task in TASKS)
    for task in TASKS:
        asked = [question for question, _ in task.shots + task.questions]
        assert len(set(asked)) == len(asked)


def test_neither_a_copy_nor_a_constant_scores() -> None:
    assert not [copies(task) for task in TASKS if copies(task)]
    assert copies(Task("upper case", (("cat", "CAT"),), ()))
    for task in TASKS:
        assert Counter(answer for _, answer in task.questions).most_common(1)[0][1] <= 4
        assert len({answer for _, answer in task.shots}) == SHOTS  # balanced: no label is shown twice


def test_chats_hold_the_shots_as_earlier_turns() -> None:
    task = TASKS[0]
    alone, shown, shuffled = chats(task, 0), chats(task), chats(task, shuffled=True)
    assert [len(chat) for chat in (alone[0], shown[0], shuffled[0])] == [2, 18, 18]
    assert shown[3][-2:] == alone[3]
    pairs = [(turn["content"], answer["content"]) for turn, answer in zip(shown[0][::2], shown[0][1::2], strict=True)]
    assert tuple(pairs[:-1]) == task.shots


def test_shuffled_shots_show_the_same_answers_none_of_them_right() -> None:
    for task in TASKS:
        shown = [turn["content"] for turn in chats(task, shuffled=True)[0][1:-2:2]]
        answers = [answer for _, answer in task.shots]
        assert sorted(shown) == sorted(answers)
        assert all(wrong != right for wrong, right in zip(shown, answers, strict=True))
