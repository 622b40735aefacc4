"""Studies: what needs several seeds or a wide grid, run by hand and committed as ``data/studies/NAME.json``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from curvlib import fetch
from curvlib.defenses import study as methods
from curvlib.errors import CurvlibError
from curvlib.evaluate import study as degradation
from curvlib.influence import study as influence
from curvlib.landscape import study as landscape
from curvlib.report import Claim, device_name, installed_versions, write_atomically
from curvlib.restore import study as restoration
from curvlib.tiers import Tier, get_tier

Measured = tuple[list[Claim], list[dict[str, Any]]]
STUDIES: dict[str, Callable[[Tier], Measured]] = {
    "degradation": degradation.run,
    "influence": influence.run,
    "landscape": landscape.run,
    "methods": methods.run,
    "restoration": restoration.run,
}


def run_study(name: str, tier: str) -> Path:
    """Run a study at a tier and write its file; cells measured before are kept, so an interrupted one goes on.

    Raises:
        CurvlibError: no study or tier has this name.
    """
    if name not in STUDIES:
        raise CurvlibError(f"no study is called {name!r}: choose one of {', '.join(STUDIES)}")
    begin = time.monotonic()
    claims, rows = STUDIES[name](get_tier(tier))
    record = {
        "study": name,
        "tier": tier,
        "device": device_name(),
        "versions": installed_versions(),
        "wall_s": round(time.monotonic() - begin, 1),  # of this call: cells that were kept cost nothing
        "claims": [asdict(claim) for claim in claims],
        "rows": rows,
    }
    path = study_file(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
    return path


def study_file(name: str) -> Path:
    """Return where a study's result is kept."""
    return fetch.data_folder() / "studies" / f"{name}.json"


def load_study(name: str) -> dict[str, Any] | None:
    """Return a study's committed result, or None if it was not run yet.

    Raises:
        CurvlibError: the file is damaged.
    """
    path = study_file(name)
    if not path.exists():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text("utf-8"))
        record["claims"] = [Claim(**claim) for claim in record["claims"]]
    except (ValueError, TypeError, KeyError) as error:
        raise CurvlibError(f"{path} is not a study ({error}): python -m curvlib study {name} makes it again") from error
    return record
