"""Every method runs behind the one interface, on the same setting, and leaves the aligned model reachable."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import curvlib.defenses
from curvlib.defenses.method import TRIALS, Setting
from curvlib.defenses.registry import BEFORE, GOAL, METHODS, OURS
from tests.defenses.tiny import aligned, logits, tiny  # noqa: F401  a fixture

HARMLESS_TO_THE_BASE = 1e-5


@pytest.mark.parametrize("name", METHODS)
def test_a_method_runs_and_the_base_stays(name: str, tiny: Setting) -> None:  # noqa: F811
    method = METHODS[name]
    defended = method.apply(tiny, **method.trials[0])
    assert torch.isfinite(logits(defended.model)).all()
    assert defended.gradients >= 0
    torch.testing.assert_close(
        logits(defended.model, adapter=False), logits(aligned()), atol=HARMLESS_TO_THE_BASE, rtol=0
    )


def test_every_method_is_searched_over_the_same_number_of_trials() -> None:
    searched = {name: len(method.trials) for name, method in METHODS.items() if method.stage != "reference"}
    assert set(searched.values()) == {TRIALS}
    assert {OURS, BEFORE, GOAL} <= set(METHODS)
    assert all(len({str(trial) for trial in method.trials}) == len(method.trials) for method in METHODS.values())


def test_every_method_names_its_paper_or_says_that_it_has_none() -> None:
    known = re.compile(r"\d{4}\.\d{5}")
    assert all(known.fullmatch(m.source) or m.source == "baseline" or m.stage == "reference" for m in METHODS.values())
    for method in METHODS.values():
        text = Path(curvlib.defenses.__file__).with_name(f"{method.apply.__module__.split('.')[-1]}.py").read_text()
        assert method.source in text, f"{method.name}: its docstring does not cite {method.source}"
