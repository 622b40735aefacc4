"""Score chats by influence with several packages, side by side; write results.json and the README's tables.

    python benchmarks/influence/run.py            # 64 queries × 1000 chats of SmolLM2, dense and in NF4; hours
    python benchmarks/influence/run.py --quick    # tiny models in a few minutes, into runs/benchmarks/influence
    python benchmarks/influence/run.py --only curvlib,kronfluence --cases smollm2_dense --output DIR
    python benchmarks/influence/run.py --device cuda --output DIR

The peers come with ``pip install -e .[bench-influence]``; one that is missing or fails has its error in its row.
Every row is written when it is done, so that an interrupted run keeps what it has.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a script is not a member of the package that it stands in
os.environ.setdefault("TQDM_DISABLE", "1")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.influence.contestants import contestants  # noqa: E402
from benchmarks.influence.measure import Order, Row, correlate, in_own_process, packages, row_of, run_own  # noqa: E402
from benchmarks.influence.page import write_page  # noqa: E402
from benchmarks.influence.setups import SETUPS  # noqa: E402
from curvlib.report import device_name, installed_versions, write_atomically  # noqa: E402

PEERS = ("kronfluence", "bergson", "dattri")
MAIN = "smollm2_dense"  # where every package can run: the case of the keys at the top of results.json
SIZE = (64, 1000)  # queries and chats that the key seconds_64x1000 names
KEYS = ("seconds_64x1000", "peak_memory_mb")
Cases = dict[str, dict[str, Any]]


def main() -> None:
    """Measure what the command line asks for."""
    options = parser().parse_args()
    warnings.filterwarnings("ignore")  # the peers' deprecations
    if options.own:
        run_own(Order.read(options.order), options.own)
        return
    if options.quick:
        options.queries, options.examples = 6, 24
    options.cases = options.cases or ("tiny_nf4" if options.quick else "smollm2_dense,smollm2_nf4")
    folder = options.output or (ROOT / "runs/benchmarks/influence" if options.quick else Path(__file__).parent)
    folder.mkdir(parents=True, exist_ok=True)
    for cases in measure(options):  # the same cases with one more row each time
        results = summary(options, cases)
        write_atomically(folder / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
        write_page(results, folder)
    print(json.dumps({key: results[key] for key in ("main_case", *KEYS)}, indent=1))


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    made.add_argument("--cases", help=f"some of {', '.join(SETUPS)}")
    made.add_argument("--only", default="", help=f"packages, some of curvlib,{','.join(PEERS)}; all by default")
    made.add_argument("--queries", type=int, default=SIZE[0])
    made.add_argument("--examples", type=int, default=SIZE[1], help="training chats to score")
    made.add_argument("--minutes", type=float, default=120.0, help="most that one row may take")
    made.add_argument("--quick", action="store_true")
    made.add_argument("--output", type=Path)
    made.add_argument("--own", help=argparse.SUPPRESS)  # what this process does for another run of this script
    made.add_argument("--order", help=argparse.SUPPRESS)
    return made


def measure(options: argparse.Namespace) -> Iterator[Cases]:
    """Yield the cases measured so far, after each row."""
    only = [name for name in options.only.split(",") if name]
    cases: Cases = {}
    for name in options.cases.split(","):
        with tempfile.TemporaryDirectory() as folder:
            order = Order(name, options.device, options.queries, options.examples, Path(folder), options.minutes)
            for case in run_case(order, only):
                yield cases | {name: case}
            cases[name] = case


def run_case(order: Order, only: list[str]) -> Iterator[dict[str, Any]]:
    """Yield one case's title and rows so far, after each row."""
    print(f"{order.case}: {order.queries} queries × {order.examples} chats", flush=True)
    forever = Order(**{**vars(order), "minutes": None})  # a fine-tune takes as long as it takes, and is kept
    if error := in_own_process(Path(__file__), forever, "prepare"):
        raise SystemExit(f"{order.case} cannot be prepared: {error}")
    prepared = json.loads((order.folder / "prepared.json").read_text("utf-8"))
    rows: list[Row] = []
    scored: list[tuple[Row, Tensor]] = []
    for entrant in packages(contestants(order.case.endswith("nf4")), only):
        row, scores = row_of(Path(__file__), order, entrant)
        if scores is not None:
            scored.append((row, scores))
            correlate(scored)
        rows.append(row)
        print(f"  {row.package:26s} {row.method:8s} {row.error or (row.seconds, row.peak_memory_mb)}", flush=True)
        yield {"title": prepared["title"], "damping": prepared["damping"], "rows": [asdict(row) for row in rows]}


def summary(options: argparse.Namespace, cases: Cases) -> dict[str, Any]:
    """Return the content of results.json."""
    main_case = MAIN if MAIN in cases else next(iter(cases))
    own_size = (options.queries, options.examples) == SIZE
    found: dict[str, Any] = {
        "benchmark": "influence",
        "device": device_name() if options.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "versions": installed_versions(*PEERS),
        "queries": options.queries,
        "examples": options.examples,
        "main_case": main_case,
    }
    for case in cases.values():
        names = dict.fromkeys(row["package"] for row in case["rows"] if row["package"] != "curvlib")
        case["keys"] = keys(case["rows"], "curvlib", own_size)
        case["peers"] = {name: keys(case["rows"], name, own_size) for name in names}
    return {**found, **cases[main_case]["keys"], "peers": cases[main_case]["peers"], "cases": cases}


def keys(rows: list[dict[str, Any]], package: str, own_size: bool) -> dict[str, Any]:
    """Return the numbers that readers rely on for one package, of the first of its methods that ran.

    None where there is none, and why under ``errors``; ``seconds_64x1000`` also where other sizes were measured.
    """
    own = [row for row in rows if row["package"] == package]
    row = next((row for row in own if row["error"] is None), None)
    found: dict[str, Any] = dict.fromkeys(("method", *KEYS))
    if row:
        numbers = (row["method"], row["seconds"] if own_size else None, row["peak_memory_mb"])
        found = dict(zip(found, numbers, strict=True))
    return found | {"errors": {row["method"]: row["error"] for row in own if row["error"]}}


if __name__ == "__main__":
    main()
