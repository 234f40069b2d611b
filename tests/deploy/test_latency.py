"""The latency of models compared in turns, and how sure a comparison is."""

import json
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from cpd.deploy.export import export_onnx
from cpd.deploy.latency import LatencyComparison, LatencyProbe, compare_latency
from cpd.deploy.rounds import _rank, median_interval
from cpd.errors import ExportError, InputError
from helpers.exports import BehavesOtherwiseWhenExported, conv_net


def check_consistent(result: LatencyComparison) -> None:
    assert result.speedup_low <= result.speedup <= result.speedup_high
    assert 0 < result.original_ms <= result.original_p90_ms
    assert 0 < result.candidate_ms <= result.candidate_p90_ms
    assert result.environment.keys() == {"cpu", "cores", "platform", "onnxruntime", "torch"}
    assert all(result.environment.values())


def test_probe_tells_the_faster_from_the_slower(exported: Path, image: torch.Tensor):
    large = export_onnx(conv_net(64, depth=3), image)
    probe = LatencyProbe(large, image)
    faster = probe.compare(exported, seconds=0.5, precision=0.2)
    check_consistent(faster)
    assert faster.speedup_low > 2
    slower = compare_latency(exported, large, image, seconds=0.2, threads=2)
    check_consistent(slower)
    assert slower.speedup < 0.7
    assert slower.threads == 2


def test_a_model_is_as_fast_as_itself(exported: Path, image: torch.Tensor):
    result = compare_latency(exported, exported, image, seconds=1.0, min_runs=40, precision=0.02)
    check_consistent(result)
    assert 0.8 < result.speedup < 1.25


def test_timing_ends_by_precision_or_by_time(exported: Path, image: torch.Tensor):
    content = exported.read_bytes()
    probe = LatencyProbe(exported, image)
    assert probe.compare(content, seconds=60.0, min_runs=8, precision=1e6).runs == 8
    assert probe.compare(content, seconds=1e-9, min_runs=11, precision=1e-9).runs == 11
    longer = probe.compare(onnx.load(exported), seconds=0.5, min_runs=6, precision=1e-9)
    assert longer.runs > 6
    assert json.loads(json.dumps(longer.to_dict())) == longer.to_dict()


def test_latency_checks_each_module_against_pytorch(exported: Path, image: torch.Tensor):
    probe = LatencyProbe(exported, image)
    with pytest.raises(ExportError, match="differ from PyTorch's"):
        probe.compare(BehavesOtherwiseWhenExported())


def test_latency_refuses_bad_arguments(exported: Path, image: torch.Tensor):
    for wrong in ({"seconds": 0}, {"precision": 0}, {"min_runs": 5}, {"threads": 0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            compare_latency(exported, exported, image, **wrong)
    with pytest.raises(InputError, match=r"torch\.nn\.Module"):
        compare_latency(3, exported, image)
    with pytest.raises(InputError, match="has shape"):
        compare_latency(exported, exported, image[:1])


def test_ranks_are_the_published_ones():
    # Ranks of the 95 % sign-test interval, as in tables of the binomial distribution.
    assert [_rank(count) for count in (5, 6, 9, 10, 20, 25, 50, 100)] == [0, 1, 2, 2, 6, 8, 18, 40]


def test_interval_covers_the_median():
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        low, high = median_interval(generator.exponential(size=25))
        hits += low <= math.log(2) <= high
    assert 0.94 < hits / 2000 < 0.98  # exact coverage at n = 25 is 95.7 %
