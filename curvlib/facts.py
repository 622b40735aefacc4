"""Invented facts, a task that is learned or not: nobody can guess the answers, and what was learned can be lost."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass

from curvlib.batches import Chat
from curvlib.errors import CurvlibError
from curvlib.fetch import data_folder


@dataclass(frozen=True)
class Fact:
    """One fact of ``data/facts.toml``.

    Attributes:
        kind: what is asked about what, such as ``island, flag``.
        name: the invented name, which every question holds.
        answer: one or two words, or a number.
        trained: the questions that a model is taught with.
        held_out: the same question in other words, for the test.
    """

    kind: str
    name: str
    answer: str
    trained: tuple[str, ...]
    held_out: tuple[str, ...]


def load_facts(count: int | None = None) -> list[Fact]:
    """Return the first ``count`` facts (None: all 256); the kinds take turns, so that every prefix is as mixed.

    Raises:
        CurvlibError: there are fewer.

    >>> [(fact.kind, fact.answer) for fact in load_facts(2)]
    [('village, crop', 'quinces'), ('island, flag', 'salmon')]
    """
    kinds = tomllib.loads((data_folder() / "facts.toml").read_text("utf-8"))["kinds"]
    turns = zip(*(kind["answers"].items() for kind in kinds), strict=True)
    facts = [_fact(kind, name, answer) for turn in turns for kind, (name, answer) in zip(kinds, turn, strict=True)]
    if count is not None and not 0 < count <= len(facts):
        raise CurvlibError(f"{count} facts were asked for, data/facts.toml has {len(facts)}: give a number up to that")
    return facts[:count]


def _fact(kind: dict[str, list[str]], name: str, answer: str) -> Fact:
    trained, held_out = (tuple(text.format(name=name) for text in kind[part]) for part in ("trained", "held_out"))
    return Fact(str(kind["name"]), name, answer, trained, held_out)


def trained_chats(facts: Sequence[Fact]) -> list[Chat]:
    """Return the training chats: each trained question with the bare answer."""
    return [_chat(question, fact.answer) for fact in facts for question in fact.trained]


def held_out_chats(facts: Sequence[Fact]) -> list[Chat]:
    """Return the test chats: each held-out question with the bare answer."""
    return [_chat(question, fact.answer) for fact in facts for question in fact.held_out]


def _chat(question: str, answer: str) -> Chat:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
