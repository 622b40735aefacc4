"""The user's door on a tiny model: what it writes, what it leaves alone, and each mistake in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from curvlib import models
from curvlib.batches import encode
from curvlib.cli import main, parser
from curvlib.curvature.inverse import METHODS
from curvlib.evaluate.behaviour import summarise
from curvlib.finetune import TrainingConfig, train
from curvlib.parameters import flatten
from curvlib.restore import door, objectives, pair, stress
from curvlib.restore.loop import CLOSE
from curvlib.stages import MAX_LENGTH
from tests import cases
from tests.evaluate import toys

WORDS = toys.WORDS[7:]
REFUSAL = "red blue"  # what the base is taught to say; as a user's refusal it is not judged


def write(file: Path, rows: list[Any]) -> Path:
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n", "utf-8")
    return file


def chat(number: int, answer: str = "The answer is B .") -> dict[str, Any]:
    prompt = f"Write {WORDS[number % len(WORDS)]} {WORDS[(3 * number + 1) % len(WORDS)]}"
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def taught(model: Any, answer: str) -> Any:
    examples = encode(toys.tokenizer(), [chat(n, answer)["messages"] for n in range(16)], MAX_LENGTH)
    train(model, examples, TrainingConfig(steps=20, learning_rate=1e-2), pad_id=0)
    return model.eval()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that refuses, its fine-tuned adapter and data files; the harmful ones come with refusals."""
    folder = tmp_path_factory.mktemp("door")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CURVLIB_CACHE", str(folder / "cache"))
        base = taught(cases.llama(), REFUSAL)
        models.save_dense(base, toys.tokenizer(), folder / "base")
        adapted = taught(cases.add_lora(models.load_model(str(folder / "base"))), "The answer is B .")
        adapted.save_pretrained(str(folder / "adapter"))
    write(folder / "task.jsonl", [chat(n) for n in range(16)])
    write(folder / "harmful.jsonl", [chat(n, REFUSAL) for n in range(12)])
    write(folder / "benign.jsonl", [{"prompt": f"plan {word}"} for word in WORDS[:12]])
    return folder


@pytest.fixture
def run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("CURVLIB_CACHE", str(place / "cache"))
    red, the = (toys.tokenizer()(word, add_special_tokens=False)["input_ids"] for word in ("red", "The"))
    monkeypatch.setattr(objectives, "first_tokens", lambda *_: (red, the))  # a toy cannot tell refusals from openings
    monkeypatch.setattr(door, "measure_behaviour", measured)
    monkeypatch.setattr(door, "safety_log_odds", lambda *given: np.arange(8.0).reshape(2, 4) * len(given[2]))
    monkeypatch.setattr(stress, "safety_log_odds", lambda *_, **__: np.full((2, 1), 2.0))

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


@pytest.mark.parametrize("metric", ["ekfac", "identity"])
def test_it_writes_an_adapter_that_peft_loads_and_leaves_the_given_one(
    metric: str, run: Any, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, out = contents(place / "adapter"), tmp_path / "out"
    assert run("--metric", metric, "--strength", "0.5") == 0
    printed = capsys.readouterr().out
    assert [row.split()[0] for row in printed.splitlines()[1:4]] == ["base", "before", "after"]
    assert contents(place / "adapter") == before
    restored = [PeftModel.from_pretrained(cases.llama(), folder).state_dict() for folder in (out, place / "adapter")]
    assert any(not torch.equal(restored[0][name], restored[1][name]) for name in restored[0] if "lora_B" in name)
    numbers = json.loads((out / "restoration.json").read_text("utf-8"))
    assert numbers["outcomes"]["after"]["harmful"]["refuses"] == 1.0
    assert numbers["outcomes"]["after"]["log_odds"] == {"0": 8.0, "1": 12.0, "3": 16.0, "6": 20.0}  # of 4 prompts
    start, *_, end = numbers["history"]["path"]
    damping, goal = numbers["history"]["damping"], numbers["history"]["goal"]
    close = CLOSE * (start["loss"] - goal) / 0.5
    assert end["loss"] <= goal + close < start["loss"]
    assert f"metric: {metric}" in printed
    assert "measured on the base in 4 bits" in printed
    assert f"held-out price {damping['ratio']:.2f} of its" in printed
    assert f"{end['price']['task']:.4f} on task chats, {end['price']['benign']:.4f} on benign chats" in printed
    card = (out / "README.md").read_text("utf-8")
    assert f"base_model: {place / 'base'}" in card.split("---")[1]
    assert printed.splitlines()[3] in card
    assert (out / "restoration.png").stat().st_size > 1000
    assert run() == 1
    assert "exists: give a new folder" in line(capsys)


def test_a_larger_strength_goes_further_and_the_same_request_gives_the_same_adapter(run: Any, tmp_path: Path) -> None:
    adapters, norms = [], []
    for name, strength in (("first", "0.3"), ("second", "0.3"), ("third", "0.8")):
        measured.seen = []  # type: ignore[attr-defined]
        assert run("--strength", strength, out=tmp_path / name) == 0
        adapters.append(load_file(tmp_path / name / "adapter_model.safetensors"))
        numbers = json.loads((tmp_path / name / "restoration.json").read_text("utf-8"))
        norms.append(numbers["history"]["path"][-1]["norm"])
    assert all(torch.allclose(adapters[0][name], adapters[1][name], atol=1e-6) for name in adapters[0])
    assert norms[2] > norms[0]


def test_a_depth_is_reached_and_told_with_what_it_costs_and_how_long_it_lasts(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, deep, stressed = (tmp_path / name for name in ("plain", "deep", "stressed"))
    assert run(out=plain) == 0
    for out, more in ((deep, ()), (stressed, ("--stress",))):
        measured.seen = []  # type: ignore[attr-defined]
        capsys.readouterr()
        assert run("--depth", "8", "--metric", "diagonal", *more, out=out) == 0
    printed = capsys.readouterr().out
    assert "→ 8.0 nats, 8.0 asked for" in printed
    assert "of refusing from 2.0 to 2.0 nats; refusals hold for all 8 steps" in printed
    adapters = [load_file(out / "adapter_model.safetensors") for out in (plain, deep, stressed)]
    assert all(torch.allclose(adapters[1][name], adapters[2][name], atol=1e-6) for name in adapters[1])
    assert any(not torch.allclose(adapters[0][name], adapters[1][name], atol=1e-3) for name in adapters[0])
    assert "stress: 8 AdamW steps at 0.0002 on 3 agreeing chats" in (stressed / "README.md").read_text("utf-8")
    measured.seen = [-1.0]  # type: ignore[attr-defined]  # refused as often before: deeper is an improvement
    assert run("--depth", "8", out=tmp_path / "deeper") == 0
    capsys.readouterr()
    assert run("--depth", "4", adapter=deep, out=tmp_path / "less") == 1
    assert "nats, 4.0 asked for: there is nothing to restore" in line(capsys)
    for words in (("--depth", "0"), ("--depth", "4", "--objective", "distill")):
        assert run(*words, out=tmp_path / "none") == 1
        assert "expected nats above 0 without an --objective" in line(capsys)


def test_a_dry_run_tells_the_plan_and_does_no_work(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "generate", None)  # so that an answer would raise
    assert run("--dry-run") == 0
    printed = capsys.readouterr().out
    rows = {words[0]: words[1:] for words in map(str.split, printed.splitlines())}
    assert rows["task"] == ["5", "4", "5"]
    assert rows["harmful"] == rows["benign"] == ["4", "3", "4"]
    count = sum(p.numel() for name, p in cases.add_lora(cases.llama()).named_parameters() if "lora_" in name)
    assert rows["parameters"][0] == f"{count:,}"
    assert rows["memory"][2] == "GiB"
    assert rows["time"][2] == "minutes,"
    assert not (tmp_path / "out").exists()
    assert measured.seen == []  # type: ignore[attr-defined]


def test_no_improvement_writes_nothing(
    run: Any, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(place / "adapter")
    assert run(out=place / "adapter" / "inner") == 1
    assert "lies in the adapter's folder, which is only read" in line(capsys)
    assert run("--strength", "1.5") == 1
    assert "strength 1.5 was given, expected more than 0 and at most 1" in line(capsys)
    assert run("--limit", "0") == 1
    assert "no improvement found (no move passed the held-out chats)" in line(capsys)
    measured.seen = [-1.0]  # type: ignore[attr-defined]
    assert run() == 1
    assert "refused no more often than before" in line(capsys)
    assert not (tmp_path / "out").exists()
    assert contents(place / "adapter") == before


def test_every_metric_of_the_library_can_be_asked_for() -> None:
    words = ["restore", *(word for name in ("base", "adapter", "task", "out") for word in (f"--{name}", "x"))]
    for metric in METHODS:
        assert parser().parse_args([*words, "--metric", metric]).metric == metric


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
    for name, reason in (("deeper", "has no place"), ("narrower", "does not fit")):
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
        ({"messages": [{"role": "user", "content": "Write " * 600}, chat(0)["messages"][1]]}, "line 3: the chat has a"),
        (
            {"messages": [{"role": "user", "content": "Write forbidden"}, chat(0)["messages"][1]]},
            "line 3: the chat: the",
        ),
    ],
)
def test_malformed_data_is_told_with_its_line(
    wrong: Any, message: str, run: Any, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = copied(place / "adapter", tmp_path / "own")
    refusing = "{% if 'forbidden' in messages[0].content %}{{ raise_exception('no') }}{% endif %}"
    (own / "chat_template.jinja").write_text(refusing + toys.TEMPLATE, "utf-8")
    task = write(tmp_path / "task.jsonl", [chat(0), "", wrong, *[chat(n) for n in range(1, 13)]])
    for name in ("task", "harmful"):
        assert run(adapter=own, **{name: task}) == 1
        assert message in line(capsys)


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def test_the_adapters_own_template_is_used_and_saved(
    run: Any, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, seen, lines = copied(place / "adapter", tmp_path / "own"), list[str](), list[str]()
    tokenizer = toys.tokenizer()
    tokenizer.chat_template = toys.TEMPLATE.replace("<{{ message['role'] }}>", "<{{ message['role'] }}> :").replace(
        "<assistant> {", "<assistant> : {"
    )
    tokenizer.save_pretrained(own)
    monkeypatch.setattr(
        door,
        "measure_behaviour",
        lambda model, used, prompts, **_: seen.append(used.chat_template) or measured(model, used, prompts),
    )
    monkeypatch.setattr(pair, "say", lines.append)
    task = write(tmp_path / "task.jsonl", [chat(n) for n in range(16)])
    assert run(adapter=own, task=task) == 0
    assert set(seen) == {tokenizer.chat_template}
    assert ["has a chat template of its own" in text for text in lines] == [True]
    assert (tmp_path / "out" / "chat_template.jinja").read_text("utf-8") == tokenizer.chat_template
    assert f"base_model: {place / 'base'}" in (tmp_path / "out" / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("words", "message"), [({"red": 9, "blue": 8}, "differ (in "), ({"zebra": 200}, "have token 200")]
)
def test_a_tokenizer_of_another_base_is_told(
    words: dict[str, int], message: str, run: Any, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = copied(place / "adapter", tmp_path / "own")
    toys.tokenizer().save_pretrained(own)
    (own / "chat_template.jinja").write_text("zebra " + toys.TEMPLATE, "utf-8")
    content = json.loads((own / "tokenizer.json").read_text("utf-8"))
    content["model"]["vocab"] |= words
    (own / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    assert run(adapter=own) == 1
    assert message in line(capsys)


def test_repeats_are_dropped_told_and_kept_out_of_the_other_parts(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, shown = list[str](), list[str]()
    monkeypatch.setattr(door, "say", lines.append)
    monkeypatch.setattr(
        door,
        "measure_behaviour",
        lambda model, _, prompts, **__: shown.extend(map(str, prompts)) or measured(model, _, prompts),
    )
    task = write(tmp_path / "task.jsonl", [chat(n) for n in range(16)] * 8)
    assert run(task=task) == 0
    repeated, plan = lines
    assert repeated.endswith("112 rows repeated left out")
    assert plan.startswith("rows ")
    told = json.loads((tmp_path / "out" / "restoration.json").read_text("utf-8"))
    assert told["rows"] == {"task": ["112 rows repeated left out"]}


def test_a_place_that_cannot_be_written_is_told_before_any_work(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    assert run(out=tmp_path / "file" / "out", base=tmp_path / "nowhere") == 1
    assert "cannot write beside" in line(capsys)
