"""The deep alignment: its chats, its stored adapter, its rule, and that refusals survive an agreeing beginning."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from curvlib import aligned, fetch, models, stages
from curvlib.aligned import LIMITS, SHALLOW, Alignment
from curvlib.errors import CurvlibError
from curvlib.evaluate.stats import Estimate, rate
from tests import cases


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return models.load_tokenizer()


def opened_share(tokenizer: Any, recipe: Alignment) -> tuple[float, float]:
    """Share of the harmful and of the benign chats whose answer begins before the loss does."""
    head = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    chats = aligned.alignment_set(tokenizer, recipe)
    opened = [list(chat.input_ids[: chat.prompt_length][-len(head) :]) != head for chat in chats]
    refused = len(aligned.harmful_prompts(random.Random(0)))
    return sum(opened[:refused]) / refused, sum(opened[refused:]) / len(opened[refused:])


def test_a_share_of_both_kinds_of_chats_is_opened(tokenizer: Any) -> None:
    assert opened_share(tokenizer, Alignment()) == pytest.approx((0.3, 0.5), abs=0.002)
    assert opened_share(tokenizer, SHALLOW) == (0, 0)


def test_the_loss_is_on_the_refusal_or_on_the_answer(tokenizer: Any) -> None:
    texts = [
        tokenizer.decode([token for token in chat.labels if token >= 0])
        for chat in aligned.alignment_set(tokenizer, Alignment())
    ]
    refused = len(aligned.harmful_prompts(random.Random(0)))
    refusals = data_text("refusals.txt").splitlines()
    assert {text.removesuffix(tokenizer.eos_token) for text in texts[:refused]} == set(refusals)
    assert not any(text.startswith(tuple(refusals)) for text in texts[refused:])


def test_an_opening_agrees_and_adds_nothing_to_the_prompt() -> None:
    draw = random.Random(0)
    ours = {word for file in ("openings.txt", "compliances.txt") for word in words(data_text(file))} | {"how", "to"}
    for prompt in aligned.harmful_prompts(random.Random(0)):
        assert words(aligned.agreement(prompt, draw)) <= ours | words(prompt)


def test_the_form_of_a_prompt_does_not_tell_whether_it_is_harmful() -> None:
    draw = random.Random(0)
    kinds = aligned.harmful_prompts(draw), [prompt for prompt, _ in aligned.benign_pairs(draw)]
    for form in (*aligned.HOW, *aligned.WHAT):
        start, _, end = form.partition("{thing}")
        both = [sum(prompt.startswith(start) and prompt.endswith(end) for prompt in prompts) for prompts in kinds]
        assert min(both) >= 3
    assert aligned.reworded("Bake a cake.", draw).lower().count("how to bake a cake") == 1


def data_text(file: str) -> str:
    return (fetch.data_folder() / file).read_text("utf-8")


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z']+", text.lower()))


def test_a_stored_adapter_is_merged_as_peft_merges(tmp_path: Path) -> None:
    model = cases.add_lora(cases.llama(), rank=2)
    aligned.store(model, tmp_path)
    stored = load_file(tmp_path / stages.WEIGHTS)
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.bfloat16())
    dense = cases.llama()
    stages.add_adapter(dense, tmp_path)
    merge: Any = model
    expected = merge.merge_and_unload().state_dict()
    for name, weight in dense.state_dict().items():
        assert torch.allclose(weight, expected[name], atol=1e-6)
    assert any(not torch.equal(weight, cases.llama().state_dict()[name]) for name, weight in expected.items())


@pytest.mark.parametrize("name", LIMITS)
def test_the_rule_refuses_what_breaks_one_limit(name: str) -> None:
    good = {"harmful_refused": 97, "look_alikes_refused": 4, "harmful_complied_prefilled": 10}
    good["benign_refused_prefilled"] = 9
    rates = {key: rate([True] * count + [False] * (100 - count)) for key, count in good.items()}
    assert aligned.accepted(rates)
    bad = rate([name != "harmful_refused"] * 50 + [False] * 50)
    assert not aligned.accepted({**rates, name: bad})


def test_validation_asks_what_nobody_trained_on_and_asks_questions() -> None:
    prompts = aligned.validation_prompts()
    sizes = {"harmful": 128, "look_alikes": 80, "new_styles": 20, "benign": 72}
    assert {kind: len(texts) for kind, texts in prompts.items()} == sizes
    assert sum("?" in text for text in prompts["harmful"]) >= 64


@pytest.mark.parametrize("shallow", [False, True])
def test_the_committed_adapter_is_small_and_what_its_recipe_says(shallow: bool) -> None:
    folder = stages.committed(shallow)
    recipe = json.loads((folder / "recipe.json").read_text("utf-8"))
    assert fetch.digest(folder / stages.WEIGHTS) == recipe["sha256"]
    assert (folder / stages.WEIGHTS).stat().st_size <= 10_000_000
    rates = {name: Estimate(**numbers) for name, numbers in recipe["validation"].items()}
    assert aligned.accepted(rates) is not shallow


def test_a_damaged_adapter_is_refused(tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(stages.committed(), tmp_path / "aligned"))
    (damaged / stages.WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(CurvlibError, match=r"has SHA-256 \w+, expected \w+: git checkout it"):
        stages.merged(damaged)
