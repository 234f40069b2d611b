"""BatchNorm recalibration against statistics by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from cpd.errors import InputError, TrainingError
from cpd.surgery.batchnorm import recalibrate_batchnorm
from helpers.teaching import images, make, same, state


def test_recalibration_equals_statistics_by_hand() -> None:
    model, data = make(0, dropout=0.5).train(), images(5, size=8)
    model.bn.eval()
    model.bn.momentum = 0.3
    model.bn.running_mean.fill_(7.0)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert recalibrate_batchnorm(model, data, limit=4) == 1
    values = [model.conv(x).detach().transpose(0, 1).flatten(1) for x, _ in data[:4]]
    torch.testing.assert_close(model.bn.running_mean, torch.stack([value.mean(1) for value in values]).mean(0))
    torch.testing.assert_close(model.bn.running_var, torch.stack([value.var(1) for value in values]).mean(0))
    assert model.bn.num_batches_tracked == 4
    assert model.bn.momentum == 0.3
    assert not model.bn.training
    assert model.drop.training
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


def test_dropout_stays_off_while_recalibrating() -> None:
    class Before(nn.Module):
        def __init__(self, rate: float) -> None:
            super().__init__()
            self.drop = nn.Dropout(rate)
            self.bn = nn.BatchNorm2d(3)
            self.bn.act = nn.Dropout(rate)  # as timm's BatchNormAct2d, a child of its own

        def forward(self, x: Tensor) -> Tensor:
            assert not self.bn.act.training
            return self.bn(self.drop(x))

    models = [Before(0.0), Before(0.9).train()]
    for model in models:
        assert recalibrate_batchnorm(model, [x for x, _ in images()]) == 1
    assert same(models[1], state(models[0]))
    assert models[1].bn.act.training


@pytest.mark.parametrize("kind", ["empty", "nan", "crash"])
def test_failed_recalibration_keeps_the_old_statistics(kind: str) -> None:
    model, data = make(0), images(2)
    model.bn.running_mean.normal_()
    model.bn.num_batches_tracked.fill_(11)
    kept = state(model)
    if kind == "empty":
        data = []
    if kind == "nan":
        data[1][0][0, 0, 0, 0] = math.nan
    if kind == "crash":
        data[1] = (torch.zeros(2, 5, 6, 6), data[1][1])
    with pytest.raises(InputError if kind == "crash" else TrainingError):
        recalibrate_batchnorm(model, data)
    assert same(model, kept)
    assert model.bn.momentum == 0.1
    assert all(module.training for module in model.modules())


def test_untracked_and_unreached_layers_are_left_alone() -> None:
    model = make(0)
    model.unused = nn.BatchNorm2d(3)
    model.unused.running_var.fill_(5.0)
    model.unused.num_batches_tracked.fill_(3)
    assert recalibrate_batchnorm(model, images()) == 1
    assert model.unused.running_var.tolist() == [5.0] * 3
    assert model.unused.num_batches_tracked == 3

    untracked = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.GroupNorm(1, 3))
    kept = state(untracked)

    def never():
        raise AssertionError("the data was read")
        yield

    assert recalibrate_batchnorm(untracked, never()) == 0
    assert same(untracked, kept)


def test_recalibration_limit_is_checked() -> None:
    with pytest.raises(InputError, match="limit"):
        recalibrate_batchnorm(make(0), images(), limit=0)
    with pytest.raises(InputError, match=r"nn\.Module"):
        recalibrate_batchnorm("resnet18", images())
