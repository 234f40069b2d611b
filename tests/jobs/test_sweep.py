"""A sweep over several speed-ups."""

from __future__ import annotations

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
    assert reached.speedup > 1
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
        with pytest.raises(cpd.InputError, match="ending must name a format"):
            found.plot(tmp_path / name)
    with pytest.raises(cpd.InputError, match="cannot be written"):
        found.plot(tmp_path / "none" / "sweep.svg")
    with pytest.raises(cpd.InputError, match="at least one speed-up"):
        cpd.sweep(model, [])
