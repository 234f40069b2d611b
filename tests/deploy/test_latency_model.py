"""The profile of a model, and latencies predicted from it."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import cpd
from cpd.deploy import kernels, profiling
from cpd.deploy.export import export_bytes, feed, open_session, random_inputs, run_session
from cpd.deploy.kernels import KernelTimes
from cpd.deploy.latency import LatencyProbe
from cpd.deploy.latency_model import LatencyModel, _assigned
from cpd.deploy.profiling import NodeTime, profile_nodes
from cpd.deploy.workload import workload

IMAGE = torch.randn(1, 3, 64, 64)


class Block(nn.Module):
    """Convolutions of three kinds, a norm that stays, attention, and a head."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.wide = nn.Conv2d(width, 2 * width, 1)
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.grouped = nn.Conv2d(2 * width, width, 3, padding="same", groups=4)
        self.up = nn.ConvTranspose2d(width, width // 2, 2, stride=2)
        self.qkv = nn.Linear(width // 2, 3 * 32)
        self.head = nn.Linear(32, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        image = self.up(self.grouped(self.depthwise(self.wide(self.stem(image).relu()).relu()).relu()).relu())
        tokens = nn.functional.avg_pool2d(image, 8).flatten(2).transpose(1, 2)
        query, key, value = self.qkv(tokens).reshape(len(tokens), -1, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
        found = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.head(found.transpose(1, 2).flatten(2).mean(1))


@pytest.fixture(scope="module")
def block() -> tuple[nn.Module, Any, list[NodeTime]]:
    torch.manual_seed(0)
    model = Block().eval()
    content = export_bytes(model, cpd.model.inputs.as_call(IMAGE))
    session = open_session(content)
    return model, cpd.comb(model, IMAGE), profile_nodes(content, feed(session, random_inputs(content)), seconds=0.2)


# ---------------------------------------------------------------------------------- profile


def test_a_profile_has_every_node_with_its_time_and_shapes(block):
    _, _, nodes = block
    assert all(node.ms >= 0 and node.op for node in nodes)
    assert sum(node.ms for node in nodes) > 0
    convolutions = [node for node in nodes if "Conv" in node.op]
    assert len(convolutions) >= 5
    assert all(len(node.inputs) > 1 and len(node.outputs[0]) == 4 for node in convolutions)


def test_every_operation_is_found_in_the_profile(block):
    _, combed, nodes = block
    work = workload(combed.context)
    assert [type(item.anchor).__name__ for item in work.contractions].count("Convolution") == 5
    assert len(work.contractions) == 9  # and qkv, the two products of attention, the head
    shares = _assigned(nodes, work)
    found = [item for share in shares for item in share.contractions]
    assert {item.name for item in found} >= {"stem", "wide", "depthwise", "grouped", "up", "head"}
    assert sum(share.nodes for share in shares) == len(nodes)
    assert math.isclose(sum(share.ms for share in shares), sum(node.ms for node in nodes))


def test_kernels_have_the_widths_of_the_layers(block):
    _, combed, _ = block
    items = {item.name: item for item in workload(combed.context).contractions}
    grouped, depthwise = items["grouped"].anchor, items["depthwise"].anchor
    assert (grouped.groups, grouped.inputs, grouped.outputs, grouped.padding) == (4, 32, 16, (1, 1))
    assert (depthwise.groups, depthwise.inputs, depthwise.outputs) == (128, 1, 1)
    up = items["up"].anchor
    assert up.transposed and (up.inputs, up.outputs, up.weight_shape) == (64, 32, (64, 32, 2, 2))  # noqa: PT018
    half = {group.axis: group.size // 2 for group in combed.open}
    narrow = items["depthwise"].kernel(lambda dim: cpd.algebra.axes.count(dim, half))
    assert (narrow.groups, narrow.inputs, narrow.outputs) == (32, 1, 1)  # two groups of four, half of each


def test_padded_channels_are_still_found():
    """ONNX Runtime's layout fills 24 channels up to 32; the first stages of timm's MobileNet have many such widths."""
    whole = timm.create_model("mobilenetv3_small_100")
    model = nn.Sequential(whole.conv_stem, whole.bn1, *whole.blocks[:3]).eval()
    combed = cpd.comb(model, IMAGE)
    nodes = LatencyProbe(model, IMAGE).profile(seconds=0.1)
    found = [item for share in _assigned(nodes, workload(combed.context)) for item in share.contractions]
    assert len(found) == len(workload(combed.context).contractions)


def test_a_profile_ends_once_medians_are_known(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[None] = []
    monkeypatch.setattr(profiling, "run_session", lambda *given: (runs.append(None), run_session(*given)))
    assert profile_nodes(exported, feed(open_session(exported), random_inputs(exported)), seconds=600)
    assert len(runs) == profiling.MOST_RUNS


# ---------------------------------------------------------------------------------- the model


@pytest.fixture(scope="module")
def predicted(block) -> LatencyModel:
    _, combed, nodes = block
    return LatencyModel(combed, nodes, KernelTimes())


def test_nothing_pruned_is_predicted_as_it_was_profiled(block, predicted):
    _, combed, nodes = block
    total = sum(node.ms for node in nodes)
    assert predicted.milliseconds({}) == pytest.approx(total, rel=1e-6)
    assert sum(predicted.by_share({})) == pytest.approx(total, rel=1e-6)
    assert predicted.speedup({}) == pytest.approx(1)
    half = {group.axis: group.size // 2 for group in combed.open}
    assert sum(predicted.by_share(half)) == pytest.approx(predicted.milliseconds(half), rel=1e-6)
    assert predicted.milliseconds(half) < 0.7 * total


def test_a_node_far_faster_than_its_kernel_alone_is_still_predicted_as_profiled(block, monkeypatch, tmp_path):
    _, combed, nodes = block
    monkeypatch.setattr(kernels, "_measured", lambda chunk, runtime: [1.0 for _ in chunk])
    convolutions = [node for node in nodes if "Conv" in node.op]
    odd = max(convolutions, key=lambda node: node.ms)
    profile = [replace(node, ms=1e-4 * node.ms) if node is odd else node for node in nodes]
    found = LatencyModel(combed, profile, KernelTimes(path=tmp_path / "kernels.json"))
    assert found.milliseconds({}) == pytest.approx(sum(node.ms for node in profile), rel=1e-6)


def test_slopes_are_what_narrower_widths_save(block, predicted):
    _, combed, _ = block
    stem = combed.open[0]
    saved = predicted.milliseconds({}) - predicted.milliseconds({stem.axis: stem.size - 32})
    assert predicted.slopes({})[stem.axis] == pytest.approx(saved / 32, rel=0.05)
    assert set(predicted.local({})) == set(predicted.slopes({}))


def test_a_measurement_corrects_the_prediction(block, predicted):
    _, combed, _ = block
    counts = [
        {group.axis: max(1, round(group.size * share)) for group in combed.open} for share in (1 / 2, 1 / 4, 1 / 8)
    ]
    before = [predicted.speedup(each) for each in counts]
    predicted.observe(counts[1], 1.2 * before[1])
    after = [predicted.speedup(each) for each in counts]
    assert after[1] == pytest.approx(1.2 * before[1])
    assert before[0] < after[0] < 1.2 * before[0]  # half of the way there
    assert after[2] == pytest.approx(1.2 * before[2])
    assert predicted.speedup({}) == pytest.approx(1)
    predicted._observed.clear()


def test_predictions_come_near_what_is_measured():
    """A loose bound, for other processes disturb it; benchmarks/onnx_latency.py measures the error."""
    model = timm.create_model("resnet18").eval()
    found = cpd.profile_model(model, torch.randn(1, 3, 96, 96), check=3, seconds=0.5)
    assert 0.6 < statistics.median(item.predicted / item.measured for item in found.checks) < 1.7
    assert found.operators[0].op == "Conv"
    assert 0.1 < found.operators[0].half_ms / found.operators[0].ms < 0.6
    assert sum(row.ms for row in found.operators) == pytest.approx(found.total_ms)
    assert sum(row.ms for row in found.layers) == pytest.approx(found.total_ms)
    assert sum(row.half_ms for row in found.layers) == pytest.approx(sum(row.half_ms for row in found.operators))
    assert {"conv1", "layer1.0.conv1", "layer4.1.conv2", "fc"} <= {row.name for row in found.layers}
    alike = {row.ms for row in found.layers if row.name in ("layer1.0.conv1", "layer1.1.conv1")}
    assert max(found.groups, key=lambda name: found.groups[name]) in ("conv1", "layer2.0.conv2", "layer4.0.conv2")
    assert 0 < max(alike) < found.groups["conv1"] < found.total_ms
    assert json.loads(json.dumps(found.to_dict()))["kernels"] == found.kernels > 100
    assert "kernels on this machine are kept in" in found.summary()[0]
