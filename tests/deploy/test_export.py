"""ONNX export, its parity with PyTorch, and the latency comparison."""

import json
import math
import os
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from cpd.deploy.export import export_bytes, export_onnx, onnx_parity, open_session
from cpd.deploy.latency import LatencyComparison, LatencyProbe, _rank, compare_latency, median_interval
from cpd.errors import ExportError, InputError
from cpd.model.inputs import as_call


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights at which errors show: random norm weights, biases and running statistics."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: torch.Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                uniform(module.weight, 0.5, 1.5)
                uniform(module.bias, -0.5, 0.5)
                uniform(module.running_mean, -0.5, 0.5)
                uniform(module.running_var, 0.5, 2.0)
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                fan_in = module.weight[0].numel()
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) / math.sqrt(fan_in))
                uniform(module.bias, -0.5, 0.5)
    return model


def conv_net(width: int, depth: int = 2) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(width, 5)]
    return randomise(nn.Sequential(*layers, *head))


class Structured(nn.Module):
    """Keyword inputs, a dict of tuples as output, one entry of it None."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, image, scale=None, double=False):
        features = self.conv(image).relu().mean((2, 3))
        if scale is not None:
            features = features * scale
        if double:
            features = 2 * features
        return {"logits": self.head(features), "aux": (features, None, features.argmax(1))}


class ReadsDict(nn.Module):
    def forward(self, batch):
        return batch["a"] - 2 * batch["b"]


class BehavesOtherwiseWhenExported(nn.Module):
    def forward(self, image):
        return image * 1.1 if torch.compiler.is_exporting() else image


class BranchesOnValues(nn.Module):
    def forward(self, image):
        warnings.warn("seen by nobody", stacklevel=2)
        return image if image.sum() > 0 else -image


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return conv_net(16)


@pytest.fixture(scope="module")
def exported(net: nn.Module, image: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(net, image, tmp_path_factory.mktemp("onnx") / "net.onnx")


def perturbed(path: Path) -> onnx.ModelProto:
    """The model of `path`, its largest weight tensor 10 % off."""
    model = onnx.load(path)
    weight = max(model.graph.initializer, key=lambda tensor: math.prod(tensor.dims))
    values = onnx.numpy_helper.to_array(weight)
    weight.CopyFrom(onnx.numpy_helper.from_array((values * 1.1).astype(values.dtype), weight.name))
    return model


# ---------------------------------------------------------------------------------------------- export


def test_file_is_whole_and_alone(exported: Path, net: nn.Module, image: torch.Tensor):
    assert [item.name for item in exported.parent.iterdir()] == ["net.onnx"]
    onnx.checker.check_model(onnx.load(exported), full_check=True)
    assert onnx_parity(net, exported, image) < 1e-4
    assert onnx_parity(net, str(exported), image) == onnx_parity(net, exported.read_bytes(), image)


def test_file_names_no_source_path(exported: Path):
    content = exported.read_bytes()
    assert Path(__file__).name.encode() not in content
    assert b"site-packages" not in content


def test_model_is_left_as_found(image: torch.Tensor):
    model = conv_net(8).train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_onnx(model, image)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_large_model_keeps_its_weights_beside(
    net: nn.Module, image: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save = torch.onnx.ONNXProgram.save
    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", lambda self, path: save(self, path, external_data=True))
    (tmp_path / "net.onnx").write_bytes(b"old")
    path = export_onnx(net, image, tmp_path / "net.onnx", check=False)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]
    assert onnx_parity(net, path, image) < 1e-4


def test_model_too_large_for_memory_is_refused(image: torch.Tensor):
    with torch.device("meta"):
        model = nn.Linear(2**15, 2**14 + 1)
    with pytest.raises(ExportError, match=r"2\.1 GB of weights.*to a file"):
        export_bytes(model, as_call(image))


def test_bad_paths_are_refused_before_the_export(
    net: nn.Module, image: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_args, **_kwargs):
        pytest.fail("the export was begun")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(InputError, match="is a directory"):
        export_onnx(net, image, tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        export_onnx(net, image, tmp_path / "missing" / "net.onnx")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match="not writable"):
        export_onnx(net, image, tmp_path / "net.onnx")
    with pytest.raises(InputError, match=r"torch\.nn\.Module"):
        export_onnx("net", image)


def test_failed_export_is_explained_and_silent(image: torch.Tensor, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    model = BranchesOnValues().train()
    with pytest.raises(ExportError, match=r"BranchesOnValues: .*data-dependent.*Check that") as caught:
        export_onnx(model, image, tmp_path / "net.onnx")
    assert caught.value.__cause__ is not None
    assert model.training
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------------- parity


def test_an_operator_without_counterpart_is_named():
    class Digamma(nn.Module):
        def forward(self, image):
            return image.digamma()

    with pytest.raises(ExportError, match=r"operator \w+\.digamma has no ONNX counterpart.*Write it with"):
        export_onnx(Digamma(), torch.rand(2, 3) + 1)


def test_keyword_inputs_and_nested_outputs(image: torch.Tensor):
    model, scale = randomise(Structured()), torch.tensor([[3.0], [-2.0]])
    inputs = ((), {"scale": scale, "double": True, "image": image})
    serialised = export_onnx(model, inputs, check=False)
    assert len(open_session(serialised).get_inputs()) == 2
    assert onnx_parity(model, serialised, inputs) < 1e-5
    changed = ((image,), {"scale": 2 * scale, "double": True})
    assert onnx_parity(model, serialised, changed) < 1e-5  # the scale is an input, no constant
    assert onnx_parity(model, serialised, ((), {"scale": scale, "image": image})) > 0.1  # `double` is one
    result = compare_latency(serialised, serialised, inputs, seconds=0.1, min_runs=6)
    assert result.speedup_low <= result.speedup <= result.speedup_high


def test_a_mapping_as_the_only_argument():
    inputs = ({"b": torch.randn(3), "a": torch.randn(3)},)
    assert onnx_parity(ReadsDict(), export_onnx(ReadsDict(), inputs), inputs) < 1e-6


def test_parity_sees_a_wrong_weight(exported: Path, net: nn.Module, image: torch.Tensor):
    assert onnx_parity(net, perturbed(exported), image) > 0.01


def test_export_that_differs_leaves_no_file(image: torch.Tensor, tmp_path: Path):
    with pytest.raises(ExportError, match=r"differ from PyTorch's by 1\.0e-01"):
        export_onnx(BehavesOtherwiseWhenExported(), image, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_parity_is_relative_to_the_largest_value(image: torch.Tensor):
    model = BehavesOtherwiseWhenExported()
    serialised = export_onnx(model, image, tolerance=0.11)
    for scale in (1e-6, 1.0, 1e6):
        assert onnx_parity(model, serialised, scale * image) == pytest.approx(0.1, rel=1e-5)
    assert onnx_parity(model, serialised, torch.zeros_like(image)) == 0


def test_parity_refuses_what_does_not_fit(exported: Path, net: nn.Module, image: torch.Tensor):
    with pytest.raises(InputError, match=r"has shape \[2, 3, 32, 32\].*has \[1, 3, 32, 32\]"):
        onnx_parity(net, exported, image[:1])
    with pytest.raises(InputError, match=r"takes 1 inputs.*hold 2 tensors"):
        onnx_parity(net, exported, (image, image))
    with pytest.raises(InputError, match="cannot run the model on these inputs"):
        onnx_parity(net, exported, image.double())
    with pytest.raises(InputError, match="cannot open"):
        onnx_parity(net, exported.with_name("missing.onnx"), image)
    with pytest.raises(InputError, match="cannot open the serialised model"):
        onnx_parity(net, b"no model", image)
    with pytest.raises(ExportError, match=r"shapes \[\(2, 5\)\], PyTorch \[\(2, 16\)\]"):
        onnx_parity(net[:-1], exported, image)


# --------------------------------------------------------------------------------------------- latency


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
    assert probe.compare(content, seconds=60.0, min_runs=8, precision=5.0).runs == 8
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
