"""Rows in every usual form give the same chats; what is malformed, doubled or not read is told with its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from curvlib.errors import CurvlibError
from curvlib.restore import given as module
from curvlib.restore.given import cut, encode_chats, read_chats
from tests.evaluate import toys


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CURVLIB_CACHE", str(tmp_path / "cache"))


def chat(number: int, **more: Any) -> dict[str, Any]:
    return {"messages": [user(f"Write {number}"), {"role": "assistant", "content": f"plan\u2028{number}", **more}]}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def lines(folder: Path, *rows: Any, name: str = "rows.jsonl", encoding: str = "utf-8", end: str = "\n") -> Path:
    file = folder / name
    texts = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_bytes((end.join(texts) + end).encode(encoding))
    return file


CHATS = [chat(number)["messages"] for number in range(3)]
FORMS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "messages": lambda c: {"messages": c},
    "prompt and completion": lambda c: {"prompt": c[0]["content"], "completion": c[1]["content"]},
    "prompt and response": lambda c: {"prompt": c[0]["content"], "response": c[1]["content"]},
    "both conversational": lambda c: {"prompt": c[:1], "completion": c[1:]},
    "alpaca": lambda c: {"instruction": c[0]["content"], "input": "", "output": c[1]["content"]},
    "sharegpt": lambda c: {"conversations": [{"from": "human", "value": c[0]["content"]},
                                             {"from": "gpt", "value": c[1]["content"]}]},
    "an id as prompt": lambda c: {"prompt": "17", "messages": c},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_and_file_gives_the_same_chats(form: str, tmp_path: Path) -> None:
    table = [FORMS[form](c) for c in CHATS]
    Dataset.from_list(table).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(table, indent=1), "utf-8")
    files = [tmp_path / "rows.parquet", tmp_path / "rows.json", lines(tmp_path, *table)]
    files += [
        lines(tmp_path, *table, name="bom.jsonl", encoding="utf-8-sig"),
        lines(tmp_path, *table, name="w.jsonl", end="\r\n\n"),
    ]
    if all(isinstance(value, str) for value in table[0].values()):
        Dataset.from_list(table).to_csv(tmp_path / "rows.csv", index=False)
        Dataset.from_list(table).to_csv(tmp_path / "rows.tsv", index=False, sep="\t")
        files += [tmp_path / "rows.csv", tmp_path / "rows.tsv"]
    for file in files:
        found = read_chats(file)
        assert list(found.chats.values()) == CHATS, file
        assert found.notes == (("columns not read: prompt",) if form == "an id as prompt" else ())


def test_a_csv_file_may_hold_messages_as_json(tmp_path: Path) -> None:
    table = [{"messages": json.dumps(c)} for c in CHATS]
    Dataset.from_list(table).to_csv(tmp_path / "rows.csv", index=False)
    assert list(read_chats(tmp_path / "rows.csv").chats.values()) == CHATS


def test_a_hub_id_is_read_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = module.load_dataset, []

    def hub(name: str, **options: Any) -> Any:
        asked.append((name, options["split"]))
        return real(
            "json", data_files=str(lines(tmp_path, *map(chat, range(3)))), split="train", cache_dir=str(tmp_path)
        )

    monkeypatch.setattr(module, "load_dataset", hub)
    assert list(read_chats("org/chats").chats.values()) == CHATS
    assert asked == [("org/chats", "train")]


def test_an_unknown_hub_id_and_a_missing_file_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def hub(*_: Any, **__: Any) -> Any:
        raise ConnectionError("nobody\nanswers")

    monkeypatch.setattr(module, "load_dataset", hub)
    for source, message in (
        ("org/chats", "nobody answers"),
        ("/no/rows.jsonl", "cannot read"),
        ("rows", "cannot read"),
    ):
        with pytest.raises(CurvlibError, match=rf"^[^\n]*{message}[^\n]*$"):
            read_chats(source)


def test_systems_inputs_numbers_and_words_like_na_are_kept(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(
        "system,instruction,input,output\nBe kind,Add,1 and 2,3\n,Say,NA,null\n", "utf-8"
    )
    assert list(read_chats(tmp_path / "rows.csv").chats.values()) == [
        [{"role": "system", "content": "Be kind"}, user("Add\n\n1 and 2"), {"role": "assistant", "content": "3"}],
        [user("Say\n\nNA"), {"role": "assistant", "content": "null"}],
    ]
    system = {"from": "system", "value": "Be kind"}
    turns = [system, {"from": "human", "value": "red"}, {"from": "gpt", "value": "blue"}]
    first, _ = read_chats(
        lines(tmp_path, {"conversations": turns, "id": 1}, {"conversations": turns[1:], "id": "a"})
    ).chats.values()
    assert [message["role"] for message in first] == ["system", "user", "assistant"]


def test_prompts_may_lack_an_answer_and_keep_a_given_one(tmp_path: Path) -> None:
    table = [
        {"prompt": "Write"},
        {"prompt": "Plan", "response": "I cannot"},
        {"messages": [user("red")]},
        {"prompt": "b", "response": ""},
    ]
    found = read_chats(lines(tmp_path, *table), answered=False)
    assert [len(c) for c in found.chats.values()] == [1, 2, 1, 1]
    assert len(encode_chats(toys.tokenizer(), found)) == 4


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    doubled = {"messages": [user(" WRITE  1"), {"role": "assistant", "content": "another"}]}
    table = [
        chat(1),
        doubled,
        chat(1),
        chat(2, weight=0),
        chat(3, weight=1),
        {"messages": [user("red"), {"role": "assistant", "content": "  "}], "tag": "x"},
    ]
    found = read_chats(lines(tmp_path, *table))
    assert list(found.chats) == ["line 1", "line 5"]
    assert sorted(found.notes) == [
        "1 rows of weight 0 left out",
        "1 rows without text left out",
        "2 rows repeated left out",
        "columns not read: tag",
    ]
    with pytest.raises(CurvlibError, match="holds no chat with text"):
        read_chats(lines(tmp_path, chat(1, weight=0)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("{", "line 3 is not JSON"),
        ("[" * 100_000, "line 3 is not JSON"),
        ("[]", "line 3 is no JSON object"),
        ({"text": "Write"}, "line 3 holds no list of messages and no prompt, but text"),
        ({"prompt": "Write"}, "line 3 has no user message, or ends with 'user'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "line 3 has a message of role 'tool'"),
        ({"messages": [{"role": "User", "content": "x"}]}, "line 3 has a message of role 'User'"),
        ({"messages": [{"role": "developer", "content": "x"}]}, "line 3 has a message of role 'developer'"),
        (
            {"messages": [user([{"type": "text", "text": "x"}])]},
            "line 3 has a message of user that is more than text (the content is of type list",
        ),
        (
            {"messages": [user("x"), {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]},
            "of type NoneType",
        ),
        (
            {"messages": [user("x"), {"role": "assistant", "content": "y", "tool_calls": [{"id": 1}]}]},
            "more than text (tool_calls)",
        ),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "line 3 has a message of role 'robot'"),
        ({"messages": "Write"}, "line 3 "),
        ({"messages": []}, "line 3 holds no list of messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "line 3 has no user message"),
    ],
)
def test_malformed_rows_are_told_with_their_line(wrong: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CurvlibError) as caught:
        read_chats(lines(tmp_path, chat(0), "", wrong, *map(chat, range(1, 9))))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", "é".encode("latin1")])
def test_files_without_rows_are_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(CurvlibError, match=r"^[^\n]*rows.jsonl(, line 1 is not JSON| is empty)[^\n]*$"):
        read_chats(tmp_path / "rows.jsonl")


def test_rows_are_cut_three_ways_without_overlap() -> None:
    parts = cut(range(12), (4, 3, 3), "rows", seed=0)
    assert len({*parts.learn, *parts.choose, *parts.show}) == 10
    assert [len(part) for part in (parts.learn, parts.choose, parts.show)] == [4, 3, 3]
    with pytest.raises(CurvlibError, match="5 rows were given, too few"):
        cut(range(5), (4, 3, 3), "rows", seed=0)
