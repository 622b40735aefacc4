"""Settings that every test shares."""

from __future__ import annotations

import os

import pytest
import torch

os.environ["TQDM_DISABLE"] = "1"
os.environ["MPLBACKEND"] = "Agg"  # figures are drawn without a screen
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NO_GPU)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the test computes: on the CPU, and once more on CUDA where there is one."""
    return str(request.param)
