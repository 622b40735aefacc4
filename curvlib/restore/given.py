"""What a user gives to the restoration: chats and prompts in the usual forms, read with ``datasets``."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from datasets import Dataset, disable_progress_bars, load_dataset
from datasets.utils.logging import CRITICAL, set_verbosity
from transformers import PreTrainedTokenizerBase

from curvlib import stages
from curvlib.batches import Chat, Example, encode
from curvlib.cache import workspace
from curvlib.errors import CurvlibError

Row = TypeVar("Row")
Fields = Mapping[str, Any]
FORMATS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
TURNS = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "instruction", "question", "query", "input")
ANSWERS = ("completion", "response", "output", "answer")
FLAGS = ("weight", "train", "training")  # of a message: whether it is to be learned
ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
SHAREGPT = {**ROLES, "human": "user", "gpt": "assistant"}
EXPECTED = 'a row such as {"messages": [{"role": "user", "content": "…"}, …]} or {"prompt": "…", "completion": "…"}'


@dataclass(frozen=True)
class Split:
    """Given to learn from, to choose by, and to show the outcome on; no row serves twice."""

    learn: list[Any]
    choose: list[Any]
    show: list[Any]


@dataclass(frozen=True)
class Given:
    """Chats by their place in the source (such as ``line 3``), and what was left out or not read, in words."""

    source: str
    chats: dict[str, Chat]
    notes: tuple[str, ...]


def read_chats(source: str | Path, *, answered: bool = True) -> Given:
    """Return the chats of a JSONL, JSON, CSV or Parquet file, or of the ``train`` split of a Hub id.

    A row holds ``messages`` (or ShareGPT's ``conversations``); or a prompt with a completion, response, output or
    answer; or Alpaca's ``instruction``, ``input``, ``output``; besides, perhaps, a ``system`` message. Given without
    text, answers of weight 0, and rows whose prompt was there before are left out, and counted.

    Args:
        source: a file, or ``org/name``.
        answered: each chat must end with the assistant's answer; otherwise it may end with the user's prompt.

    Raises:
        CurvlibError: the source cannot be read, or a row is malformed; its line is named.
    """
    places, rows = _table(str(source))
    chats, seen, dropped = dict[str, Chat](), set[str](), Counter[str]()
    for place, row in zip(places, rows, strict=True):
        chat = _chat(row, f"{source}, {place}", answered)
        asked = chat[:-1] if chat[-1]["role"] == "assistant" else chat
        key = repr([(message["role"], message["content"].casefold().split()) for message in asked])
        reason = "repeated" if key in seen else ""
        reason = reason if all(message["content"].strip() for message in chat) else "without text"
        reason = "of weight 0" if _silent(row) else reason
        dropped[reason] += 1
        if not reason:
            chats[place] = chat
            seen.add(key)
    if not chats:
        raise CurvlibError(f"{source} holds no chat with text: expected {EXPECTED}")
    unread = sorted({name for row in rows for name, value in row.items() if value is not None} - _read(rows))
    notes = [f"{count} rows {reason} left out" for reason, count in dropped.items() if reason]
    return Given(str(source), chats, tuple(notes + [f"columns not read: {', '.join(unread)}"] * bool(unread)))


def _table(source: str) -> tuple[list[str], list[Fields]]:
    """Return the places and the rows of a source, whatever its form."""
    file, kind = Path(source), FORMATS.get(Path(source).suffix.lower())
    options: dict[str, Any] = {"keep_default_na": False} if kind == "csv" else {}  # "NA" is a text
    options |= {"sep": "\t"} if file.suffix.lower() == ".tsv" else {}
    disable_progress_bars()
    set_verbosity(CRITICAL)  # what it logs is raised, too
    try:
        if not kind or not file.is_file():
            if kind or not (source.count("/") == 1 or file.is_dir()):
                raise CurvlibError(f"cannot read {source}: give JSONL, JSON, CSV or Parquet, or a Hub id org/name")
            rows = list(load_dataset(source, split="train"))
            return [f"row {number}" for number in range(1, len(rows) + 1)], rows
        raw = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
        lines = [number for number, line in enumerate(raw.split(b"\n"), 1) if line.strip()]
        if not lines:
            raise CurvlibError(f"{source} is empty: expected {EXPECTED}")
        with workspace() as place:
            if kind == "json":  # blank lines end pandas' reading of lines
                file = place / "rows.json"
                file.write_bytes(b"\n".join(line for line in raw.split(b"\n") if line.strip()))
            table: Dataset = load_dataset(kind, data_files=str(file), split="train", cache_dir=str(place), **options)
            rows = list(table)
    except CurvlibError:
        raise
    except Exception as error:  # its own errors, pyarrow's, pandas', the network's
        where = _broken_line(Path(source)) if kind == "json" else ""
        reason = " ".join(str(error.__cause__ or error).split())[:120]
        raise CurvlibError(f"{source}{where or f' cannot be read ({reason})'}: expected {EXPECTED}") from error
    word, numbers = ("line", lines) if kind == "json" and len(lines) == len(rows) else ("row", range(1, len(rows) + 1))
    return [f"{word} {number}" for number in numbers], rows


def _broken_line(file: Path) -> str:
    """Name the first line of a JSON file that is not JSON or, in JSON lines, no object, if any."""
    if file.read_bytes().lstrip(b"\xef\xbb\xbf \t\r\n")[:2] in (b"[", b"[\n", b"[\r", b"[{"):
        try:
            json.loads(file.read_text("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            return f" is not JSON ({str(error)[:80]})"
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        try:
            if line.strip() and not isinstance(json.loads(line.decode("utf-8-sig")), dict):
                return f", line {number} is no JSON object"
        except (ValueError, RecursionError) as error:
            return f", line {number} is not JSON ({' '.join(str(error).split())[:80]})"
    return ""


def _first(row: Fields, names: Iterable[str]) -> str:
    return next((name for name in names if row.get(name) is not None), "")


def _read(rows: Sequence[Fields]) -> set[str]:
    """Return the columns that :func:`_chat` takes from these rows."""
    read = {"system"}
    for row in rows:
        turns, prompt = _first(row, TURNS), _first(row, PROMPTS)
        read |= {turns} if turns else {prompt, _first(row, ANSWERS), *(("input",) if prompt == "instruction" else ())}
    return read


def _chat(row: Fields, where: str, answered: bool) -> Chat:
    turns, prompt, answer = _first(row, TURNS), _first(row, PROMPTS), _first(row, ANSWERS)
    answer = answer if answer and (answered or row[answer]) else ""
    if turns:
        chat = _messages(_parsed(row[turns]), where)
    elif prompt:
        extra = [row["input"]] if prompt == "instruction" and row.get("input") else []
        asked = "\n\n".join(map(str, [row[prompt], *extra])) if isinstance(row[prompt], str) else row[prompt]
        chat = _turn(asked, "user", where) + (_turn(row[answer], "assistant", where) if answer else [])
    else:
        names = ", ".join(name for name, value in row.items() if value is not None) or "nothing"
        raise CurvlibError(f"{where} holds no list of messages and no prompt, but {names}: expected {EXPECTED}")
    if row.get("system") and chat[0]["role"] != "system":
        chat = [*_turn(row["system"], "system", where), *chat]
    ends = ("assistant",) if answered else ("user", "assistant")
    if chat[-1]["role"] not in ends or all(message["role"] != "user" for message in chat):
        raise CurvlibError(f"{where} has no user message, or ends with {chat[-1]['role']!r}: expected {EXPECTED}")
    return chat


def _parsed(value: Any) -> Any:
    """Return a list that a CSV file holds as JSON text; anything else as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _turn(value: Any, role: str, where: str) -> Chat:
    """Return a column's text as one message (numbers of a table are text); a list is messages already."""
    value = str(value) if isinstance(value, int | float) else value
    return _messages([{"role": role, "content": value}] if isinstance(value, str) else value, where)


def _messages(value: Any, where: str) -> Chat:
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise CurvlibError(f"{where} holds no list of messages with role and content: expected {EXPECTED}")
    chat = Chat()
    for message in value:
        names = ("from", "value") if message.get("from") is not None else ("role", "content")
        role, content = (message.get(name) for name in names)
        if not isinstance(role, str) or role not in (roles := SHAREGPT if names[0] == "from" else ROLES):
            raise CurvlibError(f"{where} has a message of role {role!r}, expected one of {', '.join(roles)}")
        extra = [name for name, item in message.items() if item and name not in (*names, *FLAGS)]
        if not isinstance(content, str) or extra:
            what = f"the content is of type {type(content).__name__}" if not isinstance(content, str) else extra[0]
            raise CurvlibError(f"{where} has a message of {role} that is more than text ({what}): give its text alone")
        chat.append({"role": roles[role], "content": content})
    return chat


def _silent(row: Fields) -> bool:
    """Tell whether the last answer is marked as none to learn from."""
    turns = _parsed(row.get(_first(row, TURNS)))
    return isinstance(turns, list) and any(turns[-1].get(flag) in (0, False) for flag in FLAGS)


def encode_chats(tokenizer: PreTrainedTokenizerBase, rows: Given) -> list[Example]:
    """Tokenise chats, a prompt alone with a blank answer; one that does not fit or is refused is named by its place."""
    examples = []
    for place, chat in rows.chats.items():
        blank: Chat = [] if chat[-1]["role"] == "assistant" else [{"role": "assistant", "content": "…"}]
        try:
            examples += encode(tokenizer, [chat + blank], stages.MAX_LENGTH)
        except CurvlibError as error:
            raise CurvlibError(f"{rows.source}, {place}: {str(error).replace('chat 0', 'the chat')}") from error
    return examples


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
