"""ONNX export, and its parity with PyTorch."""

import math
import os
import warnings
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from cpd.deploy.export import export_bytes, export_onnx, onnx_parity, open_session
from cpd.deploy.latency import compare_latency
from cpd.errors import ExportError, InputError
from cpd.model.inputs import as_call
from helpers.exports import BehavesOtherwiseWhenExported, conv_net, randomise


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


class BranchesOnValues(nn.Module):
    def forward(self, image):
        warnings.warn("seen by nobody", stacklevel=2)
        return 2 * image if image.sum() > 0 else -image


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

    with pytest.raises(ExportError, match=r"cannot translate the operator \w+\.digamma to ONNX.*Replace it by"):
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
    with pytest.raises(InputError, match=r"has shape \[2, 3, 32, 32\], but the example input has \[1, 3, 32, 32\]"):
        onnx_parity(net, exported, image[:1])
    with pytest.raises(InputError, match=r"takes 1 inputs.*but example_inputs hold 2 tensors"):
        onnx_parity(net, exported, (image, image))
    with pytest.raises(InputError, match="cannot run the model on these inputs"):
        onnx_parity(net, exported, image.double())
    with pytest.raises(InputError, match="cannot open"):
        onnx_parity(net, exported.with_name("missing.onnx"), image)
    with pytest.raises(InputError, match="cannot open the serialised model"):
        onnx_parity(net, b"no model", image)
    with pytest.raises(ExportError, match=r"shapes \[\(2, 5\)\], but PyTorch returns \[\(2, 16\)\]"):
        onnx_parity(net[:-1], exported, image)
