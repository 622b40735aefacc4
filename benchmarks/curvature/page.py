"""The README's tables and the figure, made from results.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.readme import fill
from curvlib.plots import BLUE, CYCLE, MARKERS, figure

MIB = 2**20
KINDS = {"hessian": "Hessian", "ggn": "Gauss-Newton", "fisher": "Fisher", "gradient": "gradient"}
Results = dict[str, Any]
Row = dict[str, Any]


def write_page(results: Results, folder: Path) -> None:
    """Write ``products.png`` and put the tables between the two marks of the folder's README.md."""
    draw(results).savefig(folder / "products.png", dpi=110, bbox_inches="tight")
    fill(folder, body(results))


def body(results: Results) -> str:
    """Return all tables in Markdown."""
    where = f"{results['device']}, {results['threads']} threads" if results["device"] == "cpu" else results["device"]
    shape = f"{results['rows']}×{results['length']} tokens, the second half of each chat being the answer"
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    parts = [f"Measured on {where}: {shape}; median (least to most) of {results['repeats']} rounds. {versions}.\n"]
    parts += [
        f"### {case['title']}\n\n{product_table(case['rows'])}\n{verdict(case['rows'])}"
        for case in results["cases"].values()
    ]
    if results["growth"]:
        base = "2 chats of 64 tokens, rank 8, all layers, but for the one quantity that is named"
        parts.append(f"### How it grows\n\nSmolLM2 in NF4, {base}.\n\n{growth_table(results['growth'])}")
    picture = "![Cost and peak memory of each product, and growth of the peak with the batch](products.png)\n"
    return "\n".join([*parts, picture])


def product_table(rows: list[Row]) -> str:
    """Return one line a contestant."""
    lines = [
        "| product | route | cost, gradients | peak, MiB | in graphs, MiB | dequantised weights kept, MiB | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: list(KINDS).index(row["kind"].split()[0])):
        name = product_name(row)
        if row["error"]:
            lines.append(f"| {name} | {row['package']} | fails: {row['error'].replace('|', '/')} | | | | |")
            continue
        cells = [mebibytes(row[key]) for key in ("peak_bytes", "retained_bytes", "retained_weight_bytes")]
        error = "" if row["relative_error"] is None else f"{row['relative_error']:.0e}"
        lines.append(f"| {name} | {row['package']} | {cost(row)} | {' | '.join(cells)} | {error} |")
    return "\n".join(lines) + "\n"


def product_name(row: Row) -> str:
    """Return the matrix in words, and how it was multiplied if that was in parts."""
    first, _, rest = row["kind"].partition(" ")
    return f"{KINDS[first]} {rest}".strip()


def cost(row: Row) -> str:
    """Return the median ratio with its range."""
    return "{:.2f} ({:.2f} to {:.2f})".format(*row["gradients"])


def mebibytes(count: int | None) -> str:
    """Return bytes in MiB, or a dash for what cannot be seen."""
    return "–" if count is None else f"{count / MIB:.1f}" if count < 100 * MIB else f"{count / MIB:.0f}"


def verdict(rows: list[Row]) -> str:
    """Return where another route was faster or smaller than curvlib's best for the same matrix, or that none was."""
    done = [row for row in rows if not row["error"] and row["kind"] != "gradient"]
    found = []
    for quantity, value in (("cost", lambda row: row["gradients"][0]), ("peak", lambda row: row["peak_bytes"])):
        for kind in ("hessian", "ggn", "fisher"):
            same = [row for row in done if row["kind"].split()[0] == kind]
            best = min((value(row) for row in same if row["package"] == "curvlib"), default=0)
            found += [
                f"{row['package']} in {quantity} of the {KINDS[kind]} product ({value(row) / best - 1:+.0%})"
                for row in same
                if row["package"] != "curvlib" and value(row) < best
            ]
    return f"A peer did better: {'; '.join(found)}.\n" if found else "No other route was faster or smaller.\n"


def growth_table(rows: list[Row]) -> str:
    """Return one line a point: peak and cost of each product."""
    lines = ["| | gradient | Hessian | Gauss-Newton | double backward |", "|---|---|---|---|---|"]
    for axis, value in dict.fromkeys((row["axis"], row["value"]) for row in rows):
        cells = [
            f"{mebibytes(row['peak_bytes'])} MiB, {row['gradients'][0]:.2f}"
            for row in rows
            if (row["axis"], row["value"]) == (axis, value)
        ]
        lines.append(f"| {axis} {value} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(results: Results) -> Figure:
    """Draw cost and peak memory of each product on the last case, and how the peak grows with the batch."""
    drawn, axes = figure(3, width=11, height=4.2, width_ratios=[1, 1, 1])
    case = list(results["cases"].values())[-1]
    rows = [row for row in case["rows"] if row["kind"] != "gradient" and not row["error"]][::-1]
    unit = next(row["peak_bytes"] for row in case["rows"] if row["kind"] == "gradient")
    bars(axes[0], rows, lambda row: row["gradients"][0], "cost, gradients", "Time of one product")
    bars(axes[1], rows, lambda row: row["peak_bytes"] / unit, "peak, gradients' peaks", "Memory of one product")
    axes[1].set_yticklabels([])
    for axis in axes[:2]:
        axis.axvline(1, color="#777777", lw=1, ls="--")
    growth(axes[2], results["growth"])
    return drawn


def bars(axes: Axes, rows: list[Row], value: Callable[[Row], float], label: str, title: str) -> None:
    """Draw one bar a contestant, curvlib's dark."""
    colours = [BLUE if row["package"] == "curvlib" else "#BBBBBB" for row in rows]
    names = [product_name(row) for row in rows]
    packages = [row["package"].replace("hessian-", "h-") for row in rows]
    drawn = axes.barh(range(len(rows)), [value(row) for row in rows], color=colours)
    axes.bar_label(drawn, fmt="%.1f", padding=2, fontsize=9)
    axes.set_yticks(range(len(rows)), [f"{name}, {package}" for name, package in zip(names, packages, strict=True)])
    axes.tick_params(axis="y", labelsize=8.5)
    axes.set(xlabel=label, title=title)
    axes.margins(x=0.15)


def growth(axes: Axes, rows: list[Row]) -> None:
    """Draw the peak against the number of chats."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["axis"] == "chats":
            name = f"{KINDS[row['kind']]}, {row['package']}"
            lines.setdefault(name, []).append((row["value"], row["peak_bytes"] / MIB))
    for (name, points), colour, marker in zip(lines.items(), CYCLE, MARKERS, strict=False):
        axes.plot(*zip(*points, strict=True), c=colour, marker=marker, label=name)
    axes.set(xlabel="chats of 64 tokens", ylabel="peak, MiB", ylim=(0, None), title="Growth with the batch")
    axes.legend(fontsize=8.5)
