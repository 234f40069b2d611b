"""A target in several runtimes: each predicts for itself, the slowest counts, and corrections go where they belong."""

import pytest
import torch

import cpd
from cpd.deploy.latency import LatencyProbe
from cpd.deploy.latency_model import LatencyModel
from cpd.deploy.several import SlowestModel, latency_model
from helpers.tiny import INPUT, Tiny


@pytest.fixture(scope="module")
def both():
    """The same model in one thread and in two, by name of the runtime."""
    torch.manual_seed(0)
    model = Tiny().eval()
    combed = cpd.comb(model, INPUT)
    probe = LatencyProbe(model, INPUT, runtime=["onnxruntime", "onnxruntime:int8"])
    return combed, probe, latency_model(combed, probe)


def test_each_runtime_is_predicted_from_its_own_kernels(both):
    combed, probe, found = both
    assert isinstance(found, SlowestModel)
    assert list(found.models) == ["onnxruntime", "onnxruntime:int8"]
    files = {item._times.path for item in found.models.values()}
    assert len(files) == 2
    assert probe.is_profiled
    alone = latency_model(combed, LatencyProbe(combed.model, INPUT))
    assert isinstance(alone, LatencyModel)


def test_the_slowest_counts_and_a_measurement_corrects_its_own_runtime(both):
    combed, _, found = both
    half = {group.axis: group.size // 2 for group in combed.open}
    each = {name: item.speedup(half) for name, item in found.models.items()}
    assert found.speedup(half) == min(each.values())
    fresh = found.unobserved()
    fresh.observe(half, 0.5 * each["onnxruntime:int8"], "onnxruntime:int8")
    assert fresh.models["onnxruntime"].speedup(half) == pytest.approx(each["onnxruntime"])
    assert fresh.models["onnxruntime:int8"].speedup(half) == pytest.approx(0.5 * each["onnxruntime:int8"])
    assert found.speedup(half) == min(each.values())  # the other one has learnt nothing


def test_milliseconds_are_those_of_all_at_one_scale(both):
    combed, _, found = both
    assert found.milliseconds({}) == pytest.approx(found.original_ms, rel=0.01)
    slopes = found.slopes({})
    assert slopes.keys() == {group.axis for group in combed.open}
    without = found.without(list(combed.context.graph.operations)[-2:])
    assert without.milliseconds({}) <= found.milliseconds({})
