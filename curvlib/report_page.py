"""One self-contained page for a run: every notebook's cost, every claim, every figure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from nbformat import NotebookNode

from curvlib import notebook_file
from curvlib.errors import CurvlibError
from curvlib.report import Record, load_record, write_atomically

STYLE = """
:root { color-scheme: light dark; --line: #8888; --good: #14652b; --bad: #a3160b; }
@media (prefers-color-scheme: dark) { :root { --good: #7ee08f; --bad: #ff9a8f; } }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
caption { text-align: left; padding: .3rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .4rem .6rem; text-align: left; vertical-align: top; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 700; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; background: #fff; }
code { overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Figure:
    """One PNG of an executed notebook, in base64, under the heading it stands in and with the text that follows it."""

    heading: str
    caption: str
    png: str


@dataclass(frozen=True)
class Page:
    """What the report shows of one notebook: its record is None where it failed, for the reason in ``fault``."""

    name: str
    title: str
    figures: tuple[Figure, ...]
    record: Record | None
    fault: str


def build_report(run_dir: Path) -> Path:
    """Gather all that lies in ``run_dir`` in ``run_dir/report.html`` and return its path.

    Raises:
        CurvlibError: There is no executed notebook, or a results file is damaged.
    """
    executed = sorted(path for path in run_dir.glob("*.ipynb") if not path.name.startswith("."))
    if not executed:
        raise CurvlibError(f"no executed notebook in {run_dir}: make one with python -m curvlib run")
    pages = [read_page(path) for path in executed]
    target = run_dir / "report.html"
    write_atomically(target, render(f"curvlib: {run_dir.parent.name}, {run_dir.name}", pages))
    return target


def read_page(path: Path) -> Page:
    """Read one executed notebook, or one that failed, and its results."""
    notebook, name = notebook_file.read(path), path.name.split(".")[0]
    fault = notebook.metadata.get("curvlib", {}).get("fault", "")
    results = path.with_name(f"{name}.results.json")
    record = load_record(results) if results.exists() and not fault else None
    title = next((heading for cell in notebook.cells if (heading := last_heading(cell))), name)
    if record is None and not fault:
        fault = "it wrote no results"
    return Page(name, title, tuple(figures(notebook, title)), record, fault)


def figures(notebook: NotebookNode, title: str) -> Iterator[Figure]:
    """The PNG outputs in order, under the notebook's title until a heading comes."""
    heading = title
    for cell, following in zip(notebook.cells, [*notebook.cells[1:], None], strict=True):
        heading = last_heading(cell) or heading
        for output in cell.get("outputs", []):
            if png := output.get("data", {}).get("image/png"):
                yield Figure(heading, first_paragraph(following), png.replace("\n", ""))


def last_heading(cell: NotebookNode) -> str:
    """The last heading of a Markdown cell as plain text; empty without one."""
    if cell.cell_type != "markdown":
        return ""
    found = re.findall(r"^#{1,6} +(.+)$", cell.source, flags=re.MULTILINE)
    return plain(found[-1]) if found else ""


def first_paragraph(cell: NotebookNode | None) -> str:
    """The first paragraph of prose in a Markdown cell as plain text; empty without one."""
    if cell is None or cell.cell_type != "markdown":
        return ""
    paragraphs = (part.strip() for part in cell.source.split("\n\n"))
    return next((plain(part) for part in paragraphs if part and part[0] not in "#<|!-$>"), "")


def plain(markdown: str) -> str:
    """Markdown without emphasis, code marks and link targets.

    >>> plain("**Refusals** fall, see [the paper](https://example.org) and `seed`.")
    'Refusals fall, see the paper and seed.'
    """
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", markdown).replace("**", "").replace("`", "").strip()


def duration(seconds: float) -> str:
    """Seconds as a person would say them.

    >>> duration(12.3), duration(200)
    ('12 s', '3 min 20 s')
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def render(title: str, pages: Sequence[Page]) -> str:
    """The whole HTML page; everything that comes from a notebook is escaped."""
    claims = [claim for page in pages if page.record for claim in page.record.claims]
    failed = sum(bool(page.fault) for page in pages)
    summary = f"{sum(claim.holds for claim in claims)} of {len(claims)} claims hold; "
    summary += f"{len(pages) - failed} of {len(pages)} notebooks completed."
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p>{summary} A claim that does not hold is a finding too; it is marked.</p>
<h2>Notebooks</h2>
{notebook_table(pages)}
<h2>Claims</h2>
{claim_table(pages)}
<h2>Figures</h2>
{"".join(figure_section(page) for page in pages if page.figures)}
<h2>Versions</h2>
{version_table(pages)}
</main>
</body>
</html>
"""


def notebook_table(pages: Sequence[Page]) -> str:
    """Each notebook's outcome and cost."""
    rows = []
    for page in pages:
        name = f'<a href="#{escape(page.name)}">{escape(page.title)}</a>' if page.figures else escape(page.title)
        if page.record is None:
            rows.append([name, f'<span class="bad">failed</span>: {escape(page.fault)}', "", "", ""])
            continue
        record = page.record
        cost = [duration(record.wall_s), f"{record.peak_memory_mb:.0f} MB", escape(record.device)]
        rows.append([name, '<span class="good">completed</span>', *cost])
    return table("Outcome and cost", ["Notebook", "Outcome", "#Wall time", "#Peak memory", "Device"], rows)


def claim_table(pages: Sequence[Page]) -> str:
    """Every claim with its interval and its null control."""
    rows = []
    for page in pages:
        for claim in page.record.claims if page.record else ():
            verdict = '<span class="good">yes</span>' if claim.holds else '<span class="bad">✗ does not hold</span>'
            numbers = [f"{claim.value:.4g}", f"{claim.low:.4g} to {claim.high:.4g}", f"{claim.control:.4g}", claim.n]
            statement = f"{escape(claim.statement)}<br><code>{escape(claim.id)}</code>"
            rows.append([escape(page.name[:2]), statement, *map(str, numbers), verdict])
    heads = ["Notebook", "Claim", "#Value", "#Interval", "#Null control", "#n", "Holds"]
    return table("The control is the same quantity where it should vanish", heads, rows)


def version_table(pages: Sequence[Page]) -> str:
    """The versions that the results were made with; more than one where the run was resumed after a change."""
    found: dict[str, set[str]] = {}
    for page in pages:
        for name, version in page.record.versions.items() if page.record else ():
            found.setdefault(name, set()).add(version)
    rows = [[escape(name), escape(", ".join(sorted(versions)))] for name, versions in found.items()]
    return table("Software behind these results", ["Software", "Version"], rows)


def figure_section(page: Page) -> str:
    """One notebook's figures, each with its heading and caption."""
    parts = [f'<section id="{escape(page.name)}">\n<h3>{escape(page.title)}</h3>\n']
    for number, figure in enumerate(page.figures, 1):
        alt = escape(f"Figure {number} of {page.title}: {figure.heading}. {figure.caption}", quote=True)
        caption = f"<strong>{escape(figure.heading)}.</strong> {escape(figure.caption)}"
        image = f'<img src="data:image/png;base64,{escape(figure.png)}" alt="{alt}">'
        parts.append(f"<figure>\n{image}\n<figcaption>{caption}</figcaption>\n</figure>\n")
    return "".join([*parts, "</section>\n"])


def table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls sideways on a narrow screen; a head with a leading ``#`` marks a column of numbers."""
    kinds = [' class="number"' if head.startswith("#") else "" for head in heads]
    head = "".join(f'<th scope="col"{kind}>{text.lstrip("#")}</th>' for kind, text in zip(kinds, heads, strict=True))
    body = "\n".join(
        "<tr>" + "".join(f"<td{kind}>{text}</td>" for kind, text in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f"""<div class="scroll" role="region" aria-label="{caption}" tabindex="0"><table>
<caption>{caption}</caption>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody></table></div>"""
