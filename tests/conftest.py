"""Settings of every test process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cpd.deploy import kernels, latency
from cpd.jobs import compress
from cpd.selection import search

#: pytest-xdist runs a process a core; more threads than cores spin at each other's barriers (a float64 depthwise
#: convolution takes seconds then).
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def short_timings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Models and kernels are timed for a moment; kernels are kept in a folder of the test run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CPD_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        patch.setattr(kernels, "SECONDS", 0.02)
        for name in ("_BLOCK_MS", "_LEAD_MS"):
            patch.setattr(latency, name, 3.0)
        patch.setattr(compress, "PROFILE_SECONDS", 0.02)
        yield


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """Latencies are timed for half a second: for tests that look at something else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress, "FINAL_SECONDS", 0.5)
        patch.setattr(search, "SECONDS", 0.5)
        yield
