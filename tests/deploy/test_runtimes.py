"""Many models and several runtimes timed in one run."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import nn

import cpd
from cpd.deploy.latency import LatencyProbe
from cpd.deploy.runtimes.base import Artifact, Session

IMAGE = torch.randn(1, 3, 64, 64)


def test_many_models_are_timed_in_one_run():
    small, large = nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3))
    found = cpd.measure_latency(
        {"large": large, "small": small, "again": large}, IMAGE, runtime=["onnxruntime", "torch"], batch_size=2,
        seconds=0.3, min_runs=6,
    )  # fmt: skip
    assert [(row.name, row.runtime) for row in found.rows] == [
        (name, runtime) for runtime in ("onnxruntime", "torch") for name in ("large", "small", "again")
    ]
    assert found.samples == 2
    assert found["large"].speedup == 1.0
    assert found["small"].speedup_low > 2
    assert 0.5 < found["again"].speedup < 2
    assert json.loads(json.dumps(found.to_dict()))["runs"] == found.runs >= 6


class Sleepy:
    """Takes time by the width of a layer."""

    name, version, threads, precision, grain = "sleepy", "1", 1, "f32", 8

    def prepare(self, artifact: Artifact) -> Session:
        width = artifact.demand_module(self.name).out_channels
        return Session(lambda: sum(range(10_000 * width)))


def test_a_runtime_is_twenty_lines():
    models = {"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(3, 1, 3)}
    found = cpd.measure_latency(models, IMAGE, runtime=Sleepy(), seconds=0.1, min_runs=6)
    assert found["b"].speedup > 2


def test_compiled_models_are_timed():
    found = cpd.measure_latency({"a": nn.Linear(8, 8)}, torch.randn(2, 8), runtime="torch.compile", seconds=0.1,
                                min_runs=6)  # fmt: skip
    assert found["a"].median_ms > 0


def test_runtimes_that_are_not_there_say_so(monkeypatch):
    model = nn.Conv2d(3, 8, 3)
    with pytest.raises(cpd.InputError, match=r"^runtime must be .*openvino.*; got list \['tpu'\]"):
        cpd.measure_latency({"a": model}, IMAGE, runtime=["tpu"])
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(cpd.InputError, match=r"cpd\[openvino\]"):
        cpd.measure_latency({"a": model}, IMAGE, runtime="openvino")
    with pytest.raises(cpd.InputError, match="no CUDAExecutionProvider"):
        cpd.measure_latency({"a": model}, IMAGE, runtime="onnxruntime:cuda")
    with pytest.raises(cpd.InputError, match="at least one model"):
        cpd.measure_latency({}, IMAGE)
    with pytest.raises(cpd.InputError, match=r"^batch_size must be an integer"):
        cpd.measure_latency({"a": model}, IMAGE, batch_size=0)
    with pytest.raises(cpd.InputError, match=r"runs torch\.nn\.Modules"):
        cpd.measure_latency({"a": b""}, IMAGE, runtime="torch")


def test_of_several_batches_the_slowest_counts():
    """At 64 pixels half of the width saves much, at 4 pixels next to nothing."""
    large, small = nn.Conv2d(3, 256, 3, padding=1), nn.Conv2d(3, 16, 3, padding=1)
    probe = LatencyProbe(large, IMAGE, others=[torch.randn(1, 3, 4, 4)])
    both = probe.compare(small, seconds=0.4, min_runs=6)
    alone = LatencyProbe(large, IMAGE).compare(small, seconds=0.2, min_runs=6)
    assert both.speedup < alone.speedup
    largest = probe.compare(small, seconds=0.4, min_runs=6, slowest=lambda found: -found.candidate_ms)
    assert largest.speedup > both.speedup
