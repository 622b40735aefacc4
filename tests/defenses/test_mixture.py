"""The mixture holds every safety chat as often as asked, and the task is seen as often as without it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from curvlib.batches import taken_apart
from curvlib.defenses.method import Setting
from curvlib.defenses.mixture import mixture
from tests.defenses.tiny import TRAINING, tiny  # noqa: F401  a fixture


def test_chats_and_steps_are_counted(tiny: Setting, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    seen: dict[str, Any] = {}
    monkeypatch.setattr(Setting, "train", lambda _, __, mixed, config: seen.update(mixed=mixed, config=config) or 1)
    mixture(tiny, repeats=2)
    counted = Counter(seen["mixed"])
    assert counted == Counter(tiny.examples()) + Counter(2 * taken_apart(tiny.safety_batches))
    # 4 chats in the set and 9 safety chats twice: 22 chats, so 22/4 of the steps
    assert (len(seen["mixed"]), seen["config"].steps) == (22, round(5.5 * TRAINING.steps))
