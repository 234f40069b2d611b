"""Settings of every test process."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cpd.cli import app
from cpd.errors import ExportError
from cpd.jobs import compress
from cpd.report.report import Report

pytest.register_assert_rewrite("helpers")  # so that what they assert is told with its values

#: pytest-xdist runs a process a core; more threads than cores spin at each other's barriers (a float64 depthwise
#: convolution takes seconds then).
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Short timings, exports and searches for garbage; the times of kernels are kept in a folder of the test run."""
    from helpers.hasty import hasten

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CPD_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        hasten(patch.setattr)
        gc.freeze()  # searches for garbage need not look at what has been imported
        yield


@pytest.fixture(scope="module")
def undeployed() -> Iterator[None]:
    """`compress` neither exports nor times its result: for tests that look at what comes before that."""

    def left_out(*_: object, **__: object) -> None:
        raise ExportError("Left out by the test.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress, "export_onnx", left_out)
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
