"""Settings that every test shares."""

from __future__ import annotations

import os

os.environ["TQDM_DISABLE"] = "1"
os.environ["MPLBACKEND"] = "Agg"  # figures are drawn without a screen
