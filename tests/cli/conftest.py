"""What the tests of the command line share."""

from __future__ import annotations

import pytest

import cpd
from cpd.report.report import Report
from helpers.fakes import Fakes


@pytest.fixture
def fakes(report: Report, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    """Stand-ins for `cpd.compress` and `cpd.comb`."""
    fakes = Fakes(report)
    monkeypatch.setattr(cpd, "compress", fakes.compress, raising=False)
    monkeypatch.setattr(cpd, "comb", fakes.comb, raising=False)
    return fakes
