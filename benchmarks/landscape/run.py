"""Time a 25 × 25 grid of four losses around the aligned model and write results.json beside this file.

python benchmarks/landscape/run.py [--tier cpu] [--points 25]
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a script is not a member of the package that it stands in

import torch  # noqa: E402

from curvlib import stages  # noqa: E402
from curvlib.landscape import recipe  # noqa: E402
from curvlib.landscape.slices import grid, measure  # noqa: E402
from curvlib.report import device_name, installed_versions, peak_memory_mb, write_atomically  # noqa: E402
from curvlib.tiers import get_tier  # noqa: E402

LOSSES = ("compliance", "refusal", "task", "text")


def main() -> None:
    """Measure one grid with four harmful prompts, two questions and two texts at each point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tier", default="cpu")
    parser.add_argument("--points", type=int, default=25)
    options = parser.parse_args()
    tier = replace(get_tier(options.tier), landscape_chats=4)
    model, tokenizer = stages.load_aligned(tier)
    every = recipe.landscape_chats(tier, tokenizer)
    chats = {name: every[name] for name in LOSSES}
    radius = recipe.window_radius(tier)
    found = measure(
        model, recipe.direction_pair(tier, 0), grid(radius, options.points), partial(recipe.chat_means, model, chats)
    )
    results = {
        "seconds": round(found.seconds, 1),
        "points": len(found.points),
        "losses": list(LOSSES),
        "tokens_a_point": sum(len(example.input_ids) for examples in chats.values() for example in examples),
        "peak_memory_mb": round(peak_memory_mb(), 1),
        "threads": torch.get_num_threads(),
        "device": device_name(),
        "versions": installed_versions(),
    }
    write_atomically(Path(__file__).parent / "results.json", json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
