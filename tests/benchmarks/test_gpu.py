"""The forecast of large models from two and four layers, its committed table, the pure parts of the device check."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from benchmarks.gpu import check, forecast, shapes
from benchmarks.gpu.record import Record
from curvlib.curvature.memory import forecast_memory, resident
from curvlib.parameters import trainable
from tests import cases

README = Path(forecast.__file__).with_name("README.md")
TINY = (LlamaConfig, (cases.VOCABULARY, cases.HIDDEN, cases.INTERMEDIATE, 6, 4, 2), {})


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """A model of six layers."""
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    return "tiny"


def test_the_committed_table_is_a_fresh_one() -> None:
    committed = README.read_text("utf-8").splitlines()
    fresh = ["| " + " | ".join(row) + " |" for row in forecast.lines("Qwen2.5-7B")]
    assert [line for line in committed if line.startswith("| Qwen2.5-7B |")] == fresh
    assert len(fresh) == len(forecast.LESSONS)


@pytest.mark.parametrize("kind", ["gradient", "hessian"])
def test_six_layers_are_extended_from_two_and_four(tiny: str, kind: str) -> None:
    make = shapes.hessian if kind == "hessian" else kind
    whole = forecast_memory(shapes.reserved(tiny, 6), make, shapes.chats(2, 40)).peak / 1e9
    assert shapes.Shapes(tiny).peak(kind, 2, 40) == pytest.approx(whole, rel=1e-9)
    assert shapes.Shapes(tiny).peak(kind, 2, 44) > 1.05 * whole


def test_a_reserved_model_takes_what_a_real_one_does(tiny: str) -> None:
    def held(model: Any) -> list[tuple[torch.Size, torch.dtype]]:
        lora = {id(parameter) for parameter in trainable(model).values()}
        return [(tensor.shape, tensor.dtype) for tensor in resident(model) if id(tensor) not in lora]

    assert sorted(held(shapes.reserved(tiny, 2)), key=str) == sorted(held(cases.nf4_llama()), key=str)


def test_checks_are_written_as_they_end_and_go_on_after_a_failure(tmp_path: Path) -> None:
    record = Record(tmp_path / "new" / "one.json", seconds=60)
    record.check("within", lambda: {"error": 1e-6}, error=1e-5)
    record.check("beyond", lambda: {"error": 1e-4}, error=1e-5)
    record.check("fails", lambda: {"error": 1 / 0})
    record.end = 0.0
    record.check("too late", lambda: {"error": 0.0})
    told = json.loads((tmp_path / "new" / "one.json").read_text())
    assert [row["good"] for row in told["checks"]] == [True, False, False, False]
    assert told["checks"][2]["error"] == "ZeroDivisionError: division by zero"
    assert told["checks"][3]["error"] == "TimeoutError: no time is left"
    assert told["device"]


def test_kernels_and_products_are_exact_in_float32_alone() -> None:
    errors = check.kernels("cpu", (192, 64))
    assert errors["float32"] < 1e-5 < 1e-4 < errors["bfloat16"] < 2e-2
    exact, rounded = (check.products("cpu", dtype)["worst"] for dtype in (torch.float32, torch.bfloat16))
    assert exact < 1e-5 < 1e-3 < rounded


def test_costs_are_those_forecast(tiny: str) -> None:
    work = partial(check.costs, shapes.reserved(tiny, 3, values=True), "cpu", 2)
    assert work(20)["off"] == 0
