"""Models in types of numbers that ONNX Runtime has no kernels of: a result without ONNX, never a lost one."""

import pytest
import torch
from torch import nn

import cpd
from cpd.deploy.export import check_runs
from cpd.deploy.latency import LatencyProbe
from cpd.model.inputs import Call


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 4, 1))
    return nn.Sequential(*layers).eval().to(dtype)


def images(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_that_onnx_runtime_cannot_run_is_compressed_without_onnx(dtype, tmp_path):
    data = [(images(dtype), torch.randint(4, (2, 4, 4)))]
    found = cpd.compress(network(dtype), target_macs=0.6, data=data, epochs=1, progress=False)
    assert found.model[0].weight.dtype == dtype
    assert found.report.result.macs <= 0.6 * found.report.original.macs
    assert found.speedup is None
    assert any("no ONNX model and no latency: ONNX Runtime cannot" in note for note in found.report.notes)
    saved = {file.name for file in found.save(tmp_path).iterdir()}
    assert "model.safetensors" in saved
    assert "model.onnx" not in saved


@pytest.mark.parametrize("options", [{"target_speedup": 1.5}, {"target_macs": 0.6, "normalization": "latency"}])
def test_what_is_measured_on_such_a_model_is_refused_before_any_work(options, monkeypatch):
    monkeypatch.setattr("cpd.jobs.compress.comb", None)
    with pytest.raises(cpd.errors.InputError, match=r"in bfloat16, .*model\.float\(\).*target_macs"):
        cpd.compress(network(torch.bfloat16), example_inputs=images(torch.bfloat16), **options)
    with pytest.raises(cpd.errors.InputError, match="in bfloat16, so its latency"):
        cpd.Pruner(network(torch.bfloat16), images(torch.bfloat16), steps=1, **options)


def test_double_precision_is_refused_where_an_operator_has_none():
    check_runs(nn.Linear(4, 4).double(), Call((torch.randn(1, 4).double(),), {}))
    with pytest.raises(cpd.errors.InputError, match="in float64"):
        check_runs(network(torch.float64), Call((images(torch.float64),), {}))


def test_a_timing_that_fails_loses_nothing_but_itself(monkeypatch):
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(LatencyProbe, "compare", fails)
    found = cpd.compress(network(torch.float32), target_macs=0.6, example_inputs=images(torch.float32), progress=False)
    assert found.speedup is None
    assert any("no latency: RuntimeError: no such kernel." in note for note in found.report.notes)
