"""Settings that every test shares."""

from __future__ import annotations

import os

import pytest
import torch

os.environ["TQDM_DISABLE"] = "1"
os.environ["MPLBACKEND"] = "Agg"  # figures are drawn without a screen
LONGEST = ("05", "04", "06", "03", "01", "A1", "07")  # lessons, so that no worker is left alone with them at the end
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # they share the processor, as do their kernels
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NO_GPU)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the test computes: on the CPU, and once more on CUDA where there is one."""
    return str(request.param)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Share the tests between workers: each run of a notebook by itself, the longest first, the others by file."""
    runs = {}
    for item in items:
        name = item.name.partition("[")[2]
        ran = item.name.startswith("test_it_runs_at_tier_ci")
        runs[item] = LONGEST.index(name[:2]) if ran and name[:2] in LONGEST else len(LONGEST) + (not ran)
        item.add_marker(pytest.mark.xdist_group(item.name if ran else item.location[0]))
    items.sort(key=lambda item: runs[item])
