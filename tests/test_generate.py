from __future__ import annotations

from typing import Any

import pytest
import torch

from curvlib import generate as module
from curvlib.errors import CurvlibError
from curvlib.generate import end_tokens, evaluating, generate, left_pad, render
from tests.evaluate.toys import adapted, llama, tokenizer

PROMPTS = [
    "red",
    "one two three four five six",
    "Write a list of words",
    "blue plan",
    "green . green",
    "A B",
    "C",
    "list",
]


def library(prompt: str, limit: int = 12, end: int = 2) -> str:
    """The same answer from transformers' own generation, one prompt at a time."""
    tok, model = tokenizer(), llama()
    ids = torch.tensor([render(tok, prompt)])
    generator: Any = model
    out = generator.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=limit,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=0,
    )
    return str(tok.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batches_give_what_transformers_gives_one_by_one(batch_size: int) -> None:
    answers = generate(llama(), tokenizer(), PROMPTS, max_new_tokens=12, batch_size=batch_size)
    assert answers == [library(prompt) for prompt in PROMPTS]
    assert len({len(answer) for answer in answers}) > 1  # the rows do not all end together


def test_ended_rows_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    tok, model = tokenizer(), llama()
    words = [answer.split() for answer in generate(model, tok, PROMPTS, max_new_tokens=12)]
    end = next(word for row in words for word in row[2:5] if sum(word in other for other in words) < len(words))
    model.generation_config.eos_token_id = [2, tok.convert_tokens_to_ids(end)]
    widths: list[int] = []
    forward = model.forward

    def counted(**inputs: Any) -> Any:
        widths.append(len(inputs["input_ids"]))
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", counted)
    cut = generate(model, tok, PROMPTS, max_new_tokens=12)
    assert [row.split() for row in cut] == [row[: row.index(end)] if end in row else row for row in words]
    assert widths[:2] == [1, len(PROMPTS)]  # what all begin with, then the rest
    assert widths[-1] < len(PROMPTS)


def test_prefill_is_continued_and_returned() -> None:
    tok = tokenizer()
    (answer,) = generate(llama(), tok, ["red"], max_new_tokens=3, prefill="The answer is ")
    assert answer.startswith("The answer is ")
    assert len(answer.split()) <= 6
    assert render(tok, "red", "The")[:-1] == render(tok, "red")


def test_earlier_turns_are_kept() -> None:
    turns = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, {"role": "user", "content": "C"}]
    assert (
        tokenizer().decode(render(tokenizer(), turns))
        == "<user> A <end> <assistant> B <end> <user> C <end> <assistant>"
    )


def test_modes_and_gradients_come_back() -> None:
    model = llama().train()
    model.model.layers[0].eval()
    before = [child.training for child in model.modules()]

    def fail() -> None:
        with evaluating(model):
            assert not any(child.training for child in model.modules())
            assert not torch.is_grad_enabled()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        fail()
    assert [child.training for child in model.modules()] == before
    assert torch.is_grad_enabled()


def test_a_model_with_adapters_answers() -> None:
    model = adapted()
    changed = generate(model, tokenizer(), PROMPTS, max_new_tokens=12)
    with model.disable_adapter():
        plain = generate(model, tokenizer(), PROMPTS, max_new_tokens=12)
    assert plain == [library(prompt) for prompt in PROMPTS] != changed


def test_no_chat_template_is_one_clear_line() -> None:
    tok = tokenizer()
    tok.chat_template = None
    with pytest.raises(CurvlibError, match="no chat template"):
        generate(llama(), tok, ["red"])


def test_small_parts() -> None:
    ids, mask = left_pad([[7], [8, 9]], 0, torch.device("cpu"))
    assert ids.tolist() == [[0, 7], [8, 9]]
    assert mask.tolist() == [[0, 1], [1, 1]]
    assert end_tokens(llama(), tokenizer()) == [2]
    assert module.messages("red") == [{"role": "user", "content": "red"}]
    assert generate(llama(), tokenizer(), []) == []
