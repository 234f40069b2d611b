"""The whole path on tiny models: what comes out, and what is refused."""

from importlib import metadata

import pytest
import torch
from torch import nn

import cpd
from cpd import compress as compress_function
from cpd.deploy.latency import LatencyComparison
from cpd.jobs.outcome import call_record, missed
from cpd.selection.target import Target
from helpers.tiny import INPUT, Tiny, compressed, loader


class Fixed(nn.Module):
    def forward(self, x):
        return x * 2


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    torch.manual_seed(0)
    model = Tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folder = tmp_path_factory.mktemp("out") / "new"
    found = compressed(model, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    return model, found, folder


def test_result_is_the_same_class_and_narrower(result):
    model, found, _ = result
    assert type(found.model) is Tiny
    assert found.report.result.macs <= 0.5 * found.report.original.macs
    assert found.report.result.parameters == sum(p.numel() for p in found.model.parameters())
    assert found.report.original.parameters == sum(p.numel() for p in model.parameters())
    assert found.speedup == found.report.latency["speedup"] > 0


def test_what_is_printed_is_a_line(result):
    _, found, _ = result
    for shown in (found, found.report, found.plan, cpd.comb(Tiny().eval(), INPUT)):
        assert repr(shown).startswith(f"{type(shown).__name__}(")
        assert len(repr(shown)) < 400
        assert "\n" not in repr(shown)
    assert "Tiny: " in repr(found)
    assert " -> " in repr(found)


def test_report_says_what_was_done(result):
    _, found, _ = result
    assert found.report.criterion == "obs"
    assert found.report.normalization == "macs"
    assert found.report.checks["masked equals shrunk"] < 1e-4
    assert [entry["epoch"] for entry in found.report.history] == [0, 1]
    assert found.report.call["target_macs"] == 0.5
    assert {name: name for name in ("data", "evaluate")}.items() <= found.report.call.items()
    assert "teacher" not in found.report.call
    assert found.report.original.metric == 0.0  # evaluated in eval mode


def test_a_report_says_why_weights_alone_decided():
    asked = {"target_macs": 0.5, "example_inputs": INPUT}
    assert cpd.compress(Tiny(), **asked).report.criterion_reason == "the default without data"
    assert cpd.compress(Tiny(), criterion="magnitude", **asked).report.criterion_reason == "as requested"
    found = cpd.compress(Tiny(), max_drop=0.1, evaluate=lambda model: 1.0, example_inputs=INPUT)
    assert found.report.criterion_reason == "the default without data"


def test_a_report_keeps_the_arguments_that_are_not_usual(tmp_path):
    usual = cpd.PruneConfig(target_macs=0.5, round_to=None, schedule=cpd.Schedule("one-shot"))
    assert call_record(usual, cpd.DistillConfig(), {"data": None}, None) == {"target_macs": 0.5, "seed": 0}
    other = cpd.PruneConfig(schedule=cpd.Schedule("cubic", end=0.6), threads=2, latency_inputs=(INPUT,))
    found = call_record(other, cpd.DistillConfig(epochs=2, kd="cwd"), {"data": []}, tmp_path)
    assert found == {
        "schedule": "cubic", "prune_until": 0.6, "threads": 2, "seed": 0, "epochs": 2, "training": {"kd": "cwd"},
        "output_dir": str(tmp_path), "data": "data", "latency_inputs": "latency_inputs",
    }  # fmt: skip
    linear = cpd.PruneConfig(schedule="linear")
    assert call_record(linear, cpd.DistillConfig(), {}, None) == {"schedule": "linear", "seed": 0}


def test_a_last_timing_outside_the_tolerance_is_told():
    found = LatencyComparison(1.5, 3.0, 2.0, 1.49, 1.51, 3.1, 2.1, 30, 1, {})
    assert missed(Target("target_speedup", 1.55), found, 0.05) is None
    assert "target_speedup=1.7; the final timing gave a speed-up of 1.50 " in missed(
        Target("target_speedup", 1.7), found, 0.05
    )
    assert missed(Target("target_latency_ms", 2.05), found, 0.05) is None
    assert "2 ms" in missed(Target("target_latency_ms", 1.8), found, 0.05)
    assert missed(Target("target_macs", 0.5), found, 0.05) is None


def test_report_tells_of_layers_nodes_and_shrinks(result):
    original, found, _ = result
    report = found.report
    before = {name: module for name, module in original.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert {row.name for row in report.layers} == set(before)
    for row in report.layers:
        was, now = before[row.name], found.model.get_submodule(row.name)
        widths = [getattr(item, "out_channels", None) or item.out_features for item in (was, now)]
        assert [row.before, row.after] == widths
    assert any(row.after < row.before for row in report.layers)
    assert sum(node["before_ms"] or 0 for node in report.nodes) > 0
    assert sum(node["after_ms"] or 0 for node in report.nodes) > 0
    assert [(row["epoch"], row["share"]) for row in report.shrinks] == [(0.0, 1.0)]


def test_same_seed_same_plan():
    torch.manual_seed(0)
    model = Tiny()
    plans = [cpd.compress(model, target_macs=0.6, data=loader(), epochs=0, seed=3).plan for _ in range(2)]
    assert plans[0].to_dict() == plans[1].to_dict()


def test_measured_target_ends_on_a_measured_speedup():
    torch.manual_seed(0)
    model = Tiny(width=128)
    found = cpd.compress(model, target_speedup=2, example_inputs=torch.randn(1, 3, 32, 32))
    assert found.report.search
    assert found.speedup > 1.5
    assert found.report.result.macs < found.report.original.macs


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"model": "resnet18"}, cpd.InputError, "torch.nn.Module"),
        ({"target_speedup": 0.5}, cpd.InputError, "at least 1"),
        ({"target_speedup": "fast"}, cpd.InputError, "must be a number"),
        ({"target_speedup": float("nan")}, cpd.InputError, "must be a number"),
        ({"target_speedup": None}, cpd.InputError, "exactly one target"),
        ({"target_macs": 0.5}, cpd.InputError, "exactly one target"),
        ({"example_inputs": torch.randn(1, 5, 16, 16)}, cpd.InputError, "fails on the example inputs"),
        ({"example_inputs": None}, cpd.InputError, "example_inputs="),
        ({"example_inputs": "image"}, cpd.InputError, "must be a tensor"),
        ({"data": []}, cpd.TrainingError, "no batch"),
        ({"data": iter(loader())}, cpd.InputError, "only once"),
        ({"data": loader(), "loss": lambda out, y: out.mean() * float("nan")}, cpd.TrainingError, "nan"),
        ({"data": [(torch.randn(2, 9), torch.zeros(2).long())]}, cpd.InputError, "first batch"),
        ({"round_to": 0}, cpd.InputError, "round_to"),
        ({"criterion": "beauty"}, cpd.InputError, "criterion"),
        ({"epochs": -1}, cpd.InputError, "epochs"),
    ],
)
def test_bad_input_is_refused_and_nothing_changes(arguments, error, words):
    torch.manual_seed(0)
    model = Tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=words) as caught:
        compress_function(**{"model": model, "target_speedup": 2, "example_inputs": INPUT, **arguments})
    assert isinstance(caught.value, cpd.CPDError)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training


def test_output_dir_that_is_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(cpd.InputError, match="is a file"):
        cpd.compress(Tiny(), target_speedup=2, example_inputs=INPUT, output_dir=path)
    assert path.read_text() == "mine"


def test_output_dir_under_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(cpd.InputError, match="cannot be written"):
        cpd.compress(Tiny(), target_speedup=2, example_inputs=INPUT, output_dir=path / "below")


def test_nothing_to_prune_says_why():
    with pytest.raises(cpd.NothingToPruneError, match="the model's output"):
        cpd.compress(nn.Linear(4, 3), target_speedup=2, example_inputs=torch.randn(1, 4))
    with pytest.raises(cpd.NothingToPruneError):
        cpd.compress(Fixed(), target_speedup=2, example_inputs=torch.randn(1, 4))


def test_unreachable_cost_gives_the_best_figure():
    with pytest.raises(cpd.TargetError, match="narrowest widths allowed leave"):
        cpd.compress(Tiny(), target_macs=0.0001, example_inputs=INPUT)


def test_unreachable_speedup_gives_the_best_figure():
    with pytest.raises(cpd.TargetError, match=r"cannot be reached.*times as fast"):
        cpd.compress(Tiny(), target_speedup=1000, example_inputs=INPUT)


def test_a_result_is_not_lost_where_packages_have_no_metadata(monkeypatch):
    """cpd may run from its sources, and ONNX Runtime is installed under several names."""
    known = metadata.Distribution.from_name

    def from_name(name):
        if name in ("cpd", "onnxruntime", "onnx"):
            raise metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(metadata.Distribution, "from_name", from_name)
    found = cpd.compress(Tiny(), target_macs=0.7, example_inputs=INPUT)
    assert {"torch", "onnxruntime"} <= found.report.environment.keys()
    assert not {"cpd", "onnx"} & found.report.environment.keys()


def test_public_names():
    assert set(cpd.__all__) == {
        "ArtifactError", "Branch", "CPDError", "Comb", "DistillConfig", "ExportError", "Group", "InputError",
        "LatencyComparison", "NothingToPruneError", "Plan", "PlanError", "Pruner", "Report", "Result", "Schedule",
        "Sensitivity", "ShrinkError", "TargetError", "CheckpointError", "PruneConfig",
        "TraceError", "TrainingError", "comb", "compare_latency", "compensate", "compress", "distill", "export_onnx",
        "load", "score", "sensitivity", "shrink", "LatencyTable", "ModelProfile", "OnnxModule", "Quantized", "Sweep",
        "Family", "Member",
        "from_pretrained", "measure_latency", "profile_model", "quantize_onnx", "sweep", "Masks", "SparseConfig",
        "SparseResult", "Sparsifier", "Task", "family", "get_sparsity", "mask", "sparsify",
    }  # fmt: skip
    assert all(hasattr(cpd, name) for name in cpd.__all__)
    assert all(issubclass(getattr(cpd, name), cpd.CPDError) for name in cpd.__all__ if name.endswith("Error"))
