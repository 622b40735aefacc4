"""The README's tables, made from results.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.readme import fill

Results = dict[str, Any]
Row = dict[str, Any]


def write_page(results: Results, folder: Path) -> None:
    """Put the tables between the two marks of the folder's README.md."""
    fill(folder, body(results))


def body(results: Results) -> str:
    """Return all tables in Markdown."""
    where = f"{results['device']}, {results['threads']} threads" if results["device"] == "cpu" else results["device"]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    size = f"{results['queries']} queries × {results['examples']} chats"
    parts = [f"Measured on {where}: {size}. {versions}.\n"]
    parts += [
        f"### {case['title']}\n\n{table(case['rows'])}\n{verdict(case['rows'])}" for case in results["cases"].values()
    ]
    return "\n".join(parts)


def table(rows: list[Row]) -> str:
    """Return one line a contestant."""
    lines = [
        "| package | method | seconds | peak, MiB (before) | rank correlation with curvlib's EK-FAC |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        head = f"| {row['package']} | {row['method']} "
        if row["error"]:
            lines.append(f"{head}| fails: {row['error'].replace('|', '/')} | | |")
            continue
        memory = f"{row['peak_memory_mb']:.0f} ({row['before_mb']:.0f})"
        ranks = "" if row["correlation"] is None else f"{row['correlation']:.2f}"
        lines.append(f"{head}| {short(row['seconds'])} | {memory} | {ranks} |")
    return "\n".join(lines) + "\n"


def short(number: float) -> str:
    """Return three digits, or all before the point.

    >>> short(1801.4), short(0.6078), short(353.2)
    ('1801', '0.608', '353')
    """
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"


def verdict(rows: list[Row]) -> str:
    """Return where a peer did better than curvlib's best, that none did, or that none ran."""
    done = [row for row in rows if not row["error"]]
    if all(row["package"] == "curvlib" for row in done):
        return "No peer ran.\n"
    found = []
    for quantity, key in (("time", "seconds"), ("peak memory", "peak_memory_mb")):
        values = [(row, row[key]) for row in done if row[key] is not None]
        best = min((value for row, value in values if row["package"] == "curvlib"), default=None)
        if best is None:
            continue
        found += [
            f"{row['package']} ({row['method']}) in {quantity}, {short(value)} against {short(best)}"
            for row, value in values
            if row["package"] != "curvlib" and value < best
        ]
    return f"A peer did better: {'; '.join(found)}.\n" if found else "No peer that ran did better.\n"
