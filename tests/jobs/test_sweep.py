"""A sweep over several speed-ups."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import cpd
from cpd.files.reading import signed
from cpd.jobs.sweep import read_sweep
from cpd.report.artifacts import SWEPT, check_output_dir

IMAGE = torch.randn(1, 3, 64, 64)


def test_a_sweep_goes_on_past_what_cannot_be_reached(quick, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4),
    )  # fmt: skip
    found = cpd.sweep(model, [1.5, 500.0], output_dir=tmp_path, example_inputs=IMAGE, tolerance=0.3, max_ratio=0.5)
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
    with pytest.raises(cpd.InputError, match="cannot be written"):
        found.plot(tmp_path / "sweep.nonsense")
    with pytest.raises(cpd.InputError, match="at least one speed-up"):
        cpd.sweep(model, [])
