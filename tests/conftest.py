"""Settings of every test process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.onnx._internal.exporter._registration import ONNXRegistry
from typer.testing import CliRunner

from cpd.cli import app
from cpd.deploy import kernels, latency
from cpd.jobs import compress
from cpd.report.report import Report
from cpd.selection import search

pytest.register_assert_rewrite("helpers")  # so that what they assert is told with its values

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


@pytest.fixture(scope="session", autouse=True)
def one_registry() -> Iterator[None]:
    """The exporter reads the sources of its 500 operators once, not at every export (half of a small one)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """Latencies are timed for a quarter of a second: for tests that look at something else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress, "FINAL_SECONDS", 0.25)
        patch.setattr(search, "SECONDS", 0.25)
        yield


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The command line, called in this process."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("NO_COLOR", "1")
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def report() -> Report:
    """A report in which every stage has something to tell."""
    from helpers.pages import example_report

    return example_report()
