"""The stream has no part along an ablated direction, and rounding is that of a dense twin that was quantised again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor, nn

from curvlib.batches import answer_logits
from curvlib.errors import CurvlibError
from curvlib.evaluate.attacks import inside
from curvlib.evaluate.attacks.inside import ablated, refusal_directions, rounded
from curvlib.generate import render
from tests import cases
from tests.evaluate.toys import llama, tokenizer

HARMFUL, HARMLESS = ["red", "Write a list of blue words", "something green"], ["one two", "The answer is five"]


def states(model: Any, prompt: str) -> Tensor:
    """The stream after each layer but the last at one prompt's last token, without padding."""
    with torch.no_grad():
        out = model(torch.tensor([render(tokenizer(), prompt)]), output_hidden_states=True)
    return torch.stack([state[0, -1] for state in out.hidden_states[1:-1]])


def test_directions_are_those_of_prompts_read_one_by_one() -> None:
    model = llama()
    means = [torch.stack([states(model, prompt) for prompt in side]).mean(0) for side in (HARMFUL, HARMLESS)]
    expected = nn.functional.normalize(means[0] - means[1], dim=1)
    assert torch.allclose(refusal_directions(model, tokenizer(), HARMFUL, HARMLESS), expected, atol=1e-5)


def test_an_ablated_direction_has_projection_zero_and_the_model_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, direction = llama(), cases.random(16, dtype=torch.float32)
    unit, before = direction / direction.norm(), states(llama(), "red")
    with ablated(model, direction):
        assert (states(model, "red") @ unit).abs().max() < 1e-5
    assert (before @ unit).abs().max() > 0.1
    assert torch.equal(states(model, "red"), before)
    monkeypatch.setattr(inside, "WRITERS", ("embed_tokens", "self_attn"))  # the fault: one writer is left out
    with ablated(model, direction):
        assert (states(model, "red") @ unit).abs().max() > 0.01


def test_no_part_that_writes_is_one_line() -> None:
    with pytest.raises(CurvlibError, match="Llama-like"), ablated(nn.Linear(2, 2), torch.ones(2)):
        pass


def test_rounding_is_that_of_the_merged_weights_stored_again() -> None:
    model, batch = cases.nf4_llama(), cases.batches()[0]
    twin = cases.Twin(model)
    with torch.no_grad():
        plain = answer_logits(model, batch)
        for layer in twin.modules():
            if hasattr(layer, "get_delta_weight"):
                whole = layer.base_layer.weight + layer.get_delta_weight("default")
                codes, state = quantize_4bit(whole.float(), quant_type="nf4", compress_statistics=True)
                layer.base_layer.weight.copy_(dequantize_4bit(codes, state).view_as(whole))
                layer.lora_B["default"].weight.zero_()
        expected = answer_logits(twin, batch)
        with rounded(model):
            assert cases.relative_error(answer_logits(model, batch), expected) < 1e-4
        with rounded(model, shuffle=0):
            shuffled = answer_logits(model, batch)
        assert torch.equal(answer_logits(model, batch), plain)
    assert cases.relative_error(shuffled, expected) > 1e-2 < cases.relative_error(plain, expected)


def test_rounding_asks_for_an_adapter_over_four_bits() -> None:
    with pytest.raises(CurvlibError, match="no 4-bit layer"), rounded(llama()):
        pass
