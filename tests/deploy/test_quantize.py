"""INT8: how near it is to the float model, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import cpd


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


class Sum(nn.Module):
    """Takes two inputs."""

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return left + right


def test_an_original_of_other_inputs_is_told(classifier, tmp_path):
    images = torch.randn(1, 3, 16, 16)
    model, other = cpd.export_onnx(classifier, images), cpd.export_onnx(Sum(), (images, images))
    with pytest.raises(cpd.InputError, match="takes 2 inputs"):
        cpd.quantize_onnx(model, batches(1), tmp_path / "int8.onnx", original=other, seconds=0.1)
    assert not list(tmp_path.iterdir())


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
    assert "the class is the same for" in found.summary()


def test_dynamic_quantization_has_its_own_line(classifier, tmp_path):
    torch.manual_seed(1)
    head = nn.Sequential(nn.Flatten(), nn.Linear(768, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    path = cpd.export_onnx(head, torch.randn(1, 3, 16, 16), tmp_path / "model.onnx")
    found = cpd.quantize_onnx(path, batches(), tmp_path / "int8.onnx", original=head, dynamic=True, seconds=0.2)
    assert found.parity < 0.1
    assert found.bytes < found.bytes_float / 2
    rows = [row.name for row in found.latency.rows]
    assert rows == ["original", "original int8 dynamic", "float", "int8 dynamic"]
    assert any("Dynamic" in node.op_type for node in __import__("onnx").load(found.path).graph.node)


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
