"""Profile, kernel times, predicted latencies, and the search that ends on a measured target."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

import cpd
from cpd.deploy import kernels
from cpd.deploy.export import export_bytes, feed, open_session, random_inputs
from cpd.deploy.kernels import UNIT, Convolution, Kernel, KernelTimes, MatrixProduct
from cpd.deploy.latency import LatencyProbe
from cpd.deploy.latency_model import LatencyModel, _assigned
from cpd.deploy.profiling import NodeTime, profile_nodes
from cpd.deploy.workload import workload
from cpd.selection.limits import Limits
from cpd.selection.search import reach
from cpd.selection.selector import Selector
from cpd.selection.target import Target

IMAGE = torch.randn(1, 3, 64, 64)
CONV = Convolution(1, 1, 128, 256, (14, 14), (3, 3), (1, 1), (1, 1), (1, 1))


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


def by(formula: Callable[[Kernel], float]) -> Callable[..., list[float]]:
    """A stop watch that gives each kernel what a formula says."""
    return lambda chunk, threads: [formula(kernel) for kernel in chunk]


def saw(kernel: Kernel) -> float:
    """A convolution of whole vectors of 16, the first vector of four at double cost; its inputs by whole vectors."""
    outputs = math.ceil(kernel.outputs / 16)
    whole, rest = divmod(outputs, 4)
    return (5.0 * whole + (rest + 1 if rest else 0)) * math.ceil(kernel.inputs / 16) * 1e-3


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
    """ONNX Runtime's layout fills 24 channels up to 32; timm's MobileNet has many such widths."""
    model = timm.create_model("mobilenetv3_small_100").eval()
    combed = cpd.comb(model, IMAGE)
    nodes = LatencyProbe(model, IMAGE).profile(seconds=0.1)
    found = [item for share in _assigned(nodes, workload(combed.context)) for item in share.contractions]
    assert len(found) == len(workload(combed.context).contractions)


# ---------------------------------------------------------------------------------- kernels


def test_a_saw_tooth_is_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "_measured", by(saw))
    times = KernelTimes(path=tmp_path / "kernels.json")
    times.prepare([(CONV, ("inputs", "outputs"))])
    known = len(times)
    for inputs in (128, 96, 72, 64, 24):
        for outputs in (256, 248, 200, 136, 64, 40, 24):
            kernel = CONV.at(inputs=inputs, outputs=outputs)
            assert times.time(kernel, CONV) == pytest.approx(saw(kernel)), (inputs, outputs)
    assert len(times) == known  # nothing had to be measured for it
    assert times.time(CONV.at(outputs=24), CONV) == times.time(CONV.at(outputs=32), CONV)


def test_widths_that_fill_no_vector_cost_what_they_do_near_there(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "_measured", by(lambda k: saw(k) * (1 if k.inputs % 4 == 0 else 3)))
    times = KernelTimes(path=tmp_path / "kernels.json")
    assert times.time(CONV.at(inputs=126), CONV) == pytest.approx(3 * times.time(CONV, CONV))
    assert times.time(CONV.at(inputs=124), CONV) == pytest.approx(times.time(CONV, CONV))


def test_small_widths_are_measured_together(tmp_path, monkeypatch):
    """Where two small widths decide together, their product of ratios would be wrong."""
    monkeypatch.setattr(kernels, "_measured", by(lambda k: 9.0 if k.inputs < 16 and k.outputs < 16 else 1.0))
    times = KernelTimes(path=tmp_path / "kernels.json")
    assert times.time(CONV.at(inputs=8, outputs=8), CONV) == 9.0
    assert times.time(CONV.at(inputs=8), CONV) == 1.0
    grouped = replace(CONV, groups=8, inputs=32, outputs=32)
    monkeypatch.setattr(kernels, "_measured", by(lambda k: 5.0 if k.inputs < 32 and k.outputs < 32 else 1.0))
    assert times.time(grouped.at(inputs=24, outputs=24), grouped) == 5.0


def test_kernels_are_measured_for_real(tmp_path):
    times = KernelTimes(path=tmp_path / "kernels.json")
    small, large = CONV.at(inputs=32, outputs=32), CONV
    seen = []
    times.measure([small, large, MatrixProduct(2, 49, 16, 49, False), MatrixProduct(1, 49, 64, 128, True)],
                  lambda done, total: seen.append((done, total)))  # fmt: skip
    assert seen == [(4, 4)]
    assert 0 < 4 * times[small] < times[large]
    transposed = Convolution(1, 1, 16, 8, (7, 7), (2, 2), (2, 2), (0, 0), (1, 1), transposed=True)
    assert times[transposed] > 0
    assert 0.3 < times[UNIT] / kernels.UNIT_MS < 3


def test_what_was_measured_is_kept(tmp_path, monkeypatch, caplog):
    path = tmp_path / "cache" / "kernels.json"
    monkeypatch.setattr(kernels, "_measured", by(saw))
    first, second = KernelTimes(path=path), KernelTimes(path=path)
    first[CONV], second[CONV.at(outputs=64)]
    monkeypatch.setattr(kernels, "_measured", by(lambda kernel: math.nan))
    again = KernelTimes(path=path)
    assert again[CONV] == saw(CONV) and again[CONV.at(outputs=64)] == saw(CONV.at(outputs=64))  # noqa: PT018
    assert len(KernelTimes(threads=2, path=path)) == 2  # both are known, but of one thread
    for damaged in ("{", "[]", '{"kernels": {"a": "b"}}'):
        path.write_text(damaged)
        assert len(KernelTimes(path=path)) == 0
    assert caplog.text.count("measured again") == 3
    assert [item.name for item in path.parent.iterdir()] == ["kernels.json"]
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(kernels, "_measured", by(saw))
    assert KernelTimes(path=tmp_path / "file" / "kernels.json")[CONV] == saw(CONV)
    assert "cannot be kept" in caplog.text


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
    monkeypatch.setattr(kernels, "_measured", by(lambda kernel: 1.0))
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
    counts = [{group.axis: max(1, round(group.size * share)) for group in combed.open} for share in (0.75, 0.5, 0.25)]
    before = [predicted.speedup(each) for each in counts]
    predicted.observe(counts[1], 1.2 * before[1])
    after = [predicted.speedup(each) for each in counts]
    assert after[1] == pytest.approx(1.2 * before[1])
    assert before[0] < after[0] < 1.2 * before[0]  # half of the way there
    assert after[2] == pytest.approx(1.2 * before[2])
    assert predicted.speedup({}) == pytest.approx(1)
    predicted._observed.clear()


def test_predictions_come_near_what_is_measured(quick):
    """A loose bound, for other processes disturb it; benchmarks/onnx_latency.py measures the error."""
    model = timm.create_model("resnet18").eval()
    found = cpd.profile_model(model, torch.randn(1, 3, 96, 96), check=2, seconds=0.5)
    assert all(0.6 < item.predicted / item.measured < 1.7 for item in found.checks)
    assert found.operators[0].op == "Conv"
    assert 0.1 < found.operators[0].half_ms / found.operators[0].ms < 0.6
    assert sum(row.ms for row in found.operators) == pytest.approx(found.total_ms)
    assert json.loads(json.dumps(found.to_dict()))["kernels"] == found.kernels > 100
    assert "known on this machine" in found.summary()[0]


# ---------------------------------------------------------------------------------- selection and search


class Stopwatch:
    """Latencies from a formula, off from the prediction by a power, for a search without exports."""

    def __init__(self, combed: Any, power: float) -> None:
        self.combed, self.power, self.full = combed, power, combed.cost({}).macs
        self.observed: list[tuple[float, float]] = [(0.0, 0.0)]
        self.exports = 0

    def raw(self, counts: Any) -> float:
        return math.log(self.full / self.combed.cost(counts).macs)

    # what the search asks of the latency model
    def speedup(self, counts: Any) -> float:
        found, real = zip(*sorted(self.observed), strict=True)
        raw = self.raw(counts)
        return math.exp(np.interp(raw, found, real) if raw < found[-1] else raw + real[-1] - found[-1])

    def observe(self, counts: Any, speedup: float) -> None:
        self.observed.append((self.raw(counts), math.log(speedup)))

    def milliseconds(self, counts: Any) -> float:
        return 10 / self.speedup(counts)

    def local(self, counts: Any) -> dict[Any, float]:
        return {}

    # and of the probe
    def compare(self, model: nn.Module, **_: Any) -> Any:
        self.exports += 1
        macs = cpd.comb(model, IMAGE).cost({}).macs
        speedup = (self.full / macs) ** self.power
        return SimpleNamespace(speedup=speedup, original_ms=10.0, candidate_ms=10.0 / speedup)


@pytest.fixture(scope="module")
def selector() -> Selector:
    torch.manual_seed(0)
    layers = [part for width in (3, 64, 128, 96, 64, 128) for part in (nn.LazyConv2d(2 * width, 3), nn.ReLU())]
    model = nn.Sequential(*layers, nn.LazyConv2d(4, 1)).eval()
    model(IMAGE)
    combed = cpd.comb(model, IMAGE)
    return Selector(combed, cpd.score(model, combed, criterion="magnitude"), Limits(round_to=8))


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("target", [Target("target_speedup", 2.0), Target("target_latency_ms", 5.0)])
def test_the_search_ends_on_target_however_wrong_the_prediction(selector, power, target):
    watch = Stopwatch(selector.comb, power)
    best, tried = reach(selector.comb.model, selector, watch, watch, target, 10.0)
    assert abs(best.attained - 1) < 0.05
    assert best.speedup == pytest.approx(2, rel=0.05)
    assert len(tried) == watch.exports <= 4


def test_a_target_out_of_reach_says_what_can_be(selector):
    watch = Stopwatch(selector.comb, 0.1)
    with pytest.raises(cpd.TargetError, match=r"target_speedup=9 cannot be reached.*times as fast.*Ask for 1\.\d"):
        reach(selector.comb.model, selector, watch, watch, Target("target_speedup", 9.0), 10.0)
    with pytest.raises(cpd.TargetError, match="nothing to do"):
        reach(selector.comb.model, selector, watch, watch, Target("target_latency_ms", 11.0), 10.0)


def test_a_leap_over_the_target_is_taken_back(selector):
    """A figure that leaps by one step: other groups come back, as far as it goes."""
    combed, cost, full = selector.comb, selector.comb.cost, selector.comb.cost({}).macs
    stem = combed.open[0]

    def figure(counts: Any) -> float:
        return full / cost(counts).macs * (1.5 if counts[stem.axis] < stem.size else 1.0)

    steps = [figure(selector.counts(step)) for step in range(len(selector._path))]
    index = next(i for i, (a, b) in enumerate(itertools.pairwise(steps)) if b / a > 1.4)
    target = steps[index] * 1.2
    counts = selector.reach(figure, target)
    assert target <= figure(counts) < steps[index + 1]
    assert cost(counts).macs > cost(selector.counts(index + 1)).macs


def test_a_wider_layer_that_is_as_fast_is_kept_wide(selector):
    class Teeth:
        """Vectors of 32."""

        def milliseconds(self, counts: Any) -> float:
            return sum(math.ceil(width / 32) for axis, width in counts.items() if axis in axes)

        def local(self, counts: Any) -> dict[Any, float]:
            return {axis: math.ceil(counts[axis] / 32) for axis in axes}

    groups = selector.comb.open[1:3]
    axes = {group.axis for group in groups}
    counts = {group.axis: group.size for group in selector.comb.groups} | {group.axis: 40 for group in groups}
    found = selector.widened(counts, Teeth())
    assert [found[group.axis] for group in groups] == [64, 64]


# ---------------------------------------------------------------------------------- timing and backends


def test_many_models_are_timed_in_one_run():
    small, large = nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3))
    found = cpd.measure_latency(
        {"large": large, "small": small, "again": large}, IMAGE, backends=["onnxruntime", "torch"], batch_size=2,
        seconds=0.3, min_runs=6,
    )  # fmt: skip
    assert [(row.name, row.backend) for row in found.rows] == [
        (name, backend) for backend in ("onnxruntime", "torch") for name in ("large", "small", "again")
    ]
    assert found.samples == 2
    assert found["large"].speedup == 1.0
    assert found["small"].speedup_low > 2
    assert 0.5 < found["again"].speedup < 2
    assert json.loads(json.dumps(found.to_dict()))["runs"] == found.runs >= 6


def test_a_backend_is_twenty_lines():
    class Sleepy:
        name = "sleepy"

        def open(self, model: Any, call: Any) -> Callable[[], object]:
            return lambda: sum(range(10_000 * model))

    found = cpd.measure_latency({"a": 4, "b": 1}, IMAGE, backends=[Sleepy()], seconds=0.1, min_runs=6)
    assert found["b"].speedup > 2


def test_compiled_models_are_timed():
    found = cpd.measure_latency({"a": nn.Linear(8, 8)}, torch.randn(2, 8), backends=["torch.compile"], seconds=0.1,
                                min_runs=6)  # fmt: skip
    assert found["a"].median_ms > 0


def test_backends_that_are_not_there_say_so(monkeypatch):
    model = nn.Conv2d(3, 8, 3)
    with pytest.raises(cpd.InputError, match="Unknown backend 'tpu'"):
        cpd.measure_latency({"a": model}, IMAGE, backends=["tpu"])
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(cpd.InputError, match="pip install openvino"):
        cpd.measure_latency({"a": model}, IMAGE, backends=["openvino"])
    with pytest.raises(cpd.InputError, match="no CUDAExecutionProvider"):
        cpd.measure_latency({"a": model}, IMAGE, backends=["cuda"])
    with pytest.raises(cpd.InputError, match="at least one model"):
        cpd.measure_latency({}, IMAGE)
    with pytest.raises(cpd.InputError, match="batch size"):
        cpd.measure_latency({"a": model}, IMAGE, batch_size=0)
    with pytest.raises(cpd.InputError, match=r"runs torch\.nn\.Modules"):
        cpd.measure_latency({"a": b""}, IMAGE, backends=["torch"])


def test_of_several_batches_the_slowest_counts(quick):
    """At 64 pixels half of the width saves much, at 4 pixels next to nothing."""
    large, small = nn.Conv2d(3, 256, 3, padding=1), nn.Conv2d(3, 16, 3, padding=1)
    probe = LatencyProbe(large, IMAGE, others=[torch.randn(1, 3, 4, 4)])
    both = probe.compare(small, seconds=0.4, min_runs=6)
    alone = LatencyProbe(large, IMAGE).compare(small, seconds=0.2, min_runs=6)
    assert both.speedup < alone.speedup
    largest = probe.compare(small, seconds=0.4, min_runs=6, slowest=lambda found: -found.candidate_ms)
    assert largest.speedup > both.speedup


# ---------------------------------------------------------------------------------- sweep and INT8


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
    assert json.loads((tmp_path / "sweep.json").read_text()) == json.loads(json.dumps(found.to_dict()))
    assert found.plot(tmp_path / "sweep.svg").stat().st_size > 1000
    with pytest.raises(cpd.InputError, match="cannot be written"):
        found.plot(tmp_path / "sweep.nonsense")
    with pytest.raises(cpd.InputError, match="at least one speed-up"):
        cpd.sweep(model, [])


def batches(count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(5, 3, 16, 16, generator=generator), torch.zeros(5, dtype=torch.long)) for _ in range(count)]


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
    ).eval()  # fmt: skip


def test_int8_is_near_the_float_model(classifier, tmp_path):
    path = cpd.export_onnx(classifier, torch.randn(1, 3, 16, 16), tmp_path / "model.onnx")

    def evaluate(model: nn.Module) -> float:
        return float(torch.cat([model(images) for images, _ in batches()]).detach().mean())

    found = cpd.quantize_onnx(
        path, batches(), tmp_path / "int8.onnx", original=classifier, evaluate=evaluate, seconds=0.2
    )
    assert found.parity < 0.1
    assert found.agreement > 0.8
    assert found.metric == pytest.approx(found.metric_float, abs=0.05)
    assert found.metric_float == pytest.approx(evaluate(classifier), abs=1e-4)
    assert found.bytes < found.bytes_float or found.bytes < 20_000
    assert [row.name for row in found.latency.rows] == ["original", "original int8", "float", "int8"]
    assert found.path.read_bytes()[:4] != b""
    assert any("Quantize" in node.op_type for node in __import__("onnx").load(found.path).graph.node)
    assert json.loads(json.dumps(found.to_dict()))["path"] == str(found.path)
    assert "the same class in" in found.summary()


def test_int8_refuses_what_it_cannot_do(classifier, tmp_path):
    path = cpd.export_onnx(classifier, torch.randn(1, 3, 16, 16), tmp_path / "model.onnx")
    with pytest.raises(cpd.InputError, match="does not exist"):
        cpd.quantize_onnx(path, batches(), tmp_path / "missing" / "int8.onnx")
    with pytest.raises(cpd.InputError, match="calibration"):
        cpd.quantize_onnx(path, batches(), tmp_path / "int8.onnx", calibration="guess")
    with pytest.raises(cpd.InputError, match="cannot be read"):
        cpd.quantize_onnx(tmp_path / "none.onnx", batches(), tmp_path / "int8.onnx")
    with pytest.raises(cpd.TrainingError):
        cpd.quantize_onnx(path, [], tmp_path / "int8.onnx")
    assert not (tmp_path / "int8.onnx").exists()


def test_an_onnx_model_as_a_module_takes_any_batch(classifier, tmp_path):
    for samples in (1, 3):
        content = cpd.export_onnx(classifier, torch.randn(samples, 3, 16, 16))
        images = torch.randn(7, 3, 16, 16)
        assert torch.allclose(cpd.OnnxModule(content)(images), classifier(images), atol=1e-4)
