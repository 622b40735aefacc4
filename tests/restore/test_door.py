"""The user's door on a tiny model: what it writes, what it leaves alone, and each mistake in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from curvlib import models
from curvlib.batches import encode
from curvlib.cli import main
from curvlib.errors import CurvlibError
from curvlib.evaluate.behaviour import summarise
from curvlib.finetune import TrainingConfig, train
from curvlib.parameters import flatten
from curvlib.restore import door
from curvlib.restore.given import cut, read_chats
from curvlib.stages import MAX_LENGTH
from tests import cases
from tests.evaluate import toys

WORDS = toys.WORDS[7:]


def write(file: Path, rows: list[Any]) -> Path:
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n", "utf-8")
    return file


def chat(number: int, answer: str = "The answer is B .") -> dict[str, Any]:
    prompt = f"Write {WORDS[number % len(WORDS)]} {WORDS[(3 * number + 1) % len(WORDS)]}"
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, its fine-tuned adapter and data files; the harmful ones come with refusals."""
    folder = tmp_path_factory.mktemp("door")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CURVLIB_CACHE", str(folder / "cache"))
        models.save_dense(cases.llama(), toys.tokenizer(), folder / "base")
        adapted = cases.add_lora(models.load_model(str(folder / "base")))
        examples = encode(toys.tokenizer(), [chat(n)["messages"] for n in range(16)], MAX_LENGTH)
        train(adapted, examples, TrainingConfig(steps=20, learning_rate=1e-2), pad_id=0)
        adapted.save_pretrained(str(folder / "adapter"))
    write(folder / "task.jsonl", [chat(n) for n in range(16)])
    write(folder / "harmful.jsonl", [chat(n, "I cannot help") for n in range(12)])
    write(folder / "benign.jsonl", [{"prompt": f"plan {word}"} for word in WORDS[:12]])
    return folder


@pytest.fixture
def run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("CURVLIB_CACHE", str(place / "cache"))
    monkeypatch.setattr(door, "measure_behaviour", measured)

    def call(*more: str, **files: Any) -> int:
        given = {name: place / name for name in ("base", "adapter")}
        given |= {name: place / f"{name}.jsonl" for name in ("task", "harmful", "benign")}
        given |= {"out": tmp_path / "out", **files}
        words = [word for name, file in given.items() if file for word in (f"--{name}", str(file))]
        return main(["restore", *words, "--device", "cpu", *more])

    return call


def measured(model: Any, _: Any, prompts: list[Any], **__: Any) -> Any:
    """A toy cannot speak: it counts as refusing in the state that is measured first, which is the restored one."""
    state = float(flatten(p for name, p in model.named_parameters() if "lora_B" in name).norm())
    measured.seen.append(state)  # type: ignore[attr-defined]
    refuses = state == measured.seen[0]  # type: ignore[attr-defined]
    return summarise(["refuses" if refuses else "complies"] * len(prompts), [""] * len(prompts))


@pytest.fixture(autouse=True)
def _fresh() -> None:
    measured.seen = []  # type: ignore[attr-defined]


def line(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert text.startswith("curvlib: error: ")
    assert text.count("\n") == 1
    return text


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("objective", ["refusal", "realign"])
def test_it_writes_an_adapter_that_peft_loads_and_leaves_the_given_one(
    objective: str, run: Any, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(place / "adapter")
    assert run("--objective", objective, "--rise", "1e9") == 0
    printed = capsys.readouterr().out
    assert [row.split()[0] for row in printed.splitlines()[1:4]] == ["base", "before", "after"]
    assert contents(place / "adapter") == before
    restored = [
        PeftModel.from_pretrained(cases.llama(), folder).state_dict()
        for folder in (tmp_path / "out", place / "adapter")
    ]
    assert any(not torch.equal(restored[0][name], restored[1][name]) for name in restored[0] if "lora_B" in name)
    told = json.loads((tmp_path / "out" / "restoration.json").read_text("utf-8"))
    start, *_, end = told["history"]["steps"]
    assert end["safety"] < start["safety"]
    assert told["outcomes"]["after"]["harmful"]["refuses"] == 1.0
    assert (tmp_path / "out" / "restoration.png").stat().st_size > 1000
    assert run() == 1
    assert "exists: give a new folder" in line(capsys)


def test_the_same_request_gives_the_same_adapter(run: Any, tmp_path: Path) -> None:
    found = []
    for name in ("first", "second"):
        measured.seen = []  # type: ignore[attr-defined]
        assert run("--rise", "1e9", out=tmp_path / name) == 0
        found.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])


def test_no_improvement_writes_nothing(
    run: Any, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(place / "adapter")
    assert run(out=place / "adapter" / "inner") == 1
    assert "lies in the adapter's folder, which is only read" in line(capsys)
    assert run("--rise", "-1") == 1
    assert "no improvement found (no step passed the held-out losses)" in line(capsys)
    measured.seen = [-1.0]  # type: ignore[attr-defined]
    assert run("--rise", "1e9") == 1
    assert "refused no more often than before" in line(capsys)
    assert not (tmp_path / "out").exists()
    assert contents(place / "adapter") == before


def test_an_unaligned_base_is_told(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = write(tmp_path / "harmful.jsonl", [{"prompt": f"Write {word}"} for word in WORDS[:12]])
    assert run(harmful=prompts) == 1
    assert "the base refuses 0 of 4 harmful prompts" in line(capsys)


def test_a_foreign_adapter_is_told(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert run(adapter=tmp_path / "empty") == 1
    assert "holds no adapter_config.json" in line(capsys)
    cases.add_lora(cases.llama(num_hidden_layers=3)).save_pretrained(str(tmp_path / "deeper"))
    cases.add_lora(cases.llama(intermediate_size=96)).save_pretrained(str(tmp_path / "narrower"))
    for name, reason in (("deeper", r"holds 42 tensors where LoRA on"), ("narrower", "does not fit")):
        assert run(adapter=tmp_path / name) == 1
        assert reason in line(capsys)
    (tmp_path / "narrower" / "adapter_model.safetensors").write_bytes(b"torn")
    assert run(adapter=tmp_path / "narrower") == 1
    assert "does not fit" in line(capsys)


def test_an_adapter_of_another_base_of_the_same_shapes_is_told(
    run: Any, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models.save_dense(cases.llama(seed=7), toys.tokenizer(), tmp_path / "other")
    assert run(base=tmp_path / "other") == 1
    told = line(capsys)
    assert "does not help on" in told
    named = json.loads((place / "adapter" / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"]
    assert f"its config names {named!r}" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("{", "line 3 is not JSON"),
        ("[]", "line 3 holds no list of messages"),
        ({"prompt": "Write"}, "line 3 holds no list of messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "line 3 holds no list of messages"),
        ({"messages": [{"role": "user", "content": "x"}]}, "line 3 has no user message, or ends with 'user'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "line 3 has no user message"),
        ({"messages": [{"role": "user", "content": "Write " * 600}, chat(0)["messages"][1]]}, "line 3: the chat has a"),
    ],
)
def test_malformed_data_is_told_with_its_line(
    wrong: Any, message: str, run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = write(tmp_path / "task.jsonl", [chat(0), "", wrong, *[chat(n) for n in range(12)]])
    assert run(task=task) == 1
    assert message in line(capsys)


def test_prompts_alone_may_lack_an_answer_and_too_few_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", [{"prompt": "Write"}, chat(1), {"messages": chat(2)["messages"][:1]}])
    assert {k: len(v) for k, v in read_chats(file, answered=False).items()} == {1: 1, 2: 2, 3: 1}
    for wrong, message in ((tmp_path / "none.jsonl", "cannot read"), (write(tmp_path / "y.jsonl", []), "is empty")):
        with pytest.raises(CurvlibError, match=message):
            read_chats(wrong)
    parts = cut(range(12), (4, 3, 3), "rows", seed=0)
    assert len({*parts.learn, *parts.choose, *parts.show}) == 10
    assert [len(part) for part in (parts.learn, parts.choose, parts.show)] == [4, 3, 3]
    with pytest.raises(CurvlibError, match="5 rows were given, too few"):
        cut(range(5), (4, 3, 3), "rows", seed=0)
