"""Runtimes and precisions: parity, profiles and kernels in the runtime itself, targets that are met there."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import cpd
from cpd.deploy.export import export_bytes, open_session, run_session
from cpd.deploy.int8 import dynamic_onnx, quantized_onnx, samples_of
from cpd.deploy.kernels import Convolution, KernelTimes, MatrixProduct
from cpd.deploy.latency import LatencyProbe
from cpd.deploy.latency_model import LatencyModel, _assigned
from cpd.deploy.profiling import NodeTime, channels_second
from cpd.deploy.runtimes.base import Artifact, check_outputs, is_quantized, profiles
from cpd.deploy.runtimes.catalogue import RUNTIMES, grain_of, installed, names_of, others_installed, runtimes_of
from cpd.deploy.runtimes.device import Device
from cpd.deploy.runtimes.onnx_runtime import OnnxRuntime
from cpd.deploy.workload import workload
from cpd.model.inputs import as_call
from helpers.exports import BehavesOtherwiseWhenExported

IMAGE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
PRECISIONS = [
    name for name in RUNTIMES if name not in ("torch", "torch.compile", "onnxruntime:cuda", "onnxruntime:tensorrt")
]


def net(width: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, groups=width), nn.ReLU(), nn.Conv2d(width, 2 * width, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10),
    ).eval()  # fmt: skip


def runtime(name: str) -> Any:
    if (package := RUNTIMES[name].package) is not None:
        pytest.importorskip(package)
    (found,) = runtimes_of(name, 1)
    return found


# ---------------------------------------------------------------------------------- every runtime


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_runtime_computes_what_pytorch_does(name):
    found = runtime(name)
    assert (found.name, found.threads) == (name, 1)
    assert found.version
    session = found.prepare(Artifact(net(), as_call(IMAGE)))
    assert session.difference is not None
    assert session.difference < (0.2 if found.precision != "f32" else 1e-4)
    assert session.run() is not None


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_model_that_is_converted_wrongly_is_never_timed(name, monkeypatch):
    found, artifact = runtime(name), Artifact(net(), as_call(IMAGE))
    monkeypatch.setitem(artifact.__dict__, "expected", [torch.randn(1, 10).numpy() * 100])
    with pytest.raises(cpd.ExportError, match="outputs differ from PyTorch's"):
        found.prepare(artifact)
    monkeypatch.setitem(artifact.__dict__, "expected", [torch.randn(1, 11).numpy()])
    with pytest.raises(cpd.ExportError, match="outputs of shapes"):
        found.prepare(artifact)


@pytest.mark.parametrize("name", [name for name in PRECISIONS if RUNTIMES[name].package is not None])
def test_a_package_that_is_missing_is_named_by_its_extra(name, monkeypatch):
    entry = RUNTIMES[name]
    monkeypatch.setitem(__import__("sys").modules, str(entry.package), None)
    extra = "opencv" if entry.package == "cv2" else str(entry.package).lower()
    with pytest.raises(cpd.InputError, match=rf"cpd\[{extra}\]"):
        cpd.measure_latency({"a": net()}, IMAGE, runtime=name)


def test_an_export_that_computes_something_else_is_told_in_the_runtime():
    with pytest.raises(
        cpd.ExportError, match=r"ONNX Runtime's outputs differ from PyTorch's by .* at most 1\.0e-03 is allowed"
    ):
        cpd.compare_latency(BehavesOtherwiseWhenExported(), net(), torch.randn(2, 3, 32, 32))
    artifact = Artifact(net(), as_call(IMAGE))
    with pytest.raises(cpd.ExportError, match="pass data"):
        check_outputs([np.full((1, 10), np.nan, np.float32)], artifact, "A runtime", "int8")


def test_names_are_read_without_loading_anything():
    assert names_of("openvino:int8, torch") == ("openvino:int8", "torch")
    assert names_of(["openvino", Device(len, "board")]) == ("openvino", "board")
    assert (grain_of("openvino"), grain_of(["openvino", "onnxruntime:int8"]), grain_of(Device(len, grain=4))) == (
        8,
        16,
        4,
    )
    assert {"onnxruntime", "torch"} <= set(installed())
    assert cpd.PruneConfig(runtime="onnxruntime:int8").limits.round_to == 16
    assert cpd.PruneConfig(runtime="onnxruntime:int8", round_to=4).limits.round_to == 4
    assert cpd.PruneConfig(runtime=Device(len, "board")).settings()["runtime"] == "board"


# ---------------------------------------------------------------------------------- profiles and kernels


@pytest.mark.parametrize(
    "name", ["onnxruntime", "onnxruntime:int8", "openvino", "openvino:bf16", "openvino:int8", "opencv"]
)
def test_nodes_and_kernels_are_timed_in_the_runtime(name, tmp_path):
    found, model = runtime(name), net()
    assert profiles(found)
    combed = cpd.comb(model, IMAGE)
    nodes = found.profile(Artifact(model, as_call(IMAGE)), seconds=0.05)
    shares = _assigned(nodes, workload(combed.context))
    assert sum(len(share.contractions) for share in shares) == 4  # three convolutions and the head
    times = KernelTimes(path=tmp_path / "kernels.json", runtime=found)
    latency = LatencyModel(combed, nodes, times)
    half = {group.axis: group.size // 2 for group in combed.open}
    assert 0 < latency.milliseconds(half) < 2 * latency.milliseconds({})
    wide, narrow = (
        Convolution(1, 1, 128, 128, (14, 14), (3, 3), (1, 1), (1, 1), (1, 1)),
        MatrixProduct(1, 4, 16, 16, True),
    )
    attention = MatrixProduct(2, 49, 16, 49, False)
    times.measure([wide, narrow, attention])
    assert times[wide] > times[narrow]
    assert all(times[kernel] > 0 for kernel in (wide, narrow, attention))


def test_times_of_kernels_are_kept_by_runtime_precision_and_version(monkeypatch, tmp_path):
    monkeypatch.setenv("CPD_CACHE_DIR", str(tmp_path))
    other = type("Newer", (OnnxRuntime,), {"version": "99"})
    paths = {KernelTimes(runtime=each).path for each in (OnnxRuntime(), OnnxRuntime(precision="int8"), other())}
    assert len(paths) == 3
    assert KernelTimes(2).path == KernelTimes(1).path  # threads are part of the keys within


def test_channels_that_lie_innermost_are_put_second():
    scales = ((), (), (64,), (64,), (), ())
    convolution = NodeTime("a", "QLinearConv", ((1, 28, 28, 32), *scales), ((1, 14, 14, 64),), 1.0)
    other = NodeTime("b", "QLinearAdd", ((1, 14, 14, 64),), ((1, 14, 14, 64),), 1.0)
    found = channels_second([convolution, other])
    assert (found[0].inputs, found[0].outputs) == (((1, 32, 28, 28),), ((1, 64, 14, 14),))
    assert found[1] == other
    square = NodeTime("c", "QLinearConv", ((1, 64, 32, 64), *scales), ((1, 64, 64, 64),), 1.0)  # not to be told alone
    assert channels_second([convolution, square])[1].inputs == ((1, 64, 64, 32),)
    plain = NodeTime("d", "QLinearConv", ((1, 32, 28, 28), *scales), ((1, 64, 14, 14),), 1.0)
    assert channels_second([plain])[0].outputs == plain.outputs


def test_operators_side_by_side_become_operators_of_8_bits():
    times = KernelTimes(runtime=OnnxRuntime(precision="int8"), path=Path(os.devnull))
    nodes = list[NodeTime]()

    class Spy(OnnxRuntime):
        def kernels(self, model: bytes, feeds: Any, seconds: float) -> list[NodeTime]:
            nodes.extend(OnnxRuntime(precision="int8").kernels(model, feeds, seconds))
            return nodes

    times.runtime = Spy(precision="int8")
    times.measure(
        [Convolution(1, 1, 32, 32, (8, 8), (3, 3), (1, 1), (1, 1), (1, 1)), MatrixProduct(1, 4, 16, 16, True)]
    )
    assert sum(node.op == "QLinearConv" for node in nodes) == 4  # three of them the unit
    assert any("MatMul" in node.op and node.op != "MatMul" for node in nodes)


# ---------------------------------------------------------------------------------- INT8


def test_a_quantized_model_is_taken_as_it_is():
    content = export_bytes(net(), as_call(IMAGE))
    session = open_session(content)
    calls = [as_call(torch.randn(5, 3, 32, 32)), as_call(torch.randn(5, 3, 32, 32))]
    samples = samples_of(session, iter(calls), most=7)
    assert len(samples) == 7
    assert len(samples_of(session, calls)) == 10
    int8 = quantized_onnx(content, samples)
    assert is_quantized(int8)
    assert not is_quantized(content)
    assert Artifact(int8, as_call(IMAGE)).int8 is int8


def test_dynamic_quantization_is_of_matrix_products():
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).eval()
    x = torch.randn(4, 64)
    content = export_bytes(mlp, as_call(x))
    made = dynamic_onnx(content)
    kinds = {node.op_type for node in onnx.load_from_string(made).graph.node}
    assert "DynamicQuantizeLinear" in kinds
    session = open_session(made)
    (found,) = run_session(session, {session.get_inputs()[0].name: x.numpy()})
    assert np.abs(found - mlp(x).detach().numpy()).max() < 0.05 * np.abs(found).max()


# ---------------------------------------------------------------------------------- a device


def stand_in(paths: list[str]) -> list[float]:
    """Times by the size of the file, as a board that runs nothing else would have them."""
    return [Path(path).stat().st_size / 1e4 for path in paths]


def test_a_device_is_given_original_and_candidate_together():
    asked = list[list[str]]()

    def measure(paths: list[str]) -> list[float]:
        asked.append([Path(path).name for path in paths])
        return stand_in(paths)

    wide, narrow = net(64), net(16)
    probe = LatencyProbe(wide, IMAGE, runtime=measure)
    found = probe.compare(narrow, seconds=0.1)
    assert found.speedup > 2
    assert (found.runtime, found.runs, found.difference) == ("measure", 6, None)
    assert asked == [["f32.onnx"] * 2] * 6
    assert probe.compare(narrow, seconds=0.1) == found  # the same file: it is not asked again
    assert len(asked) == 6
    assert probe.spread() == 0.0
    assert LatencyProbe(wide, IMAGE).spread() is None
    assert not probe.is_profiled
    assert probe.profiler.name == "onnxruntime"


def test_a_function_of_one_path_is_called_in_turn():
    asked = list[str]()

    def measure(path: str) -> float:
        asked.append(path)
        return stand_in([path])[0]

    device = Device(measure, "board", one_at_a_time=True, version="3")
    found = cpd.compare_latency(net(64), net(16), IMAGE, runtime=device, seconds=0.1)
    assert found.speedup > 2
    assert found.environment["board"] == "3"
    assert asked[:4] == [*asked[:2], *asked[:2]]
    assert len(set(asked)) == 2


@pytest.mark.parametrize(
    "wrong", [lambda paths: 3.0, lambda paths: [1.0], lambda paths: [0.0] * len(paths), lambda paths: None]
)
def test_what_is_no_time_is_told(wrong):
    with pytest.raises(cpd.InputError, match="must return one time in ms above 0 for each of 2 files"):
        cpd.compare_latency(net(), net(8), IMAGE, runtime=wrong)


def test_files_of_a_device_are_gone_with_the_model():
    artifact = Artifact(net(), as_call(IMAGE))
    path = artifact.path()
    assert path.exists()
    del artifact
    assert not path.parent.exists()


# ---------------------------------------------------------------------------------- targets


def deep() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4)).eval()


def test_a_target_is_met_on_a_device(tmp_path):
    """Its times follow no kernel of this machine: what is measured corrects the prediction."""

    def measure(paths: list[str]) -> list[float]:
        return [sum(np.prod(item.dims) for item in onnx.load(path).graph.initializer) / 1e4 for path in paths]

    torch.manual_seed(0)
    result = cpd.compress(deep(), target_speedup=2, example_inputs=IMAGE, runtime=measure)
    assert result.speedup == pytest.approx(2, rel=0.05)
    latency = result.report.latency
    assert latency is not None
    assert latency["runtime"] == "measure"
    assert any("disagrees with itself" in note for note in result.report.notes)
    assert "measure latency" in result.report.model_card()
    assert result.report.call["runtime"] == "measure"


def test_a_target_of_8_bits_is_met_in_8_bits_and_its_accuracy_is_theirs(tmp_path):
    batches = [(torch.randn(8, 3, 32, 32), torch.randint(4, (8,))) for _ in range(2)]
    seen = list[str]()

    def evaluate(model: nn.Module) -> float:
        seen.append(type(model).__name__)
        return float(torch.cat([model(images).argmax(1).eq(labels) for images, labels in batches]).float().mean())

    result = cpd.compress(
        deep(), target_speedup=1.3, data=batches, epochs=0, evaluate=evaluate, runtime="onnxruntime:int8", tolerance=0.3
    )
    assert seen[-2:] == ["OnnxModule", "OnnxModule"]
    assert any("those of the INT8 models. In float, the unpruned" in note for note in result.report.notes)
    assert "ONNX Runtime (int8) latency" in result.report.model_card()
    folder = result.save(tmp_path / "out")
    assert is_quantized((folder / "model.int8.onnx").read_bytes())
    assert not is_quantized((folder / "model.onnx").read_bytes())
    assert result.report.environment["onnxruntime:int8"]


def test_of_several_runtimes_the_slowest_counts():
    def board(paths: list[str]) -> list[float]:
        return [10.0 * len(paths)] * len(paths)

    found = LatencyProbe(net(64), IMAGE, runtime=["onnxruntime", board]).compare(net(16), seconds=0.2, min_runs=6)
    assert (found.runtime, found.speedup) == ("board", 1.0)


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs openvino")
def test_a_target_is_met_in_openvino():
    result = cpd.compress(deep(), target_speedup=1.5, example_inputs=IMAGE, runtime="openvino", tolerance=0.3)
    assert result.report.latency is not None
    assert result.report.latency["runtime"] == "openvino"
    assert result.report.environment["openvino"]
    assert "OpenVINO latency" in result.report.model_card()


def by_weights(paths: list[str]) -> list[float]:
    """A board whose times follow the number of weights."""
    return [float(sum(np.prod(item.dims) for item in onnx.load(path).graph.initializer)) for path in paths]


@pytest.fixture
def slower_at_last(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """From the first last timing on all results are slower by 15 %; what was timed."""
    compare, seen = LatencyProbe.compare, list[float]()

    def compared(self: LatencyProbe, candidate: Any, **options: Any) -> Any:
        found = compare(self, candidate, **options)
        seen.append(options["precision"])
        if 0.01 not in seen:  # that of the last timing
            return found
        return replace(found, speedup=0.85 * found.speedup, candidate_ms=found.candidate_ms / 0.85)

    monkeypatch.setattr(LatencyProbe, "compare", compared)
    return seen


def arguments(**given: Any) -> dict[str, Any]:
    data = [(torch.randn(8, 3, 32, 32), torch.randint(4, (8,))) for _ in range(2)]
    common = {"runtime": by_weights, "tolerance": 0.04, "scope": "global", "branches": False, "round_to": 1}
    return {"target_speedup": 2, "data": data, **common, **given}


def test_where_nothing_was_trained_the_search_goes_on_from_the_last_timing(slower_at_last):
    result = cpd.compress(deep(), epochs=0, **arguments())
    assert slower_at_last.count(0.01) == 2
    assert result.speedup == pytest.approx(2, rel=0.04)
    assert not any("the final timing gave" in note for note in result.report.notes)
    assert sum("Recovery without training" in note for note in result.report.notes) <= 1


def test_where_something_was_trained_a_note_says_what_would_meet_the_target(slower_at_last):
    result = cpd.compress(deep(), epochs=1, **arguments())
    assert slower_at_last.count(0.01) == 1
    assert result.speedup == pytest.approx(1.7, rel=0.04)
    missed, told = [note for note in result.report.notes if "final timing" in note]
    assert "the final timing gave a speed-up of 1.7" in missed
    assert "of the MACs would meet the target. These widths would differ: 0 " in told


def test_the_same_result_is_shown_in_every_installed_runtime(monkeypatch, tmp_path):
    assert "onnxruntime" in others_installed(by_weights)
    assert "onnxruntime" not in others_installed("onnxruntime")
    assert "onnxruntime:int8" in others_installed("openvino:int8")
    assert not {"torch", "torch.compile", "onnxruntime:int8", "onnxruntime:cuda"} & {*others_installed("openvino")}
    monkeypatch.setattr("cpd.jobs.compress.others_installed", lambda given: ["onnxruntime", "onnxruntime:cuda"])
    report = cpd.compress(deep(), target_speedup=2, example_inputs=IMAGE, runtime=by_weights, tolerance=0.3).report
    assert report.latency is not None
    first, second = report.latency["elsewhere"]
    assert (first["runtime"], first["error"]) == ("onnxruntime", None)
    assert first["speedup"] > 0
    assert "no CUDAExecutionProvider" in second["error"]
    for text in (report.model_card(), report.to_html()):
        assert "in other runtimes" in text.lower()
        assert "CUDAExecutionProvider" in text
    assert cpd.Report.from_dict(report.to_dict()) == report
