"""Progress bars and lines, in notebooks and terminals alike, that ``TQDM_DISABLE`` switches off."""

from __future__ import annotations

import os
import sys
from typing import Any

from tqdm.auto import tqdm


def silent() -> bool:
    """Tell whether progress is not to be shown, as where a line on stderr counts as a fault."""
    return bool(os.environ.get("TQDM_DISABLE"))


def say(line: str) -> None:
    """Write one line on stderr about what takes its time."""
    if not silent():
        print(line, file=sys.stderr)


def bar(*args: Any, **options: Any) -> tqdm[Any]:  # those of tqdm
    """Return a bar that vanishes at its end; tqdm's own notebook bar does not read ``TQDM_DISABLE``."""
    return tqdm(*args, leave=False, disable=silent(), **options)
