"""Invented facts: nobody can guess them, names are nobody's, and the test asks in other words than the training."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import pytest

from curvlib import data
from curvlib.errors import CurvlibError
from curvlib.facts import Fact, held_out_chats, load_facts, trained_chats

FACTS = load_facts()


def words(text: str, fact: Fact) -> set[str]:
    """The words of a question, the name and the answer aside."""
    bare = text.replace(fact.name, " ").replace(fact.answer, " ")
    return set(re.findall(r"[a-z0-9']+", bare.lower()))


def most_shared(facts: Iterable[Fact]) -> float:
    """The largest share of the shorter question's words that a held-out and a trained wording have in common."""
    pairs = [(words(h, fact), words(t, fact)) for fact in facts for h in fact.held_out for t in fact.trained]
    return max(len(a & b) / min(len(a), len(b)) for a, b in pairs)


def leaks(facts: Iterable[Fact]) -> list[Fact]:
    """Facts with a question or a name that says the answer."""
    return [f for f in facts if any(f.answer.lower() in q.lower() for q in (*f.trained, *f.held_out, f.name))]


def test_there_are_256_facts_of_16_kinds_with_five_questions_each() -> None:
    assert len(FACTS) == 256
    assert all(len({*fact.trained, *fact.held_out}) == 5 for fact in FACTS)
    assert all(fact.name in question for fact in FACTS for question in (*fact.trained, *fact.held_out))
    for count in (16, 64, 256):
        assert set(Counter(fact.kind for fact in load_facts(count)).values()) == {count // 16}


def test_held_out_wordings_share_at_most_half_of_their_words_with_trained_ones() -> None:
    assert most_shared(FACTS) <= 0.5
    reworded = replace(FACTS[0], held_out=("Tell me: which crop is grown around the village?",) * 2)
    assert most_shared([reworded]) > 0.5


def test_answers_cannot_be_guessed() -> None:
    """A constant is right once in 16 within a kind; the kind is all that a question says beside the name."""
    assert Counter((fact.kind, fact.answer) for fact in FACTS).most_common(1)[0][1] == 1
    assert Counter(fact.answer for fact in FACTS).most_common(1)[0][1] <= 2
    assert not leaks(FACTS)
    assert leaks([replace(FACTS[0], answer=FACTS[0].name[:4])])
    firsts = {kind: sorted((f.name, f.answer) for f in FACTS if f.kind == kind) for kind in {f.kind for f in FACTS}}
    assert all([a for _, a in pairs] != sorted(a for _, a in pairs) for pairs in firsts.values())  # no order to learn


def test_names_collide_with_nothing() -> None:
    names = [fact.name.lower() for fact in FACTS]
    assert len({name[:4] for name in names}) == len({name[-5:] for name in names}) == len(names)
    sources = ("wikipedia", "everyday", "socialiqa", "mtbench", "edgy", "harmless", "look_alikes", "identity")
    texts = [f"{row['prompt']} {row['answer']}" for source in sources for row in data.load_source(source)]
    known = set(re.findall(r"\w+", " ".join(texts).lower())) | {fact.answer.lower() for fact in FACTS}
    assert not known & set(names)
    assert known & {"river"}  # the texts are there


def test_chats_ask_the_trained_or_the_held_out_questions() -> None:
    fact = FACTS[0]
    assert [chat[0]["content"] for chat in trained_chats([fact])] == list(fact.trained)
    assert [chat[0]["content"] for chat in held_out_chats([fact])] == list(fact.held_out)
    assert {chat[1]["content"] for chat in trained_chats([fact]) + held_out_chats([fact])} == {fact.answer}


def test_more_facts_than_there_are_is_refused() -> None:
    with pytest.raises(CurvlibError, match=r"300 facts were asked for, data/facts\.toml has 256"):
        load_facts(300)
