"""Models that are wrapped, compiled or quantized: worked on as they are within, or refused with the way out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization

import cpd
from cpd.model.inputs import check_model
from cpd.surgery.masked import masked_error

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions"),
    pytest.mark.filterwarnings("ignore:.*reduce_range"),
]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1), nn.Flatten(), nn.Linear(144, 8), nn.Linear(8, 2))
    return nn.Sequential(*layers).eval()


# Refused


def prepared_for_training() -> nn.Module:
    model = net().train()
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    return quantization.prepare_qat(model)


def observed() -> nn.Module:
    model = nn.Sequential(quantization.QuantStub(), net(), quantization.DeQuantStub()).eval()
    model.qconfig = quantization.get_default_qconfig("x86")
    return quantization.prepare(model)


def integers() -> nn.Module:
    model = observed()
    model(X)
    return quantization.convert(model)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "scripted": (lambda: torch.jit.script(net()), "torch.jit.script or torch.jit.trace: pass the Python module"),
    "traced": (lambda: torch.jit.trace(net(), X), "TopLevelTracedModule is compiled by"),
    "one part": (lambda: nn.Sequential(nn.ReLU(), torch.jit.trace(net(), X)), "Sequential holds 1, which is compiled"),
    "weights": (lambda: quantization.quantize_dynamic(net(), {nn.Linear}), "holds 4, which is quantized.*float model"),
    "all": (integers, "which is quantized, its weights are packed integers"),
    "observed": (observed, "which is prepared for quantization"),
    "trained": (prepared_for_training, "which is prepared for quantization .* pass the float model"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_forward_in_python_and_in_floating_point_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch):
    make, words = REFUSED[kind]
    model = make()
    monkeypatch.setattr("cpd.coupling.comb.trace", None)
    for use in (
        lambda: cpd.comb(model, X),
        lambda: cpd.compress(model, target_macs=0.5, example_inputs=X),
        lambda: cpd.Pruner(model, X, target_macs=0.5, steps=1),
        lambda: cpd.export_onnx(model, X),
    ):
        with pytest.raises(cpd.TraceError, match=words):
            use()


@pytest.mark.parametrize("model", [nn.DataParallel(net())])
def test_a_wrapper_for_several_devices_names_the_model_within(model: nn.Module):
    with pytest.raises(cpd.InputError, match=r"pass the inner model, model\.module"):
        cpd.comb(model, X)


def test_a_float_model_that_can_be_quantized_is_none_that_is():
    assert cpd.comb(nn.Sequential(quantization.QuantStub(), net(), quantization.DeQuantStub()), X).open


# Unwrapped


class Compiled(nn.Module):
    """Holds what is compiled in each of three ways."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3)
        self.first.compile()
        self.second = torch.compile(nn.Conv2d(16, 16, 1))
        self.last = nn.Conv2d(16, 4, 1)
        self.between = torch.compile(torch.relu)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.between(self.first(x))))


def test_what_is_compiled_runs_as_it_is_written_while_it_is_looked_at():
    model = Compiled().eval().double()
    combed = cpd.comb(model, X.double())
    assert [group.size for group in combed.open] == [16, 16]
    plan = combed.plan({group.name: range(5) for group in combed.open})
    fresh = Compiled().eval().double()
    fresh.load_state_dict(model.state_dict())
    assert masked_error(model, cpd.shrink(fresh, plan), combed, plan) < 1e-12


def test_a_compiled_model_is_worked_on_as_the_module_within():
    plain = net()
    model = torch.compile(plain)
    assert check_model(model) is plain
    combed = cpd.comb(model, X)
    assert [group.name for group in combed.groups] == [group.name for group in cpd.comb(plain, X).groups]
    result = cpd.compress(model, target_macs=0.5, example_inputs=X, round_to=1, progress=False)
    assert type(result.model) is nn.Sequential
    assert plain[0].out_channels == 16
    scores = cpd.score(model, combed, criterion="magnitude")
    assert scores["0"].shape == (16,)
    pruner = cpd.Pruner(model, X, target_macs=0.5, steps=1, data=[(X, torch.zeros(1).long())], round_to=1)
    pruner.prune()
    assert pruner.model is plain
    assert plain[0].out_channels < 16


def test_shrink_returns_the_compiled_model_that_it_was_given():
    model = torch.compile(net())
    narrow = cpd.shrink(model, cpd.comb(model, X).plan({"0": range(8)}))
    assert narrow is model
    assert check_model(narrow)[0].out_channels == 8
