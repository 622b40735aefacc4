"""Gather what was claimed: every results.json over seeds and tiers, and every committed study."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from curvlib.report import ROOT, Claim, Record, load_record, markdown_table
from curvlib.studies import STUDIES, load_study, study_file

Group = tuple[str, str, str]  # notebook, tier, claim id


def runs_folder(output_dir: str) -> Path:
    """Return the folder of all runs: two above ``<runs>/<tier>/seed<seed>``, the folder itself if it is none of these.

    >>> runs_folder("runs/ci/seed0").as_posix(), runs_folder("elsewhere").as_posix()
    ('runs', 'elsewhere')
    """
    folder = Path(output_dir) if output_dir else ROOT / "runs"
    return folder.parents[1] if folder.name.startswith("seed") else folder


def load_records(folder: Path, but: str = "") -> list[Record]:
    """Return every notebook's results below a folder, by notebook, tier and seed; the newest where one was run twice.

    Args:
        folder: of all runs.
        but: name of a notebook that is left out.
    """
    files = sorted(folder.rglob("*.results.json"), key=lambda path: path.stat().st_mtime)
    found = [load_record(path) for path in files]
    newest = {(record.notebook, record.tier, record.seed): record for record in found if record.notebook != but}
    return [newest[key] for key in sorted(newest)]


def over_seeds(records: Iterable[Record]) -> dict[Group, list[Claim]]:
    """Return the claims of all seeds under notebook, tier and id."""
    found: dict[Group, list[Claim]] = {}
    for record in records:
        for claim in record.claims:
            found.setdefault((record.notebook, record.tier, claim.id), []).append(claim)
    return found


def joined(claims: Sequence[Claim]) -> Claim:
    """Return one claim for all seeds: mean value and control, hull of the intervals; it holds if it does at each."""
    n = len(claims)
    value, control = sum(claim.value for claim in claims) / n, sum(claim.control for claim in claims) / n
    low, high = min(claim.low for claim in claims), max(claim.high for claim in claims)
    holds = all(claim.holds for claim in claims)
    return Claim(claims[0].id, claims[0].statement, value, low, high, control, claims[0].n, holds)


def claims_table(found: Mapping[Group, Sequence[Claim]]) -> str:
    """Return a Markdown table of claims, one line for each notebook, tier and id."""
    heads = ("notebook", "tier", "claim", "value", "interval", "control", "seeds", "holds at")
    lines = []
    for (notebook, tier, name), claims in found.items():
        one, held = joined(claims), sum(claim.holds for claim in claims)
        numbers = (f"{one.value:.4g}", f"{one.low:.4g} to {one.high:.4g}", f"{one.control:.4g}", str(len(claims)))
        lines.append([notebook[:2], tier, f"`{name}`", *numbers, f"{held} of {len(claims)}"])
    return markdown_table(heads, lines)


def missing() -> list[str]:
    """Return one line for each study that is not measured, or lacks parts, with the command that goes on with it."""
    lines = []
    for name, study in STUDIES.items():
        command, record = f"python -m curvlib study {name}", load_study(name)
        if record is None:
            state = "has no whole part yet" if study_file(name).exists() else "is not there yet"
            lines.append(f"data/studies/{name}.json {state}: {command} measures it")
        elif lacking := [part for part in study().parts if part not in record["runs"]]:
            lines.append(f"data/studies/{name}.json lacks {', '.join(lacking)}: {command} adds them")
    return lines
