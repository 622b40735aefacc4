"""Q-realign: signs of its losses, its probe, and blocks whose malicious states move to the safe side."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from curvlib.defenses import qrealign
from curvlib.defenses.method import Setting
from curvlib.defenses.qrealign import Probe, calibration, realignment_loss, reconstruction_loss, sparse_probe
from tests import cases
from tests.defenses.tiny import logits, tiny  # noqa: F401  a fixture


def test_the_malicious_loss_falls_towards_the_safe_side() -> None:
    probe = Probe(torch.tensor([2.0, 0.0]), torch.tensor(-1.0))
    states = torch.tensor([[0.5, 9.0]], requires_grad=True)
    loss = realignment_loss(states, probe)
    assert loss.item() == pytest.approx(math.log(2))  # on the border
    loss.backward()
    assert states.grad is not None
    torch.testing.assert_close(states.grad, torch.tensor([[-1.0, 0.0]]))  # descent raises w·h + b
    assert realignment_loss(torch.tensor([[5.0, 0.0]]), probe) < loss < realignment_loss(torch.zeros(1, 2), probe)


def test_reconstruction_is_relative_and_ignores_padding() -> None:
    exact, mask = cases.random(2, 3, 4), torch.tensor([[0, 1, 1], [1, 1, 1]])
    found = exact.clone()
    found[0, 0] = 99.0
    assert reconstruction_loss(found, exact, mask).item() == 0.0
    assert reconstruction_loss(1.1 * exact, exact, mask).item() == pytest.approx(0.01)


def test_states_in_bfloat16_are_scored_and_compared_in_float32() -> None:
    probe, states = Probe(torch.tensor([2.0, 0.0]), torch.tensor(-1.0)), torch.tensor([[0.5, 9.0]]).bfloat16()
    assert realignment_loss(states, probe).item() == pytest.approx(math.log(2))
    assert reconstruction_loss(2 * states[None], states[None], torch.ones(1, 1)).dtype == torch.float32


def test_the_probe_separates_is_sparse_and_sits_at_the_optimum() -> None:
    states, labels = cases.random(60, 20), torch.arange(60) >= 30
    states[labels, 3] += 4.0
    probe = sparse_probe(states, labels, penalty=0.05, steps=2000)
    assert ((probe.score(states) > 0) == labels).double().mean() > 0.95
    assert probe.weight[3] > 0
    assert (probe.weight != 0).sum() <= 8
    # subgradient condition: where a weight is zero, the slope of the data term is at most the penalty
    x = (states - states.mean(0)) / states.std(0)
    slope = x.T @ (probe.score(states).sigmoid() - labels.double()) / 60
    assert (slope.abs() <= 0.05 + 1e-6).all()
    torch.testing.assert_close(slope[3], torch.tensor(-0.05, dtype=torch.float64), atol=1e-5, rtol=0)


def test_calibration_is_three_quarters_malicious_and_holds_no_answers(tiny: Setting) -> None:  # noqa: F811
    prompts = calibration(tiny.chats.benign, tiny.chats.safety.refusals, torch.device("cpu"))
    assert (len(prompts.ids), prompts.benign) == (4, 1)
    answer = tiny.tokenizer.convert_tokens_to_ids("red")
    assert (prompts.ids[prompts.benign :, -1] != answer).all()
    assert prompts.mask[:, -1].all()


def scores(setting: Setting, weight: float, monkeypatch: pytest.MonkeyPatch) -> float:
    """First block's malicious loss after a long training with the weight given."""
    kept: list[float] = []
    train = qrealign.train_block

    def watched(*given: Any) -> torch.Tensor:
        states = train(*given)
        kept.append(float(realignment_loss(states[given[4].benign :, -1], given[5])))
        return states

    with monkeypatch.context() as patch:
        patch.setattr(qrealign, "train_block", watched)
        patch.setattr(qrealign, "EPOCHS", 60)
        qrealign.qrealign(setting, 4, None, weight, pace=10.0)
    return kept[0]


def test_malicious_states_move_to_the_safe_side(tiny: Setting, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    without, with_it = (scores(tiny, weight, monkeypatch) for weight in (0.0, 1.0))
    assert with_it < without / 10


def test_eight_bits_are_near_the_fine_tune_and_four_are_farther(tiny: Setting) -> None:  # noqa: F811
    exact = logits(cases.nf4_llama())
    eight, four = (qrealign.qrealign(tiny, bits, inputs, 0.0) for bits, inputs in ((8, 8), (4, None)))
    assert cases.relative_error(logits(eight.model), exact) < 0.05
    assert cases.relative_error(logits(four.model), exact) > 2 * cases.relative_error(logits(eight.model), exact)
    assert eight.gradients == qrealign.EPOCHS * 4
