"""Progress bars, in notebooks and terminals alike, that ``TQDM_DISABLE`` switches off."""

from __future__ import annotations

import os
from typing import Any

from tqdm.auto import tqdm


def bar(*args: Any, **options: Any) -> tqdm[Any]:  # those of tqdm
    """Return a bar that vanishes at its end; tqdm's own notebook bar does not read ``TQDM_DISABLE``."""
    return tqdm(*args, leave=False, disable=bool(os.environ.get("TQDM_DISABLE")), **options)
