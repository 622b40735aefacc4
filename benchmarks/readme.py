"""The part of a benchmark's README.md that its script writes."""

from __future__ import annotations

from pathlib import Path

BEGIN, END = "<!-- results: begin -->\n", "<!-- results: end -->\n"


def fill(folder: Path, body: str) -> None:
    """Put ``body`` between the two marks of the folder's README.md; a README without marks is made."""
    readme = folder / "README.md"
    text = readme.read_text("utf-8") if readme.exists() else f"# Results\n\n{BEGIN}{END}"
    head, _, rest = text.partition(BEGIN)
    readme.write_text(head + BEGIN + body + END + rest.partition(END)[2], encoding="utf-8")
