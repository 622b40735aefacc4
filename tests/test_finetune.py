"""The training loop: AdamW by the book, the same end after a kill, and refusals of nonsense."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from curvlib import finetune
from curvlib.batches import Batch, Example, answer_loss, make_batches
from curvlib.errors import CurvlibError
from curvlib.finetune import TrainingConfig, batch_stream, train
from curvlib.parameters import flatten, trainable
from tests import cases

CONFIG = TrainingConfig(steps=12, batch_size=3, learning_rate=1e-2, seed=3)


def examples(count: int = 10) -> list[Example]:
    tokens = torch.randint(1, cases.VOCABULARY, (count, 9), generator=torch.Generator().manual_seed(0)).tolist()
    return [Example(tuple(row[: 6 + i % 3]), (*[-100] * 4, *row[4 : 6 + i % 3])) for i, row in enumerate(tokens)]


def test_the_loss_falls_and_only_the_adapter_moves(device: str) -> None:
    model = cases.nf4_llama(device=device)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = flatten(trainable(model))
    result = train(model, examples(), CONFIG, pad_id=0)
    assert result.losses[-1] < 0.8 * result.losses[0]
    assert result.gradient_evaluations == len(result.losses) == CONFIG.steps
    assert not torch.equal(before, flatten(trainable(model)))
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert not model.training


def test_one_step_is_adamw_by_hand() -> None:
    model = cases.nf4_llama()
    batch = make_batches(examples(3), 3, pad_id=0)[0]
    parameters = trainable(model)
    before = flatten(parameters).double()
    gradient = flatten(torch.autograd.grad(answer_loss(model, batch), list(parameters.values()))).double()
    gradient *= min(1.0, 1.0 / float(gradient.norm()))
    train(model, examples(3), TrainingConfig(steps=1, batch_size=3, learning_rate=1e-2), pad_id=0)
    # the first step of Adam: both moments are bias-corrected to g and g², so the step is lr · g / (|g| + eps)
    expected = before - 1e-2 * gradient / (gradient.abs() + 1e-8)
    large = gradient.abs() > 1e-5  # below, float32 rounding of g decides the sign
    torch.testing.assert_close(flatten(parameters).double()[large], expected[large], atol=1e-5, rtol=0)


def test_a_batch_in_parts_is_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = cases.nf4_llama(), cases.nf4_llama()
    few = TrainingConfig(steps=3, batch_size=3, learning_rate=1e-3)
    losses = train(whole, examples(), few, pad_id=0).losses
    cut_up = Batch.affordable  # of a batch that is made; the one of a step gets the model's device
    monkeypatch.setattr(Batch, "affordable", lambda b, d: cut_up(b, d) if isinstance(d, str) else b.parts(2))
    again = train(cut, examples(), few, pad_id=0).losses
    assert again == pytest.approx(losses, rel=1e-4)
    torch.testing.assert_close(flatten(trainable(cut)), flatten(trainable(whole)), atol=1e-4, rtol=0)


def test_a_killed_run_ends_where_the_other_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, killed, checkpoint = cases.nf4_llama(), cases.nf4_llama(), tmp_path / "training.safetensors"
    train(whole, examples(), CONFIG, pad_id=0)
    with monkeypatch.context() as patch:
        calls = iter(range(100))
        step = finetune._step

        def interrupted(*args: object) -> float:
            if next(calls) == 8:
                raise KeyboardInterrupt
            return step(*args)  # type: ignore[arg-type]

        patch.setattr(finetune, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(killed, examples(), CONFIG, pad_id=0, checkpoint=checkpoint)
    resumed = cases.nf4_llama()
    result = train(resumed, examples(), CONFIG, pad_id=0, checkpoint=checkpoint)
    assert result.gradient_evaluations == CONFIG.steps - 5
    assert len(result.losses) == CONFIG.steps
    torch.testing.assert_close(flatten(trainable(resumed)), flatten(trainable(whole)), atol=0, rtol=0)
    assert not list(tmp_path.iterdir())


def test_an_epoch_holds_every_example_once_and_depends_on_the_seed() -> None:
    def epoch(seed: int) -> list[tuple[int, ...]]:
        stream = batch_stream(examples(), TrainingConfig(steps=1, batch_size=5, seed=seed), 0)
        return [tuple(ids[ids != 0].tolist()) for _ in range(2) for ids in next(stream).input_ids]

    assert sorted(epoch(0)) == sorted(example.input_ids for example in examples())
    assert epoch(0) == epoch(0) != epoch(1)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    model = cases.nf4_llama()
    with torch.no_grad():
        next(iter(trainable(model).values())).fill_(float("nan"))
    with pytest.raises(CurvlibError, match="lower the learning rate"):
        train(model, examples(), CONFIG, pad_id=0)
