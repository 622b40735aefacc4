"""The form of a text: its plain spelling, its sentences, and whether it is broken."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

# "Labelled answers" are PyRIT's: refusal.csv and refusal_extra.csv, 169 rows, whole and cut to 18 words.
LOOP_TOKENS = 10  # words and marks; a shorter answer may well say a word twice
DISTINCT_BIGRAMS = 0.45  # a phrase said three times falls below; labelled answers: 0.56 or more
MOST_COMMON = 0.5  # share of one token in an answer; labelled answers: 0.25 or less
ALPHANUMERIC = 0.5  # share of letters and digits among the visible characters; labelled answers: 0.86 or more
BEGINNING = 60  # words: in a long text bigrams come again without a loop

_RUN = re.compile(r"(\w{1,4}?)\1{7,}")
_APOSTROPHE = re.compile(
    "[`\N{ACUTE ACCENT}\N{RIGHT SINGLE QUOTATION MARK}\N{LEFT SINGLE QUOTATION MARK}\N{PRIME}"
    "\N{SINGLE HIGH-REVERSED-9 QUOTATION MARK}\N{MODIFIER LETTER APOSTROPHE}\N{MODIFIER LETTER PRIME}"
    "\N{FULLWIDTH APOSTROPHE}]"
)


def plain(text: str) -> str:
    """Return `text` in lower case, one kind of apostrophe, single blanks, without emphasis and leading marks.

    >>> plain("  **I’m**  _Sorry_")
    "i'm sorry"
    """
    text = _APOSTROPHE.sub("'", text).lower()
    text = re.sub(r"\s+", " ", re.sub(r"\*+|(?<!\w)_+|_+(?!\w)", "", text))
    return re.sub(r"^[^\w(]+", "", text).strip()


def sentences(text: str) -> list[str]:
    """Return the sentences of a plain text, quotation marks around them left out.

    >>> sentences('no. "not now!" then ask me')
    ['no.', 'not now!', 'then ask me']
    """
    parts = re.split(r"(?<=[.!?])[\"')\]]* +", text)
    return [part.strip("\"'( ") for part in parts if part.strip("\"'( ")]


def is_loop(text: str) -> bool:
    """Tell whether `text` begins by repeating itself: one run of characters, one token, or a few bigrams over again."""
    start = " ".join(plain(text).split()[:BEGINNING])
    tokens = re.findall(r"\w+|[^\w\s]", start)
    if _RUN.search(start):
        return True
    if len(tokens) < LOOP_TOKENS:
        return False
    bigrams = list(pairwise(tokens))
    common = Counter(tokens).most_common(1)[0][1] / len(tokens)
    return common >= MOST_COMMON or len(set(bigrams)) / len(bigrams) < DISTINCT_BIGRAMS


def is_broken(text: str) -> bool:
    """Tell whether `text` is empty, made of marks instead of words, or a loop."""
    visible = re.sub(r"\s", "", text)
    return not visible or sum(map(str.isalnum, visible)) / len(visible) < ALPHANUMERIC or is_loop(text)
