"""A sweep over several speed-ups."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

import cpd
from cpd import processes
from cpd.files.reading import signed
from cpd.jobs import sweep
from cpd.jobs.sweep import read_sweep
from cpd.report.artifacts import SWEPT, check_output_dir
from cpd.report.records import Figures, SweepPoint
from helpers.pages import Page

IMAGE = torch.randn(1, 3, 64, 64)


def test_the_first_process_alone_writes(monkeypatch, tmp_path):
    def out_of_reach(*_, **__):
        raise cpd.TargetError("out of reach")

    monkeypatch.setattr(sweep, "compressed", out_of_reach)
    monkeypatch.setattr(processes, "from_first", lambda make: None)  # as in any other one
    assert cpd.sweep(nn.Linear(2, 2), [2.0], output_dir=tmp_path).points[0].error == "out of reach"
    assert not (tmp_path / "sweep.json").exists()


def test_a_sweep_goes_on_past_what_cannot_be_reached(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4),
    )  # fmt: skip
    found = cpd.sweep(
        model, np.array([1.5, 500.0]), output_dir=tmp_path, example_inputs=IMAGE, tolerance=0.3, max_ratio=0.5
    )
    reached, not_reached = found.points
    assert (reached.error, reached.speedup is None) == (None, False)  # how fast is for the machine at this moment
    assert reached.folder == str(tmp_path / "1.5x")
    assert (tmp_path / "1.5x" / "model.onnx").exists()
    assert not_reached.figures is None
    assert "Ask for" in not_reached.error
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert written == signed(json.loads(json.dumps(found.to_dict())))
    assert read_sweep(tmp_path) == found
    (tmp_path / "sweep.json").write_text(json.dumps({**written, "metric_name": "mine"}))
    with pytest.raises(cpd.ArtifactError, match=r"sweep\.json is not as it was saved"):
        read_sweep(tmp_path)
    with pytest.raises(cpd.InputError, match=r"sweep\.json.*changed since"):
        check_output_dir(tmp_path, SWEPT)
    assert found.plot(tmp_path / "sweep.svg").stat().st_size > 1000
    for name in ("sweep.nonsense", "sweep"):
        with pytest.raises(cpd.InputError, match="must name a picture format: one of"):
            found.plot(tmp_path / name)
    with pytest.raises(cpd.InputError, match="cannot be written"):
        found.plot(tmp_path / "none" / "sweep.svg")
    with pytest.raises(cpd.InputError, match="at least one speed-up"):
        cpd.sweep(model, [])


@pytest.fixture
def swept() -> sweep.Sweep:
    """Three speed-ups, of which one is out of reach."""
    points = tuple(
        SweepPoint(asked, got, Figures(5_000, 20_000, 300, 20.0 / got, metric))
        for asked, got, metric in ((1.5, 1.48, 0.924), (3.0, 2.97, 0.895))
    )
    unreached = SweepPoint(8.0, None, None, error="out of reach")
    return sweep.Sweep(Figures(10_000, 40_000, 600, 20.0, 0.927), (*points, unreached), "val accuracy")


def test_the_page_labels_each_point_with_its_target(swept):
    page = Page(swept.to_html())
    for text in ("Val accuracy [%] against measured latency", "measured latency [ms]", "92.40 %", "89.50 %"):
        assert text in page.text
    labels = [found for tag, found in page.tags if tag == "text" and "halo" in found["class"]]
    assert len(labels) == page.count("circle") == 3
    assert all(46 <= float(found["x"]) <= 344 for found in labels)
    ticks = ["5", "10", "15", "20", "89", "90", "91", "92", "93"]
    assert all(f">{tick}</text>" in swept.to_html() for tick in ticks)
    unmeasured = dataclasses.replace(
        swept,
        original=dataclasses.replace(swept.original, metric=None),
    )
    assert "MACs left [%] against measured latency" in Page(unmeasured.to_html()).text


def test_the_plot_names_targets_and_units_within_its_frame(swept, tmp_path, monkeypatch):
    Figure, figures = pytest.importorskip("matplotlib.figure").Figure, []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: (figures.append(figure), save(figure, path)))
    swept.plot(tmp_path / "sweep.png")
    (area,) = figures[0].axes
    assert (area.get_xlabel(), area.get_ylabel()) == ("measured latency [ms]", "Val accuracy [%]")
    assert sorted(text.get_text() for text in area.texts) == ["1.5x (1.48x)", "3x (2.97x)", "original"]
    assert max(area.lines[0].get_ydata()) == pytest.approx(92.7)
    frame = area.get_window_extent()
    for text in area.texts:
        box = text.get_window_extent()
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1
