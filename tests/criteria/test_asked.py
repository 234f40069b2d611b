"""How many images a model asks for, and how many are read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import cpd
from cpd.criteria.asked import samples_asked
from cpd.model.inputs import as_batch


def net() -> nn.Module:
    """64 channels that a convolution reads in 16 places of an image, and 256 that are pooled."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 256, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(256, 4),
    )  # fmt: skip


class Noted:
    """Batches of one size, and how many were read at a time."""

    def __init__(self, batches: int, samples: int) -> None:
        self.batches = list(torch.randn(batches, samples, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
        self.most = 0

    def __iter__(self) -> Iterator[Tensor]:
        for number, batch in enumerate(self.batches, 1):
            self.most = max(self.most, number)
            yield batch


def pruned(data: Noted, **options: object) -> cpd.Pruner:
    pruner = cpd.Pruner(net(), data.batches[0][:1], steps=0, data=data, target_macs=0.6, **options)
    pruner.prune()
    return pruner


def test_the_layer_that_sees_a_group_least_often_asks_for_most() -> None:
    model, x = net(), torch.randn(5, 3, 4, 4)
    asked = samples_asked(model, cpd.comb(model, x[:1]), as_batch(x))
    assert asked == (32, "2", 256)
    model[4], model[5] = nn.Identity(), nn.Identity()
    model[6] = nn.Conv2d(256, 4, 1)
    assert samples_asked(model, cpd.comb(model, x[:1]), as_batch(x)).samples == 2


@pytest.mark.parametrize(("samples", "read"), [(1, 32), (2, 16), (8, 16)])
def test_as_many_batches_are_read_as_the_widest_layer_asks_for(samples: int, read: int) -> None:
    data = Noted(40, samples)
    assert not [note for note in pruned(data).notes if "asks for" in note]
    assert data.most == read


@pytest.mark.parametrize("criterion", ["obs", "magnitude"])
def test_it_is_said_where_there_are_fewer(criterion: str) -> None:
    told = (
        "There are few images for the 256 channels of 2: scores and recovery need 32 images for it, and 20 were used."
    )
    data = Noted(20, 1)
    assert told in pruned(data, criterion=criterion).notes
    data = Noted(40, 1)
    assert told in pruned(data, criterion=criterion, score_batches=20).notes
    assert data.most == 20
