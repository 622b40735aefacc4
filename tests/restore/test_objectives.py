"""Objectives against dense float64 autograd and their definitions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from curvlib.batches import answer_logits, answer_loss, make_batches, open_ended, taken_apart
from curvlib.errors import CurvlibError
from curvlib.parameters import assign, flatten, trainable
from curvlib.restore import SafetyBatches, objectives
from tests import cases

TASK, REFUSALS, COMPLIANCES = (cases.batches(4, seed=seed) for seed in (1, 2, 3))
SAFETY = SafetyBatches(REFUSALS, COMPLIANCES)


def divergence(twin: cases.Twin, batch: cases.Batch) -> torch.Tensor:
    """KL(base ‖ present) by its definition, from the dense float64 twin alone."""
    with torch.no_grad(), twin.model.disable_adapter():
        base = answer_logits(twin, batch).softmax(-1)
    for name, parameter in twin.model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    present = answer_logits(twin, batch).softmax(-1)
    return (base * (base.log() - present.log())).sum(-1).mean()


def test_distillation_has_the_gradient_of_the_dense_twin(device: str) -> None:
    model, twin = cases.nf4_llama(device=device), cases.Twin(cases.nf4_llama(device=device))
    parts = objectives.terms("distill", SAFETY, {"benign": TASK})
    found = objectives.gradient(model, parts, list(trainable(model).values()))
    weights = [[batch.tokens / sum(b.tokens for b in group) for batch in group] for group in (REFUSALS, TASK)]
    exact = sum(
        weight * divergence(twin, batch)
        for group, shares in zip((REFUSALS, TASK), weights, strict=True)
        for batch, weight in zip(group, shares, strict=True)
    )
    assert isinstance(exact, torch.Tensor)
    expected = flatten(torch.autograd.grad(exact, list(trainable(twin).values())))
    assert cases.relative_error(found, expected) < 1e-4
    assert objectives.value(model, parts) == pytest.approx(exact.item(), rel=1e-4)


def test_distillation_is_zero_at_the_base_and_keeps_gradients_on() -> None:
    model = cases.nf4_llama()
    parts = objectives.terms("distill", SAFETY, {"benign": TASK})
    assert objectives.value(model, parts) > 0.01
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    assert objectives.value(model, parts) == pytest.approx(0, abs=1e-6)
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" in name)


def test_the_gradient_is_that_of_the_objective() -> None:
    model = cases.nf4_llama()
    parameters, parts = list(trainable(model).values()), objectives.terms("composite", SAFETY, {"task": TASK})
    found = objectives.gradient(model, parts, parameters)
    direction = cases.random(len(found), dtype=torch.float32)
    here, step = flatten(parameters), 1e-2 / float(direction.norm())
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            assign(parameters, here + sign * step * direction)
            values.append(objectives.value(model, parts))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(found @ direction), rel=2e-2)


def test_the_value_is_the_mean_over_tokens() -> None:
    model = cases.pair()[0]
    losses = [(answer_loss(model, batch).item(), batch.tokens) for batch in REFUSALS]
    expected = sum(loss * tokens for loss, tokens in losses) / sum(tokens for _, tokens in losses)
    assert objectives.mean_loss(model, REFUSALS) == pytest.approx(expected)


def test_ascent_is_bounded_batch_by_batch() -> None:
    model = cases.pair()[0]
    losses = [(answer_loss(model, batch).item(), batch.tokens) for batch in COMPLIANCES]
    assert min(losses)[0] < objectives.COMPLIANCE_BOUND < max(losses)[0]  # so that the bound is seen
    expected = -sum(min(loss, 5.0) * tokens for loss, tokens in losses) / sum(tokens for _, tokens in losses)
    assert objectives.value(model, objectives.terms("ascent", SAFETY)) == pytest.approx(expected)
    task = objectives.TASK_WEIGHT * objectives.mean_loss(model, TASK)
    assert objectives.value(model, objectives.terms("composite", SAFETY, {"task": TASK})) == pytest.approx(
        expected + task
    )


def test_unknown_names_and_missing_chats_are_refused() -> None:
    with pytest.raises(CurvlibError, match=r"no objective is called 'hope': choose one of refusal, .*distill"):
        objectives.terms("hope", SAFETY)
    for objective in ("refusal", "ascent", "composite", "margin", "distill"):
        with pytest.raises(CurvlibError, match=f"'{objective}' lacks chats"):
            objectives.terms(objective, SafetyBatches([]))
    with pytest.raises(CurvlibError, match="'distill' lacks chats"):
        objectives.terms("distill", SAFETY, {"task": TASK})  # nothing says that benign requests are answered


REQUESTS = make_batches([open_ended(example, 1) for example in taken_apart(REFUSALS)], 3, 0)


@pytest.mark.parametrize("judging", [False, True])
def test_the_margin_is_its_definition_by_the_dense_twin(judging: bool) -> None:
    model, twin = cases.pair()
    exact = []
    with torch.no_grad():
        for example in taken_apart(REQUESTS):  # one unpadded prompt at a time
            prompt = torch.tensor([example.input_ids[: example.prompt_length]])
            p = twin(input_ids=prompt).logits[0, -1].softmax(-1)
            exact.append(float((p[[3, 4, 5]].sum() / p[[6, 7]].sum()).log()))
    nats = sorted(exact)[2] + 0.1  # one request is deeper
    margin = objectives.Margin(REQUESTS, nats, [3, 4, 5], [6, 7])
    found = torch.cat([objectives.log_odds(model, batch, margin) for batch in REQUESTS]).tolist()
    assert found == pytest.approx(exact, abs=1e-4)
    short = [nats - s if judging else max(0, nats - s) for s in exact]
    terms = objectives.terms("margin", replace(SAFETY, margin=margin), judging=judging)
    assert objectives.value(model, terms) == pytest.approx(sum(short) / 4, rel=1e-3)
    with pytest.raises(CurvlibError, match="objective 'margin' lacks chats"):
        objectives.terms("margin", SAFETY)
