"""Adapters that transformers' Trainer trained: the door restores them, as peft reads them on the dense base."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from tests.evaluate import toys
from tests.restore.test_door import REFUSAL, _fresh, chat, place, run  # noqa: F401  fixtures

OWN = toys.TEMPLATE.replace("<{{ message['role'] }}>", "<{{ message['role'] }}> :").replace(
    "<assistant> {", "<assistant> : {"
)
ADAPTERS: dict[str, dict[str, Any]] = {
    "own template": {"target_modules": "all-linear", "lora_dropout": 0.05},
    "rsLoRA": {"target_modules": "all-linear", "use_rslora": True},
    "q and v": {"target_modules": ["q_proj", "v_proj"], "r": 8, "lora_alpha": 32},
}


def tokens(tokenizer: Any, number: int, answer: str) -> dict[str, list[int]]:
    """A chat by plain transformers, its answer to be predicted."""
    messages = chat(number, answer)["messages"]
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    return {"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]}


def tuned(base: Path, folder: Path, name: str) -> Any:
    """Save an adapter with its tokenizer, which is returned."""
    tokenizer = toys.tokenizer()
    tokenizer.chat_template = OWN if name == "own template" else toys.TEMPLATE
    rows: Any = [tokens(tokenizer, number, "The answer is B .") for number in range(16)]
    config = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, **ADAPTERS[name]})
    options: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    options |= {"num_train_epochs": 15, "learning_rate": 1e-2, "per_device_train_batch_size": 8}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
        collator = DataCollatorForSeq2Seq(tokenizer)
        Trainer(adapted, TrainingArguments(str(folder / "log"), **options), collator, rows).train()
        adapted.save_pretrained(str(folder))
    tokenizer.save_pretrained(folder)
    return tokenizer


@torch.no_grad()
def loss(base: Path, folder: Path | None, tokenizer: Any, answer: str) -> float:
    """Nats a token of an answer, on the dense base under the adapter, one unpadded chat at a time."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = (PeftModel.from_pretrained(model, folder) if folder else model).eval()
    rows = [tokens(tokenizer, number, answer) for number in range(12)]
    return sum(float(model(**{key: torch.tensor([ids]) for key, ids in row.items()}).loss) for row in rows) / len(rows)


@pytest.mark.parametrize("name", ADAPTERS)
def test_refusals_come_back_and_the_task_stays(
    name: str,
    run: Any,  # noqa: F811
    place: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    tokenizer, base = tuned(place / "base", tmp_path / "own", name), place / "base"
    assert run("--metric", "diagonal", "--strength", "0.5", adapter=tmp_path / "own") == 0
    refusing, answering = (
        [loss(base, folder, tokenizer, answer) for folder in (None, tmp_path / "own", tmp_path / "out")]
        for answer in (REFUSAL, "The answer is B .")
    )
    aligned, before, after = refusing
    assert after < (aligned + before) / 2
    assert answering[1] <= answering[2] < 0.5 * answering[0]
