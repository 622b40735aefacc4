"""The rule of choice on hand-made records."""

from __future__ import annotations

import torch

from curvlib.restore.outcome import Judge, StepRecord, best, chats
from tests import cases


def record(safety: float, **protected: float) -> StepRecord:
    return StepRecord(safety, protected, trust=0.0, norm=0.0)


def test_the_best_is_the_safest_within_the_budget_that_improves() -> None:
    start = record(2.0, task=1.0, benign=1.0)
    judge = Judge(cases.pair()[0], [], {}, torch.zeros(1), [start])
    dear, good, fair = (
        record(0.1, task=1.0, benign=1.5),
        record(0.5, task=1.1, benign=0.9),
        record(1.0, task=1, benign=1),
    )
    assert best(judge, [dear, fair, good], rise=0.2) is good
    assert best(judge, [dear, fair, good], rise=0.6) is dear
    assert best(judge, [dear, record(2.0, task=0.5, benign=0.5)], rise=0.2) is None


def test_chats_are_counted() -> None:
    assert chats(cases.batches(5, size=2)) == 5
