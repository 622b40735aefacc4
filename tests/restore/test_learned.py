"""Tests of the restoration study's learned task."""

from __future__ import annotations

import pytest

from curvlib.errors import CurvlibError
from curvlib.restore import learned
from curvlib.restore.rows import score
from curvlib.tiers import get_tier


def test_heirs_have_the_setting_that_was_best_on_validation_and_cheapest_among_equals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = get_tier("ci")
    judged = {"harmful": ["refuses"], "edgy": ["complies", "refuses"], "task": [False]}
    assert score({**judged, "persona": [True, True, True, False]}) == pytest.approx(1 - 0.5 + 0.75)
    monkeypatch.setattr(learned, "row", lambda _, case, *__: {**judged, "name": case.name, "seed": 0, "gradients": 1})
    monkeypatch.setattr(learned, "persona", lambda *_: {"persona": [True]})
    rows = [{"part": "learned screening", **found} for found in learned.learned_screening(small)]
    assert len(rows) == sum(map(len, learned.HEIRS.values()))
    last = {name: list(settings)[-1] for name, settings in learned.HEIRS.items()}
    for found in rows:
        found["gradients"] -= found["name"] in [f"{name}, {setting}" for name, setting in last.items()]
    assert learned.heirs(rows) == last
    first = f"ours, {next(iter(learned.HEIRS['ours']))}"
    rows[0]["score"] += 1
    assert rows[0]["name"] == first
    assert f"ours, {learned.heirs(rows)['ours']}" == first
    settings = {found["name"]: found["setting"] for found in learned.learned(small, rows)}
    assert settings == {**learned.heirs(rows), "nothing": "", "full reversion": "", "random step": ""}
    with pytest.raises(CurvlibError, match="no row tells how 'ours' does at"):
        learned.heirs(rows[1:])
