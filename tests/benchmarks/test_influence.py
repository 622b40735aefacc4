"""The benchmark of influence: its check tells wrong scores from right ones, rows survive failures, the page follows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import readme
from benchmarks.influence import measure, page, run, setups
from benchmarks.influence.check import agreement
from benchmarks.influence.contestants import HELPED, OTHERS, OURS, Contestant
from benchmarks.influence.work import Work
from curvlib import stages
from curvlib.batches import answer_logits
from curvlib.influence import recipe
from curvlib.nf4 import four_bit_layers
from tests import cases

SCRIPT = Path(run.__file__)
RIGHT = OURS[1].score  # curvlib's EK-FAC
FAULTS: dict[str, tuple[str, Callable[[nn.Module, Work], Tensor]]] = {
    "sign": ("other scores: 2 away", lambda model, work: -RIGHT(model, work)),
    "scale": ("other scores: 0.5 away", lambda model, work: 1.5 * RIGHT(model, work)),
    "order": ("other scores", lambda model, work: RIGHT(model, work).roll(1, dims=1)),
    "damping": ("other scores: 0.5 away", lambda model, work: RIGHT(model, replace(work, damping=2 * work.damping))),
    # so far above the curvature that its effect is lost in rounding
    "none": ("another curvature", lambda m, work: 1e10 * RIGHT(m, replace(work, damping=1e10 * work.damping))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_names_a_planted_fault(fault: str, tmp_path: Path) -> None:
    expected, score = FAULTS[fault]
    assert str(agreement(Contestant("wrong", "x", score), tmp_path).fault).startswith(expected)


@pytest.mark.filterwarnings("ignore")  # the peers' deprecations
@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("number", range(5))
def test_all_pass_the_check(number: int, four_bit: bool, tmp_path: Path) -> None:
    entrant = [*OURS, *(HELPED if four_bit else OTHERS)][number]
    pytest.importorskip(entrant.package.split()[0])
    assert agreement(entrant, tmp_path, four_bit=four_bit).fault is None


def test_rows_come_from_processes_of_their_own_and_failures_are_one_line(tmp_path: Path) -> None:
    order = measure.Order("tiny_nf4", "cpu", 4, 30, tmp_path)
    (tmp_path / "prepared.json").write_text(json.dumps({"damping": 0.1}))
    row, scores = measure.row_of(SCRIPT, order, OURS[0])
    assert row.error is None
    assert scores is not None
    assert torch.equal(scores[:, :6], scores[:, 24:])  # the chats given again
    assert row.seconds
    assert (row.peak_memory_mb or 0) >= (row.before_mb or 0) > 0
    assert "StopIteration" in str(measure.row_of(SCRIPT, order, Contestant("absent", "x", RIGHT))[0].error)
    assert measure.row_of(SCRIPT, replace(order, minutes=1e-4), OURS[0])[0].error == "stopped after 0.0001 minutes"
    measure.attempt(failed := measure.Row("p", "m"), lambda: json.loads("one\ntwo"))
    assert str(failed.error).startswith("JSONDecodeError: Expecting value")
    assert [path.name for path in tmp_path.iterdir()] == ["prepared.json"]


def test_a_correlation_is_with_our_own_ekfac() -> None:
    scores = cases.random(2, 9)
    row, wrong = measure.Row("curvlib", "ekfac"), measure.Row("wrong", "sign")
    measure.correlate([(wrong, -scores), (row, scores)])
    assert (row.correlation, wrong.correlation) == (pytest.approx(1), pytest.approx(-1))


def test_the_dense_case_is_the_same_function(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, (batch, *_) = setups.tiny_nf4("cpu"), cases.batches()
    monkeypatch.setattr(stages, "load_fine_tuned", lambda *_: tiny.load())
    monkeypatch.setattr(recipe, "training_set", lambda *_: (tiny.examples, []))
    monkeypatch.setattr(recipe, "queries", lambda _: {"compliance": tiny.queries})
    exact, dense = (setups.SETUPS[f"smollm2_{name}"]("cpu") for name in ("nf4", "dense"))
    one, other = exact.load(), dense.load()
    assert four_bit_layers(one)
    assert not four_bit_layers(other)
    assert torch.allclose(answer_logits(one, batch), answer_logits(other, batch), atol=1e-5)
    assert exact.damping(one) == pytest.approx(dense.damping(other), rel=1e-3)


def test_the_peak_is_that_of_the_work_alone() -> None:
    if not measure.forget_peak():
        pytest.skip("only Linux can forget a process's peak")
    torch.ones(1 << 24).sum()  # 64 MiB, gone before
    row = measure.Row("p", "m")
    measure.timed(row, lambda: torch.ones(1 << 23), torch.device("cpu"))
    assert row.before_mb
    assert 30 < (row.peak_memory_mb or 0) - row.before_mb < 50


def rows() -> list[measure.Row]:
    fine = {"seconds": 2.0, "peak_memory_mb": 900.0, "before_mb": 800.0, "correlation": 0.9}
    failed, quick = measure.Row("peer", "a", error="OSError: a|b"), {**fine, "seconds": 1.0}
    return [measure.Row("curvlib", "fisher", **fine), failed, measure.Row("peer", "b", **quick)]  # type: ignore[arg-type]


def test_an_interrupted_run_keeps_its_rows_and_the_page_tells_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = iter((row, None) for row in rows())

    def prepare(_: Path, order: measure.Order, __: str) -> None:
        (order.folder / "prepared.json").write_text(json.dumps({"title": "tiny", "damping": 0.1}))

    monkeypatch.setattr(run, "in_own_process", prepare)
    monkeypatch.setattr(run, "row_of", lambda *_: next(made, None) or pytest.exit("interrupted"))
    monkeypatch.setattr("sys.argv", ["run.py", "--cases", "smollm2_dense", "--output", str(tmp_path)])
    (tmp_path / "README.md").write_text(f"before\n{readme.BEGIN}old\n{readme.END}after\n")
    with pytest.raises(pytest.exit.Exception):
        run.main()
    results, text = json.loads((tmp_path / "results.json").read_text()), (tmp_path / "README.md").read_text()
    assert [results[key] for key in ("method", *run.KEYS)] == ["fisher", 2.0, 900.0]
    peer = {"method": "b", "seconds_64x1000": 1.0, "peak_memory_mb": 900.0}
    assert results["peers"] == {"peer": {**peer, "errors": {"a": "OSError: a|b"}}}
    assert text.startswith(f"before\n{readme.BEGIN}Measured on cpu")
    assert text.endswith("after\n")
    assert "old" not in text
    assert text.count("fails: OSError: a/b") == 1
    assert "A peer did better: peer (b) in time, 1 against 2." in text
    ours, failed, quick = (asdict(row) for row in rows())
    assert page.verdict([ours, failed]) == "No peer ran.\n"
    assert page.verdict([ours, {**quick, "seconds": 3.0}]) == "No peer that ran did better.\n"
    assert run.keys([asdict(rows()[0])], "curvlib", own_size=False)["seconds_64x1000"] is None
