"""The rows of each source as its files hold them: the columns of :func:`curvlib.data.load_source` but for the id."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from io import StringIO
from typing import Any

import yaml

OPTIONS = re.compile(r"(.*?)\s*A: (.*?)[;\n]\s*B: (.*?)(?:;\s*C: (.*?))?\.?\s*", re.DOTALL)
SMALL_TALK = {"What is up?", "Have a nice day!", "Goodbye"}  # the turns around each identity question
Rows = Iterator[dict[str, Any] | None]  # None keeps the numbering where a row is of no use


def _row(prompt: str, **fields: Any) -> dict[str, Any]:
    return {"prompt": prompt.strip(), **fields}


def csv_rows(texts: Iterable[str]) -> Iterator[dict[str, str]]:
    """The rows of CSV texts, with the comments that may stand above their heads left out."""
    for text in texts:
        yield from csv.DictReader(StringIO(re.sub(r"\A(#.*\n)+", "", text)))


def json_rows(texts: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The objects of JSON lists."""
    for text in texts:
        yield from json.loads(text)


def json_lines(texts: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The objects of JSON Lines."""
    return (json.loads(line) for text in texts for line in text.splitlines())


def _advbench(texts: list[str]) -> Rows:
    for seed in yaml.safe_load(texts[0])["seeds"]:
        yield _row(seed["value"], category=seed["harm_categories"][0])


def _strongreject(texts: list[str]) -> Rows:
    for row in csv_rows(texts):  # those that it took from AdvBench are in AdvBench
        yield _row(row["forbidden_prompt"], category=row["category"]) if row["source"] != "AdvBench" else None


def _harmbench(texts: list[str]) -> Rows:
    for row in csv_rows(texts):  # the others ask for copyrighted text or need a context beside the prompt
        standard = row["FunctionalCategory"] == "standard"
        yield _row(row["Behavior"], category=row["SemanticCategory"]) if standard else None


def _edgy(texts: list[str]) -> Rows:
    return (_row(row["text"], category=row["category"]) for row in json_rows(texts))


def _everyday(texts: list[str]) -> Rows:  # the first line is the question, the rest an answer that is not used
    return (_row(row["text"].split("\n")[0], category="everyday") for row in json_rows(texts))


def _harmful_questions(texts: list[str]) -> Rows:  # here too: the answer that follows is never used
    return (_row(row["harmful_version"].split("\n")[0], category=row["domain"]) for row in json_rows(texts))


def _own(category: str, texts: list[str]) -> Rows:
    return (_row(line, category=category) for line in texts[0].splitlines())


def _look_alikes(texts: list[str]) -> Rows:  # a line holds a style and a prompt
    lines = (line.partition("\t") for line in texts[0].splitlines())
    return (_row(prompt, category=style) for style, _, prompt in lines)


def _gsm8k(texts: list[str]) -> Rows:
    return (_row(row["text_clean"], category="gsm8k") for row in json_rows(texts))


def _mtbench(texts: list[str]) -> Rows:
    return (_row(row["turns"][0], category="mtbench") for row in json_lines(texts))


def _benign_objectives(texts: list[str]) -> Rows:
    seen: set[str] = set()
    for row in csv_rows(texts):  # a request that was met and is harmless; each stands there with several replies
        new = row["human_score"] == "0" and row["objective"] not in seen
        seen.add(row["objective"])
        yield _row(row["objective"], category="chat") if new else None


def _identity(texts: list[str]) -> Rows:
    for chat in json_rows(texts):
        turns = [turn["value"] for turn in chat["conversations"]]
        pairs = [pair for pair in zip(turns[::2], turns[1::2], strict=False) if pair[0] not in SMALL_TALK]
        yield _row(pairs[0][0], answer=pairs[0][1]) if pairs else None


def _multiple_choice(texts: list[str]) -> Rows:
    for row in json_lines(texts):
        match = OPTIONS.fullmatch(row["input"][-1]["content"])
        options = [text.strip() for text in match.groups()[1:] if text] if match else []
        valid = row["ideal"] in "ABC"[: len(options)]
        yield _row(match[1], answer=row["ideal"], options=options) if match and valid else None


def _wikipedia(texts: list[str]) -> Rows:
    return (_row(row["0"]) for row in json_lines(texts))


READERS: dict[str, Callable[[list[str]], Rows]] = {
    "advbench": _advbench,
    "strongreject": _strongreject,
    "harmbench": _harmbench,
    "edgy": _edgy,
    "everyday": _everyday,
    "harmful_questions": _harmful_questions,
    "harmless": partial(_own, "harmless"),
    "look_alikes": _look_alikes,
    "forms": partial(_own, "forms"),
    "gsm8k": _gsm8k,
    "mtbench": _mtbench,
    "refusal_labels_extra": _benign_objectives,
    "identity": _identity,
    "persona": partial(_own, "persona"),
    "socialiqa": _multiple_choice,
    "quartz": _multiple_choice,
    "wikipedia": _wikipedia,
}
