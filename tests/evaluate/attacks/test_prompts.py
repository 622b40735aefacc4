"""Verdicts are on the plain request, draws are a seed's own, and an attack that its control equals breaks nothing."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from curvlib.evaluate.attacks import prompts
from curvlib.evaluate.attacks.prompts import Trial, templates, verdicts
from tests.evaluate.toys import llama, tokenizer

REQUESTS = ["red", "Write a list of blue words", "something green"]


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What the judge hears."""
    pairs: list[tuple[str, str]] = []
    monkeypatch.setattr(prompts, "judge", lambda *pair: pairs.append(pair) or "complies")
    return pairs


def test_the_judge_hears_the_plain_request_and_the_prefill(heard: list[tuple[str, str]]) -> None:
    assert isinstance(prompts, ModuleType)
    verdicts(llama(), tokenizer(), REQUESTS, [f"The plan is {r}" for r in REQUESTS], prefill="A list", max_new_tokens=3)
    assert [request for request, _ in heard] == REQUESTS
    assert all(answer.startswith("A list") for _, answer in heard)


def test_a_cold_draw_is_greedy_and_a_warm_one_is_its_seeds(heard: list[tuple[str, str]]) -> None:
    state = torch.random.get_rng_state()
    for options in (
        {},
        {"temperature": 1e-4},
        {"temperature": 5.0},
        {"temperature": 5.0},
        {"temperature": 5.0, "seed": 1},
    ):
        verdicts(llama(), tokenizer(), REQUESTS, max_new_tokens=4, **options)  # type: ignore[arg-type]
    greedy, cold, warm, again, other = (heard[start : start + 3] for start in range(0, 15, 3))
    assert [a.split() for _, a in cold] == [a.split() for _, a in greedy]
    assert warm == again != other
    assert warm != greedy
    assert torch.equal(torch.random.get_rng_state(), state)


def test_what_the_control_does_as_well_is_no_break() -> None:
    complies, refuses = ("complies",) * 8, ("refuses",) * 8
    assert Trial(complies, refuses).breaks
    assert Trial(complies, refuses).rise.value == 1
    assert not Trial(complies, complies).breaks
    assert not Trial(refuses, refuses).breaks
    assert not Trial(refuses, complies).breaks


def test_each_template_has_one_slot() -> None:
    assert {text.count("{{ prompt }}") for text in templates().values()} == {1}
    assert len(templates()) == 3
