"""Measure curvature products side by side and write results.json, the README's tables and products.png.

    python benchmarks/curvature/run.py            # as committed: 8×128 tokens, 5 rounds, about half an hour on 2 cores
    python benchmarks/curvature/run.py --quick    # one round of little, into runs/benchmarks/curvature
    python benchmarks/curvature/run.py --device cuda --cases smollm2_nf4,llama7b_nf4 --output DIR

The peers come with ``pip install -e .[bench]``; one that is missing or fails has its error recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a script is not a member of the package that it stands in
os.environ.setdefault("TQDM_DISABLE", "1")

import torch  # noqa: E402

from benchmarks.curvature.contestants import OURS, PARTS, PLAIN, contestants  # noqa: E402
from benchmarks.curvature.measure import Row, compare  # noqa: E402
from benchmarks.curvature.page import write_page  # noqa: E402
from benchmarks.curvature.setups import SETUPS, Setup, smollm2  # noqa: E402
from curvlib.report import device_name, installed_versions, write_atomically  # noqa: E402

PEERS = ("hessian-eigenthings", "curvlinops-for-pytorch")
GROWING = tuple(entrant for entrant in (*OURS, PLAIN[1]) if entrant.kind in ("gradient", "hessian", "ggn"))
AXES: dict[str, tuple[int, ...]] = {
    "chats": (1, 2, 4, 8),
    "tokens": (32, 64, 128, 256),
    "rank": (2, 8, 32),
    "layers": (10, 20, 30),
}
FRUGAL = (f"hessian in parts of {PARTS}", "ggn", "fisher")  # curvlib's products that promise one gradient's memory


def main() -> None:
    """Measure what the command line asks for."""
    options = parser().parse_args()
    options.repeats = 1 if options.quick else options.repeats
    options.rows, options.length = (2, 32) if options.quick else (options.rows, options.length)
    folder = options.output or (ROOT / "runs/benchmarks/curvature" if options.quick else Path(__file__).parent)
    warnings.filterwarnings("ignore")  # the peers' deprecations
    results = measure(options)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    write_page(results, folder)
    print(json.dumps({key: results[key] for key in KEYS}, indent=1))


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    made.add_argument("--cases", default="dense,smollm2_nf4", help=f"some of {', '.join(SETUPS)}")
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--rows", type=int, default=8, help="chats in the batch")
    made.add_argument("--length", type=int, default=128, help="tokens of a chat")
    made.add_argument("--quick", action="store_true")
    made.add_argument("--output", type=Path)
    return made


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the content of results.json."""
    cases = {name: run_case(SETUPS[name](options.device), options) for name in options.cases.split(",")}
    found: dict[str, Any] = {
        "benchmark": "curvature",
        "device": device_name() if options.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "versions": installed_versions(*PEERS),
        "rows": options.rows,
        "length": options.length,
        "repeats": options.repeats,
    }
    main_case = cases.get("smollm2_nf4") or list(cases.values())[-1]
    found |= keys(main_case["rows"], "curvlib")
    packages = dict.fromkeys(row["package"] for row in main_case["rows"])
    found["peers"] = {name: keys(main_case["rows"], name) for name in packages if name != "curvlib"}
    if "smollm2_nf4" in cases:
        found["nf4_relative_error_bfloat16"] = bfloat16_error(options)
    growth = list(grow(options)) if "smollm2_nf4" in cases else []
    return found | {"cases": cases, "growth": growth}


def run_case(setup: Setup, options: argparse.Namespace) -> dict[str, Any]:
    """Return one case's title and rows."""
    print(f"{setup.title}: {options.repeats} rounds of {options.rows}×{options.length} tokens", flush=True)
    small = setup.batch(2, min(64, options.length)) if setup.exact else None
    batch = setup.batch(options.rows, options.length)
    rows = compare(setup, contestants(setup.model), batch, options.repeats, small)
    for row in rows:
        print(f"  {row.package:36s} {row.kind:22s} {row.error or row.gradients}", flush=True)
    vector_bytes = setup.vector().nbytes
    return {
        "title": setup.title,
        "vector_bytes": vector_bytes,
        "rows": [with_ratio(row, rows, vector_bytes) for row in rows],
    }


def with_ratio(row: Row, rows: list[Row], vector_bytes: int) -> dict[str, Any]:
    """Return the row as JSON, with its peak over that of one gradient and the product's two vectors."""
    unit = next(other.peak_bytes for other in rows if other.kind == "gradient")
    ratio = row.peak_bytes / (unit + 2 * vector_bytes) if row.peak_bytes and unit and row.kind != "gradient" else None
    return row.json() | {"peak_memory_ratio": ratio and round(ratio, 4)}


KEYS = ("hvp_gradients", "ggn_gradients", "nf4_relative_error", "nf4_retained_weight_bytes", "peak_memory_ratio")


def keys(rows: list[dict[str, Any]], package: str) -> dict[str, Any]:
    """Return the numbers that readers rely on for one package: None where it has none, and why under ``errors``.

    Cost is that of the whole batch at once; error and kept weights are the worst of the package's products;
    ``peak_memory_ratio`` is the worst of them too, for curvlib of those that promise one gradient's memory.
    """
    own = {row["kind"]: row for row in rows if row["package"] == package and row["kind"] != "gradient"}

    def cost(kind: str) -> float | None:
        return own[kind]["gradients"][0] if kind in own and own[kind]["gradients"] else None

    def worst(key: str, kinds: tuple[str, ...] = tuple(own)) -> Any:
        return max((own[kind][key] for kind in kinds if own[kind][key] is not None), default=None)

    ours = package == "curvlib"
    numbers = (cost("hessian"), cost("ggn"), worst("relative_error"), worst("retained_weight_bytes"))
    found = dict(zip(KEYS, (*numbers, worst("peak_memory_ratio", FRUGAL if ours else tuple(own))), strict=True))
    if ours:
        found["hvp_in_parts_gradients"] = cost(FRUGAL[0])
    return found | {"errors": {kind: row["error"] for kind, row in own.items() if row["error"]}}


def bfloat16_error(options: argparse.Namespace) -> float:
    """Return the worst relative error of curvlib's products where all is computed in bfloat16."""
    setup = smollm2(options.device, dtype=torch.bfloat16)
    small = setup.batch(2, min(64, options.length))
    rows = compare(setup, OURS[:4], small, 0, small)
    return max(row.relative_error or 0.0 for row in rows if row.kind != "gradient")


def grow(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure few products while one quantity grows from 2 chats of 64 tokens, rank 8 and all layers."""
    base = smollm2(options.device)
    for axis, values in AXES.items():
        for value in values[:1] if options.quick else values:
            setup = base
            if axis in ("rank", "layers"):
                setup = smollm2(options.device, **{axis: value})  # type: ignore[arg-type]  # both are integers
            batch = setup.batch(value if axis == "chats" else 2, value if axis == "tokens" else 64)
            print(f"  growth: {axis} {value}", flush=True)
            for row in compare(setup, GROWING, batch, options.repeats, None):
                yield {"axis": axis, "value": value} | row.json()


if __name__ == "__main__":
    main()
