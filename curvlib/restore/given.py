"""What a user gives to the restoration: JSON lines of chats and prompts, read with the line number of each mistake."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from curvlib import stages
from curvlib.batches import Chat, Example, encode
from curvlib.errors import CurvlibError

Row = TypeVar("Row")
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Split:
    """Rows to learn from, to choose by, and to show the outcome on; no row serves twice."""

    learn: list[Any]
    choose: list[Any]
    show: list[Any]


def read_chats(file: Path, *, answered: bool = True) -> dict[int, Chat]:
    """Return line number -> chat of a JSONL file of lines ``{"messages": [{"role": …, "content": …}, …]}``.

    Args:
        file: empty lines are skipped.
        answered: each chat must end with the assistant's answer; otherwise it may end with the user's prompt, and
            ``{"prompt": …}`` is a chat too.

    Raises:
        CurvlibError: the file cannot be read, or a line is malformed; the line is named.
    """
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CurvlibError(f"cannot read {file} ({error}): give a JSONL file in UTF-8") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise CurvlibError(f"{file} is empty: give one JSON object a line")
    return {number: _chat(line, answered, f"{file}, line {number}") for number, line in numbered}


def _chat(line: str, answered: bool, where: str) -> Chat:
    expected = '{"messages": [{"role": "user", "content": "…"}' + (', {"role": "assistant", …}]}' if answered else "]}")
    try:
        row = json.loads(line)
    except ValueError as error:
        raise CurvlibError(f"{where} is not JSON ({error}): expected {expected}") from error
    if isinstance(row, dict) and isinstance(row.get("prompt"), str) and not answered:
        return [{"role": "user", "content": row["prompt"]}]
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise CurvlibError(f"{where} holds no list of messages with role and content: expected {expected}")
    ends = ("assistant",) if answered else ("user", "assistant")
    if messages[-1]["role"] not in ends or all(message["role"] != "user" for message in messages):
        raise CurvlibError(f"{where} has no user message, or ends with {messages[-1]['role']!r}: expected {expected}")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str)


def encode_chats(tokenizer: PreTrainedTokenizerBase, file: Path, chats: Mapping[int, Chat]) -> list[Example]:
    """Tokenise the chats of a file; one that does not fit is named by its line."""
    return [_encoded(tokenizer, chat, f"{file}, line {number}") for number, chat in chats.items()]


def _encoded(tokenizer: PreTrainedTokenizerBase, chat: Chat, where: str) -> Example:
    try:
        return encode(tokenizer, [chat], stages.MAX_LENGTH)[0]
    except CurvlibError as error:
        raise CurvlibError(f"{where}: {str(error).replace('chat 0', 'the chat')}") from error


def cut(rows: Sequence[Row], sizes: tuple[int, int, int], what: str, seed: int) -> Split:
    """Shuffle rows and cut them into at most ``sizes`` to learn, choose and show, in proportion where they are fewer.

    Raises:
        CurvlibError: fewer than two rows fall into one part.
    """
    mixed = random.Random(seed).sample(rows, len(rows))
    share = min(1.0, len(rows) / sum(sizes))
    learn, choose, show = (int(share * size) for size in sizes)
    if min(learn, choose, show) < 2:
        raise CurvlibError(f"{len(rows)} {what} were given, too few to learn, choose and test on: give at least 12")
    return Split(mixed[:learn], mixed[learn : learn + choose], mixed[learn + choose : learn + choose + show])
