"""Studies: what needs several seeds or a wide grid, run by hand and committed as ``data/studies/NAME.json``.

A study has parts. Each can be measured alone, on whatever machine, and joins what the file holds of the others; the
claims follow from the rows of all whole parts. A long part's rows are written as they come: interrupted, it goes on
from them, whatever became of the cache.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from curvlib import fetch
from curvlib.errors import CurvlibError
from curvlib.report import Claim, device_name, installed_versions, write_atomically
from curvlib.tiers import Tier, get_tier

Row = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """Parts in the order in which they are measured, and what is claimed of the rows of those that are there.

    A part gets the tier and all rows measured before it, which may hold what it goes on from. One that yields its rows
    instead of returning a list has each written at once; when it was interrupted, its own rows are among those it gets,
    and it yields the others.
    """

    parts: Mapping[str, Callable[[Tier, Sequence[Row]], Iterable[Row]]]
    claims: Callable[[Sequence[Row]], list[Claim]]


def _degradation() -> Study:
    from curvlib import degradation as study

    return Study(study.PARTS, study.claims)


def _influence() -> Study:
    from curvlib.influence import claims, study

    return Study(study.PARTS, claims.claims)


def _landscape() -> Study:
    from curvlib.landscape import study

    return Study(study.PARTS, study.claims)


# What a study needs is loaded when it runs, because a notebook that only reads one should not load the library.
STUDIES: dict[str, Callable[[], Study]] = {
    "degradation": _degradation,
    "influence": _influence,
    "landscape": _landscape,
}


def run_study(name: str, tier: str, only: Sequence[str] = ()) -> Path:
    """Measure a study, or some of its parts, and write its file after each part, or each row of a long one.

    Without ``only`` the parts are measured that the file lacks, or all of them anew if it lacks none or is of another
    tier. With ``only``, its rows of the other parts stay as they are. A part that was interrupted goes on from its own
    rows; one that is whole is measured again, from cells measured before.

    Raises:
        CurvlibError: no study, part or tier has this name, or the file's other parts are of another tier.
    """
    if name not in STUDIES:
        raise CurvlibError(f"no study is called {name!r}: choose one of {', '.join(STUDIES)}")
    study, size, kept = STUDIES[name](), get_tier(tier), _read(name)
    if unknown := [part for part in only if part not in study.parts]:
        raise CurvlibError(f"study {name} has no part {unknown[0]!r}: choose some of {', '.join(study.parts)}")
    if only and kept and kept["tier"] != tier:
        raise CurvlibError(f"{study_file(name)} holds tier {kept['tier']}, not {tier}: measure all parts, or remove it")
    left = [part for part in study.parts if not kept or _unfinished(kept["runs"], part)]
    if not only and kept and (kept["tier"] != tier or not left):
        kept, left = None, list(study.parts)
    rows: dict[str, list[Row]] = {part: [] for part in study.parts}
    for row in kept["rows"] if kept else ():
        rows[row["part"]].append(row)
    runs: dict[str, Any] = kept["runs"] if kept else {}
    for part in only or left:
        begin, own = time.monotonic(), rows[part] if _unfinished(runs, part) else []
        rows[part] = own
        made = study.parts[part](size, [row for found in rows.values() for row in found])
        for row in made:
            own.append({"part": part, **row})
            if not isinstance(made, list):
                _write(name, tier, {**runs, part: {"unfinished": True}}, rows)
        # seconds are of this call: cells that were kept cost nothing
        runs[part] = {"device": device_name(), "wall_s": round(time.monotonic() - begin, 1)} | installed_versions()
        _write(name, tier, runs, rows)
    return study_file(name)


def _unfinished(runs: Mapping[str, Any], part: str) -> bool:
    return bool(runs.get(part, {"unfinished": True}).get("unfinished"))


def _write(name: str, tier: str, runs: dict[str, Any], rows: Mapping[str, list[Row]]) -> None:
    path = study_file(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = [row for part, own in rows.items() if not _unfinished(runs, part) for row in own]
    claims = [asdict(claim) for claim in STUDIES[name]().claims(whole)]
    every = [row for own in rows.values() for row in own]
    record = {"study": name, "tier": tier, "runs": runs, "claims": claims, "rows": every}
    write_atomically(path, json.dumps(record, indent=1, allow_nan=False) + "\n")


def study_file(name: str) -> Path:
    """Return where a study's result is kept."""
    return fetch.data_folder() / "studies" / f"{name}.json"


def load_study(name: str) -> dict[str, Any] | None:
    """Return a study's committed result, of its whole parts, or None if none was measured yet.

    Raises:
        CurvlibError: the file is damaged.
    """
    record = _read(name)
    if record is None:
        return None
    runs = {part: run for part, run in record["runs"].items() if not _unfinished(record["runs"], part)}
    rows = [row for row in record["rows"] if row["part"] in runs]
    return {**record, "runs": runs, "rows": rows} if runs else None


def _read(name: str) -> dict[str, Any] | None:
    path = study_file(name)
    if not path.exists():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text("utf-8"))
        record["claims"] = [Claim(**claim) for claim in record["claims"]]
    except (ValueError, TypeError, KeyError) as error:
        raise CurvlibError(f"{path} is not a study ({error}): python -m curvlib study {name} makes it again") from error
    return record
