"""Does a 7B model fit? The heaviest work of each lesson on three cards, from shapes alone.

python benchmarks/gpu/forecast.py                # writes the table of README.md, some minutes
python benchmarks/gpu/forecast.py Llama-3.1-8B   # prints the lines of one model

"yes": fits as a laptop would run it; "cut": fits as it runs on a GPU; "no": does not fit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.gpu.shapes import SHAPES, Shapes
from benchmarks.readme import fill
from curvlib.report import markdown_table

CARDS = {24: 24.5, 80: 84.6, 139: 148.0}  # GiB of a card: GB that are left beside CUDA's context and workspaces
Size = Callable[[Shapes], float]
AT_ONCE = "256 positions at once"
# lesson, its heaviest work, that with every model, batch and factor whole, that as it runs, what is cut
LESSONS: tuple[tuple[str, str, Size, Size, str], ...] = (
    (
        "00",
        "64 answers beside the dense model in bfloat16",
        lambda m: 2 * m.weights + 2 * m.linear(lambda x: x.in_features * x.out_features) + m.peak("answers", 64, 100),
        lambda m: m.weights + m.peak("answers", 64, 100),
        "one base, dense model on the host",
    ),
    (
        "01",
        "fine-tune, 8 chats of 140 tokens, three models beside it",
        lambda m: 4 * m.weights + m.peak("gradient", 8, 140) + 12 * m.vector,
        lambda m: m.weights + m.peak("gradient", 1, 140) + 12 * m.vector,
        f"one base, {AT_ONCE}",
    ),
    (
        "02",
        "Hessian product, 2 chats of 40 tokens",
        lambda m: m.weights + m.peak("hessian", 2, 40),
        lambda m: m.weights + m.peak("hessian", 2, 40),
        "nothing",
    ),
    (
        "03",
        "slopes of 32 prompts at 5 places, three models",
        lambda m: 3 * m.weights + m.peak("gradient", 1, 140) + 6 * 32 * m.linear(lambda x: 4 * 8 * x.out_features),
        lambda m: m.weights + m.peak("gradient", 1, 140) + 6 * 32 * m.linear(lambda x: 4 * 8 * x.out_features),
        "one base",
    ),
    (
        "04",
        "Fisher rows of twice 96 chats, one chat of 405 tokens, EK-FAC",
        lambda m: m.weights + m.peak("gradient", 1, 405) + max(4 * 96 * m.vector, 2 * 96 * m.vector + m.factors),
        lambda m: m.weights + m.peak("gradient", 1, 405) + 2 * 24 * m.vector + m.sketches + 12 * m.vector,
        "rows of twice 24 chats, EK-FAC sketched",
    ),
    (
        "05",
        "AdamW with KL, two batches of 8 chats of 140 tokens, 64 Fisher rows, EK-FAC",
        lambda m: m.weights + max(m.factors, 2 * m.peak("gradient", 8, 140) + 160 * m.vector) + 64 * m.vector,
        lambda m: m.weights + m.sketches + 2 * m.peak("gradient", 1, 140) + 24 * m.vector + 64 * 32 * 4e-9 * m.words,
        f"{AT_ONCE}, rows and path on the host, EK-FAC sketched",
    ),
    (
        "06",
        "24 answers after 500 tokens, rounding errors of all weights; EK-FAC",
        lambda m: m.weights + max(m.linear(lambda x: 4 * x.in_features * x.out_features), m.factors),
        lambda m: m.weights + max(m.peak("answers", 24, 500), m.peak("gradient", 1, 140) + m.sketches + 24 * m.vector),
        f"{AT_ONCE}, errors and rows on the host, EK-FAC sketched",
    ),
    (
        "door",
        "8 chats of 512 tokens, adapter of rank 16, 64 Fisher rows, EK-FAC",
        lambda m: m.weights + max(m.factors, m.peak("gradient", 8, 512)) + 64 * 2 * m.vector,
        lambda m: m.weights + m.peak("gradient", 1, 512) + m.sketches + 24 * 2 * m.vector,
        "one chat at once, rows on the host, EK-FAC sketched",
    ),
)


def lines(name: str) -> Iterator[tuple[str, ...]]:
    """Yield a model's lines of the table, each after its count."""
    shapes = Shapes(name)
    for lesson, work, whole, cut, how in LESSONS:
        sizes = whole(shapes), cut(shapes)
        fits = ["yes" if sizes[0] <= room else "cut" if sizes[1] <= room else "no" for room in CARDS.values()]
        yield name, lesson, work, f"{sizes[0]:.1f}", how, f"{sizes[1]:.1f}", *fits


def table(names: list[str]) -> str:
    """Return the table of these models; lesson A1 runs on SmolLM2 whatever the tier's model is."""
    heads = ("model", "lesson", "heaviest work", "whole, GB", "cut", "cut, GB", *(f"{card} GiB" for card in CARDS))
    small = Shapes("SmolLM2-135M")
    most = small.weights + 8 * 0.1345 + 3 * small.peak("hessian", 4, 40)  # a float64 twin of 134.5 million weights
    work = ("SmolLM2-135M", "A1", "Hessian product of 4 chats, float64 twin", f"{most:.1f}", "nothing", f"{most:.1f}")
    rows = [row for name in names for row in lines(name)]
    return markdown_table(heads, [*rows, (*work, *["yes"] * len(CARDS))]) + "\n"


if __name__ == "__main__":
    chosen = sys.argv[1:] or [name for name in SHAPES if name != "SmolLM2-135M"]
    text = table(chosen)
    print(text)
    if not sys.argv[1:]:
        fill(Path(__file__).parent, text)
