"""Timings in a process of their own: the same models, and this process where that one fails."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import cpd
from cpd.deploy import latency
from cpd.deploy.apart import timed_apart
from cpd.deploy.export import export_onnx
from cpd.deploy.latency import LatencyProbe
from cpd.deploy.runtimes.base import Artifact
from cpd.deploy.runtimes.catalogue import runtimes_of
from cpd.model.inputs import as_call
from helpers.exports import conv_net

BUDGET = (0.1, 6, 0.5)


@pytest.fixture
def artifacts(image: torch.Tensor) -> list[Artifact]:
    return [Artifact(conv_net(width), as_call(image)) for width in (64, 8)]


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime:int8"])
def test_a_new_process_times_the_same_models(artifacts: list[Artifact], name: str):
    (runtime,) = runtimes_of(name, 1)
    times = timed_apart(runtime, artifacts, *BUDGET)
    assert times is not None
    assert times.shape[1] == 2
    assert len(times) >= 6
    assert np.median(times[:, 0] / times[:, 1]) > 1.5


def test_inputs_keep_their_names_and_values(tmp_path: Path):
    class Named(nn.Module):
        def forward(self, file: torch.Tensor, allow_pickle: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.embedding(file, torch.eye(4)) + allow_pickle

    call = as_call(((), {"file": torch.tensor([3, 1]), "allow_pickle": torch.ones(4)}))
    path = export_onnx(Named(), call, tmp_path / "named.onnx")  # an index out of range would fail
    assert timed_apart(runtimes_of("onnxruntime", 1)[0], [Artifact(path, call)] * 2, *BUDGET) is not None


def test_what_a_new_process_cannot_run_is_timed_here(
    artifacts: list[Artifact], monkeypatch: pytest.MonkeyPatch, image: torch.Tensor
):
    (runtime,) = runtimes_of("onnxruntime", 1)
    for other in (*runtimes_of("torch", 1), *runtimes_of(lambda paths: [1.0 for _ in paths], 1)):
        assert timed_apart(other, artifacts, *BUDGET) is None, "it needs more than a file"
    failing = {name: artifact.onnx for name, artifact in zip(("wide", "narrow"), artifacts, strict=True)}
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert timed_apart(runtime, artifacts, *BUDGET) is None
    monkeypatch.setattr(latency, "timed_apart", timed_apart)
    probe = LatencyProbe(failing["wide"], image)
    assert probe.compare(failing["narrow"], seconds=0.1, min_runs=6, apart=True).speedup > 1.5


def test_the_last_timing_is_apart_where_the_process_went_over_data(monkeypatch: pytest.MonkeyPatch):
    """What it says is what the report tells: here that the result is twice as fast, to the digit."""
    asked = list[Any]()

    def apart(runtime: Any, artifacts: Any, *budget: Any) -> Any:
        asked.append(runtime.name)
        return np.full((6, 2), [2.0, 1.0])

    monkeypatch.setattr(latency, "timed_apart", apart)
    model, data = conv_net(16), [(torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.long)) for _ in range(2)]
    options: dict[str, Any] = {"target_macs": 0.6, "example_inputs": torch.randn(1, 3, 32, 32), "progress": False}
    assert cpd.compress(model, **options).speedup != 2.0
    assert not asked
    assert cpd.compress(model, data=data, **options).speedup == 2.0
    assert asked == ["onnxruntime"]
