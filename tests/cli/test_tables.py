"""Tables: names stand in them as they are, whatever they hold."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from cpd.cli.tables import figures_table, latency_table, sensitivity_table, sweep_table
from cpd.deploy.latency import LatencyTable, Timing
from cpd.jobs.sensitivity import Point, Sensitivity
from cpd.jobs.sweep import Sweep, SweepPoint
from cpd.report.records import Figures
from cpd.report.report import Report


def printed(table: Table) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_brackets_are_no_markup(report: Report) -> None:
    name = "PSNR [dB]"
    figures = Figures(8, 8, 8, 2.0, 30.0)
    shown = printed(figures_table(replace(report, original=figures, result=figures, metric_name=name)))
    assert name in shown
    times = (1.0, 1.0, 1.0, 1.0, 1.0)
    rows = (Timing("run[old]", "[mine]", *times), Timing("x[/b]", "torch", *times))
    shown = printed(latency_table(LatencyTable(rows, 6, 1, 1, {})))
    assert all(text in shown for text in ("run[old]", "[mine]", "x[/b]"))
    point = Point("layers[red].a", 0.5, 4, 8, 0.5, 0.1, None, 29.0)
    shown = printed(sensitivity_table(Sensitivity((point,), None, 30.0, name)))
    assert name in shown
    assert "layers[red].a" in shown
    assert name in printed(sweep_table(Sweep(figures, (SweepPoint(2.0, 2.0, figures),), name)))
