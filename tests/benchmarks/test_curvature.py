"""The benchmark's own arithmetic: failures, other matrices, keys and page; the routes on the tiny 4-bit model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import readme
from benchmarks.curvature import page
from benchmarks.curvature.contestants import OURS, PLAIN, Contestant, matmul
from benchmarks.curvature.measure import Row, compare
from benchmarks.curvature.run import KEYS, keys, with_ratio
from benchmarks.curvature.setups import Setup, random_tokens
from curvlib import nf4
from tests.cases import VOCABULARY, nf4_llama


def broken(*_: object) -> Any:
    raise KeyError("first line\nsecond line")


def identity(*_: object) -> Any:
    return lambda v: v


FAULTS = (Contestant("broken", "ggn", broken), Contestant("other", "hessian", identity))


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    setup = Setup("tiny", nf4_llama().train(), random_tokens(VOCABULARY, 64))
    entrants = (OURS[0], *OURS[1:], PLAIN[1], PLAIN[2], *FAULTS)
    return compare(setup, entrants, setup.batch(2, 8), 2, setup.batch(2, 8))


def test_routes_agree_and_faults_are_told_in_one_line(rows: list[Row]) -> None:
    found = {(row.package, row.kind): row for row in rows}
    assert found["broken", "ggn"].error == "KeyError: 'first line\\nsecond line'"
    assert "another matrix" in str(found["other", "hessian"].error)
    good = [row for row in rows if row.package not in ("broken", "other")]
    assert all(row.error is None and row.relative_error is not None and row.relative_error < 2e-6 for row in good)
    assert all(len(row.seconds) == 2 and row.peak_bytes for row in good)
    assert found["curvlib", "gradient"].gradients == (1, 1, 1)
    assert found["curvlib", "hessian"].retained_weight_bytes == 0
    assert (found["double backward", "hessian"].retained_weight_bytes or 0) > 0


def test_keys_are_the_worst_of_a_package_and_say_why_one_is_missing(rows: list[Row]) -> None:
    table = [with_ratio(row, rows, 1000) for row in rows]
    ours, broken_one, plain = (keys(table, name) for name in ("curvlib", "broken", "double backward"))
    assert set(KEYS) <= ours.keys()
    assert all(ours[key] is not None for key in KEYS)
    assert ours["nf4_retained_weight_bytes"] == 0 < plain["nf4_retained_weight_bytes"]
    frugal = [row["peak_memory_ratio"] for row in table if row["package"] == "curvlib" and row["kind"] != "hessian"]
    assert ours["peak_memory_ratio"] == max(ratio for ratio in frugal if ratio)
    assert [broken_one[key] for key in KEYS] == [None] * len(KEYS)
    assert "KeyError" in broken_one["errors"]["ggn"]


def test_the_page_keeps_its_prose_and_tells_where_a_peer_wins(rows: list[Row], tmp_path: Path) -> None:
    case = {"title": "tiny", "rows": [with_ratio(row, rows, 1000) for row in rows]}
    grown = [case["rows"][0] | {"axis": "chats", "value": value} for value in (1, 2)]
    results = {"device": "cpu", "threads": 1, "rows": 2, "length": 8, "repeats": 2, "versions": {"torch": "x"}}
    results |= {"cases": {"tiny": case}, "growth": grown}
    (tmp_path / "README.md").write_text(f"before\n{readme.BEGIN}old\n{readme.END}after\n")
    for _ in range(2):
        page.write_page(results, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert text.count("| Hessian | other | fails: ValueError: another matrix") == 1
    assert "old" not in text
    assert (tmp_path / "products.png").read_bytes().startswith(b"\x89PNG")
    slow = {"package": "curvlib", "kind": "ggn", "error": None, "gradients": [2, 2, 2], "peak_bytes": 10}
    fast = slow | {"package": "peer", "gradients": [1, 1, 1]}
    assert page.verdict([slow, fast]) == "A peer did better: peer in cost of the Gauss-Newton product (-50%).\n"
    assert page.verdict([slow]) == "No other route was faster or smaller.\n"


def test_matmul_switches_and_comes_back() -> None:
    model = nf4_llama().train()
    layer = next(iter(nf4.four_bit_layers(model).values()))

    def on_curvlib() -> bool:
        return nf4.is_installed(layer)

    with matmul(model, installed=False):
        assert not on_curvlib()
    assert on_curvlib()
    with matmul(model, installed=True):
        assert on_curvlib()


def test_chats_are_cut_from_the_tokens() -> None:
    setup = Setup("tiny", nn.Linear(1, 1), torch.arange(40))
    batch = setup.batch(2, 8)
    assert batch.input_ids.tolist() == [list(range(8)), list(range(8, 16))]
    answers: Tensor = batch.labels != -100
    assert answers.tolist() == [[False] * 4 + [True] * 4] * 2
