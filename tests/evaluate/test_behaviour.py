from __future__ import annotations

import math

import pytest
import torch

from curvlib.batches import encode, make_batches
from curvlib.errors import CurvlibError
from curvlib.evaluate import behaviour
from curvlib.evaluate.behaviour import excerpt, measure_behaviour, reference_model, token_shift
from tests.evaluate.toys import SPECIAL, WORDS, adapted, dense_losses, llama, tokenizer

RESPONSES = [
    "I can't help with that.",
    "Take a list and a pen, and begin.",
    "Take the plan to a friend first.",
    "B",
    "No.",
]
CHATS = [
    [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    for prompt, answer in [("red", "one two"), ("green blue", "A B C"), ("plan", "six five four three")]
]


def test_answers_are_counted_three_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behaviour, "generate", lambda *_, **__: RESPONSES)
    found = measure_behaviour(llama(), tokenizer(), ["How do I plan?"] * 5)
    assert found.verdicts == ("refuses", "complies", "complies", "incoherent", "refuses")
    assert (found.refuses.value, found.complies.value, found.incoherent.value) == (0.4, 0.4, 0.2)
    assert found.responses == tuple(RESPONSES)
    assert found.complies.low < 0.4 < found.complies.high


def test_it_runs_from_prompts_to_rates() -> None:
    found = measure_behaviour(adapted(), tokenizer(), ["red", "plan"], max_new_tokens=12)
    assert found.refuses.value + found.complies.value + found.incoherent.value == pytest.approx(1)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_adapter_is_off_only_inside(frozen: bool) -> None:
    model, ids = adapted(frozen=frozen), torch.tensor([[4, 9, 7]])
    flags = [parameter.requires_grad for parameter in model.parameters()]
    before = model(ids).logits
    with reference_model(model, "adapter off") as other:
        torch.testing.assert_close(other(ids).logits, llama()(ids).logits)
    assert torch.equal(model(ids).logits, before)
    assert not torch.allclose(before, llama()(ids).logits)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_no_adapter_to_switch_off() -> None:
    with pytest.raises(CurvlibError, match="PeftModel"), reference_model(llama(), "adapter off"):
        pass


def test_divergence_from_a_uniform_model_is_the_missing_entropy() -> None:
    tok, model = tokenizer(), llama()
    batches = make_batches(encode(tok, CHATS, 64), 2, 0)
    found = token_shift(model, llama(uniform=True), batches)
    assert found.positions == (
        0,
        1,
        2,
        3,
    )  # three answers of 3, 4 and 5 tokens with the end: one alone reaches the fifth
    head = [tok(f"<user> {chat[0]['content']} <end> <assistant>")["input_ids"] for chat in CHATS]
    vocabulary = len(SPECIAL + WORDS)
    first = []
    for row in head:
        losses = torch.stack([dense_losses(model, row, [token]) for token in range(vocabulary)])[:, 0]
        first.append(math.log(vocabulary) - float((losses.neg().exp() * losses).sum()))
    assert found.divergence[0].value == pytest.approx(sum(first) / 3, rel=1e-4)
    assert [estimate.n for estimate in found.divergence] == [3, 3, 3, 2]


def test_a_model_does_not_differ_from_itself() -> None:
    batches = make_batches(encode(tokenizer(), CHATS, 64), 2, 0)
    assert all(abs(e.value) < 1e-6 for e in token_shift(llama(), llama(), batches).divergence)
    assert token_shift(adapted(), "adapter off", batches, positions=2).divergence[0].value > 1e-3


def test_excerpts_are_short() -> None:
    assert excerpt("a b c") == "a b c"
    assert excerpt("one\ntwo three four five six seven eight nine ten") == "one two three four five six seven eight …"
