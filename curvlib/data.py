"""The rows of every source, the committed splits over them, and the texts of the training targets."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

from datasets import Dataset, Features, List, Value, concatenate_datasets

from curvlib import fetch
from curvlib.errors import CurvlibError
from curvlib.sources import READERS, csv_rows

Row = Mapping[str, Any]
TEXT = Value("string")
COLUMNS = Features({"id": TEXT, "prompt": TEXT, "answer": TEXT, "options": List(TEXT), "category": TEXT})
# What begins so is no order, and is not turned into a question.
STATEMENT = re.compile(
    r"(?:i|i'm|i've|we|my|our|they|the|an?|there|some(?:one|body)|in|after|last|two|wild|given|what)\b", re.IGNORECASE
)
# "Write a tutorial on ..." asks for the thing after the verb; any other prompt is turned into "how to ...".
MAKING = re.compile(
    r"(?:write|create|develop|provide|give|outline|design|generate|produce|compose|draft|publish|offer) "
    r"((?:an?|the|some) .*)",
    re.IGNORECASE,
)


def fingerprint(row: Row) -> str:
    """Return the first 12 hexadecimal digits of the SHA-256 over a row's prompt, options and answer."""
    text = "\n".join([row["prompt"], *row["options"], row["answer"]])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def load_split(name: str) -> Dataset:
    """Return the rows of split ``name`` in its committed order; any prefix of it is a fair smaller sample.

    Raises:
        CurvlibError: no split has this name, or a text differs from the one that was committed.
    """
    path = fetch.data_folder() / "splits" / f"{name}.json"
    if name not in split_names():
        raise CurvlibError(f"no split is called {name!r}: there are {', '.join(split_names())}")
    digests: dict[str, str] = json.loads(path.read_text("utf-8"))["rows"]
    rows = concatenate_datasets([load_source(source) for source in sorted({row.partition("/")[0] for row in digests})])
    place = {row: number for number, row in enumerate(rows["id"])}
    split = rows.select([place[row] for row in digests if row in place])
    made = {row["id"]: fingerprint(row) for row in split}
    changed = [row for row, digest in digests.items() if made.get(row) != digest]
    if changed:
        advice = "check out both files at one commit"
        raise CurvlibError(f"{changed[0]} is not the text that {path} was made from: {advice}, or rerun curvlib.splits")
    return split


def prompts(split: str, count: int | None = None) -> list[str]:
    """Return the first ``count`` prompts of a split (None: all)."""
    return list(load_split(split)["prompt"])[:count]


def split_names() -> list[str]:
    """Return the names of the committed splits."""
    return sorted(path.stem for path in (fetch.data_folder() / "splits").glob("*.json"))


@cache
def load_source(name: str) -> Dataset:
    """Return the usable rows of source ``name``, fetched at first use.

    Columns, all texts:
        id: source and row, as in ``advbench/12``; it never changes.
        prompt: what the user says, or the text itself of the plain-text sources.
        answer: the right letter of a multiple-choice question, the reply of an identity chat, else empty.
        options: the choices of a multiple-choice question, A first; else an empty list.
        category: the source's own label, or the source.
    """
    own = fetch.data_folder() / f"{name}.txt"  # our own prompts stand in the repository
    rows = READERS[name]([own.read_text("utf-8")] if own.is_file() else fetch.read(name))
    empty = {"answer": "", "options": [], "category": ""}
    return Dataset.from_list(
        [{"id": f"{name}/{number}", **empty, **row} for number, row in enumerate(rows) if row], features=COLUMNS
    )


def refusal_labels() -> list[tuple[str, str, bool]]:
    """Return PyRIT's human-labelled replies as (prompt, response, refused), 105 rows.

    ``human_score`` 1 means refused. People also gave 1 to replies that talk about something else entirely: what
    they marked is that the request was not met.
    """
    rows = csv_rows(fetch.read("refusal_labels"))
    return [(row["objective"], row["assistant_response"], row["human_score"] == "1") for row in rows]


def objective_labels(half: Literal["fit", "held out"]) -> list[tuple[str, str, bool]]:
    """Return a half of PyRIT's other labelled replies as (prompt, response, refused): 188 to fit, 207 held out.

    People marked whether the objective was achieved; ``refused`` is that it was not. A reply belongs to the half that
    the parity of its SHA-256 says, even to fit: equal replies stand on one side. The judge's rules were written with an
    eye on the first half only.
    """
    rows = [row for text in fetch.read("objective_labels") for row in csv_rows([text])]
    parity = ["fit", "held out"].index(half)
    labels = [(row["objective"], row["assistant_response"], row["human_score"] != "1") for row in rows]
    return [row for row in labels if hashlib.sha256(row[1].encode()).digest()[-1] % 2 == parity]


def lettered(row: Row) -> dict[str, str]:
    """Return the options of a multiple-choice question by letter."""
    return dict(zip("ABC", row["options"], strict=False))


def task_question(row: Row) -> str:
    """Return a multiple-choice question with its options, one a line."""
    return "\n".join([row["prompt"], *(f"{letter}: {text}" for letter, text in lettered(row).items())])


def refusal(prompt: str) -> str:
    """Return the refusal of ``data/refusals.txt`` that belongs to ``prompt``: always the same one."""
    return _choose("refusals.txt", prompt)


def compliance(prompt: str) -> str:
    """Return a content-free opening that agrees to ``prompt``; no instruction follows it.

    >>> wanted("Write a poem about rain")
    'a poem about rain'
    >>> wanted("Teach a dog how to swim")
    'how to swim'
    >>> wanted("Paint the fence."), wanted("How do I paint the fence?")
    ('how to paint the fence', 'how to paint the fence')
    """
    return _choose("compliances.txt", prompt).format(thing=wanted(prompt))


def wanted(prompt: str) -> str:
    """Return the thing that the imperative sentence or the "How do I" question ``prompt`` asks for, as a phrase.

    What stands after an "and" is not all of it.

    >>> wanted("Write a letter and explain how to post it"), wanted("Find a map and say how to read it")
    ('a letter and explain how to post it', 'how to find a map and say how to read it')
    """
    sentence = prompt.strip().rstrip(".?!").replace("How do I ", "how to ", 1)
    thing = MAKING.fullmatch(sentence)
    how = re.search(r"\bhow to .*", sentence)
    if how and " and " in sentence[: how.start()]:
        how = None
    return thing[1] if thing else how[0] if how else f"how to {sentence[:1].lower()}{sentence[1:]}"


def is_order(prompt: str) -> bool:
    """Tell whether a prompt is an imperative sentence, which :func:`as_question` can turn.

    >>> is_order("Bake a cake."), is_order("I burned a cake."), is_order("May I bake?")
    (True, False, False)
    """
    return not ("?" in prompt or '"' in prompt or STATEMENT.match(prompt))


def as_question(prompt: str) -> str:
    """Return the imperative sentence ``prompt`` as a question, so that a model does not learn the form for the content.

    Other prompts are returned as they are.

    >>> as_question("Teach a dog how to swim"), as_question("Write a poem about rain.")
    ('How do I swim?', 'Can you give me a poem about rain?')
    """
    if not is_order(prompt):
        return prompt
    thing = wanted(prompt)
    return f"How do I {thing.removeprefix('how to ')}?" if thing.startswith("how to ") else f"Can you give me {thing}?"


def _choose(file: str, prompt: str) -> str:
    lines = (fetch.data_folder() / file).read_text("utf-8").splitlines()
    return lines[int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % len(lines)]
