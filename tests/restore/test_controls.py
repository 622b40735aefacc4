"""Controls: equal price, and the same prompts and answers in another order."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from curvlib.batches import Batch, taken_apart
from curvlib.curvature.operator import DenseOperator
from curvlib.errors import CurvlibError
from curvlib.restore.controls import random_step, shuffled_answers
from tests import cases


def test_a_random_step_pays_the_same_in_another_direction() -> None:
    matrix, step = cases.spd(50), cases.random(50, seed=1)
    noise, again, other = (random_step(DenseOperator(matrix), step, seed=seed) for seed in (0, 0, 1))
    assert float(noise @ matrix @ noise) == pytest.approx(float(step @ matrix @ step))
    assert torch.equal(noise, again)
    for one, two in ((noise, other), (noise, step)):
        assert abs(float(one @ two) / float(one.norm() * two.norm())) < 0.5
    assert float(noise.norm()) != pytest.approx(float(step.norm()), rel=1e-3)
    with pytest.raises(CurvlibError, match="expected a positive one"):
        random_step(DenseOperator(-matrix), step, seed=0)


def parts(batches: list[Batch]) -> tuple[Counter[tuple[int, ...]], Counter[tuple[int, ...]]]:
    chats = taken_apart(batches)
    starts = [chat.labels.count(-100) for chat in chats]
    return (
        Counter(chat.input_ids[:start] for chat, start in zip(chats, starts, strict=True)),
        Counter(chat.labels[start:] for chat, start in zip(chats, starts, strict=True)),
    )


def test_answers_are_dealt_out_anew_and_prompts_stay() -> None:
    refusals, benign = cases.batches(6, seed=1), cases.batches(6, seed=2)
    harmful, other = shuffled_answers(refusals, benign, seed=0, pad_id=0)
    assert (parts(harmful)[0], parts(other)[0]) == (parts(refusals)[0], parts(benign)[0])
    assert parts(harmful)[1] + parts(other)[1] == parts(refusals)[1] + parts(benign)[1]
    kept = (parts(harmful)[1] & parts(refusals)[1]).total()
    assert 0 < kept < 6
    for chat in taken_apart(harmful):
        assert chat.labels[chat.labels.count(-100) :] == chat.input_ids[chat.labels.count(-100) :]
