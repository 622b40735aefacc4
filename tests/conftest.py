"""Settings that every test shares."""

from __future__ import annotations

import os

os.environ["TQDM_DISABLE"] = "1"
# Cores are shared out among the processes of a parallel run; torch reads this when it is loaded.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))
os.environ["MPLBACKEND"] = "Agg"  # figures are drawn without a screen
