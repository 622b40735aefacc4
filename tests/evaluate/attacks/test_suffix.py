"""The search finds a word that was planted, and its losses are those of the prompts that it says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from curvlib.evaluate.attacks.suffix import search
from tests.evaluate.toys import llama, tokenizer


class Planted(nn.Module):
    """Says "answer" after each prompt that holds the word "green", the likelier the more often."""

    config = SimpleNamespace()

    def __init__(self, word: str = "green") -> None:
        super().__init__()
        self.size, self.device = nn.Parameter(torch.tensor(8.0)), torch.device("cpu")
        self.word, self.target = (tokenizer().convert_tokens_to_ids(text) for text in (word, "answer"))

    def forward(self, input_ids: Tensor, logits_to_keep: Tensor, **_: Any) -> SimpleNamespace:
        logits = torch.zeros(*input_ids.shape, len(tokenizer()))
        logits[..., self.target] = self.size.detach() * (input_ids == self.word).sum(1, keepdim=True)
        return SimpleNamespace(logits=logits[:, logits_to_keep])


def run(model: Any, **options: Any) -> Any:
    return search(
        model, tokenizer(), "red", **{"target": "answer", "length": 4, "candidates": 8, "rounds": 12} | options
    )


def test_a_planted_word_is_found() -> None:
    suffix = run(Planted())
    assert "green" in suffix.text.split()
    assert suffix.losses[-1] < 0.1 < 1 < max(suffix.losses)
    assert list(suffix.losses) == sorted(suffix.losses, reverse=True)
    nowhere = run(Planted("<system>"))  # the fault: no word of the alphabet does it
    assert nowhere.losses[-1] == nowhere.losses[0] > 3


def test_losses_are_those_of_the_whole_prompt() -> None:
    model, tok = llama(), tokenizer()
    suffix = run(model, rounds=3)
    ids = tok(f"<user> red {suffix.text} <end> <assistant>", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1].double()
    target = tok.convert_tokens_to_ids("answer")
    assert abs(float(-logits.log_softmax(0)[target]) - suffix.losses[-1]) < 1e-4


def test_no_round_gives_a_seeds_random_suffix() -> None:
    first, other = run(llama(), rounds=0), run(llama(), rounds=0, seed=1)
    assert len(first.losses) == 1
    assert first.text != other.text
    assert len(first.text.split()) == 4
