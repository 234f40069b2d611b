"""Sensitivity: each group pruned alone."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

import cpd
from cpd.cli.tables import sensitivity_table
from cpd.surgery.recovery import logits_error
from helpers.layers import Net, batches
from helpers.zoo import comb, group, randomize


def test_sensitivity_prunes_each_group_alone(tmp_path):
    model = randomize(Net().eval(), 0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    combed, data = comb(model, batches()[0][0][:1]), batches()
    found = cpd.sensitivity(model, combed, data, evaluate=lambda m: float(m.head.weight.sum()), ratios=(0.25, 0.5))
    assert list(found.by_group) == [item.name for item in combed.open]
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    for name, points in found.by_group.items():
        size = group(combed, name).size
        assert [point.kept for point in points] == [round(size * 0.75), round(size * 0.5)]
        assert all((point.error > 0 and point.macs < 1) == (point.kept < size) for point in points)
        assert points[0].macs > points[1].macs
    (name,) = {item.name for item in combed.open for member in item.members if str(member) == "up.weight dim 1"}
    plan = combed.plan({name: found_positions(model, combed, name, 4)})
    narrow = cpd.shrink(copy.deepcopy(model), plan)
    (point,) = (point for point in found.by_group[name] if point.ratio == 0.5)
    assert point.error == pytest.approx(logits_error(narrow, model, data))
    assert point.metric == pytest.approx(float(narrow.head.weight.detach().sum()))
    assert found.to_dict()["points"][0]["group"] == combed.open[0].name
    again = cpd.sensitivity(model, combed, data, ratios=np.array([0.25, 0.5], np.float32))
    assert [point.kept for point in again.points] == [point.kept for point in found.points]
    assert json.dumps(again.to_dict())
    assert found.plot(tmp_path / "map.svg").read_text().count("<svg") == 1
    with pytest.raises(cpd.InputError, match="ending"):
        found.plot(tmp_path / "map.docx")
    with pytest.raises(cpd.InputError, match="ratios"):
        cpd.sensitivity(model, combed, data, ratios=(1.5,))


class Chunked(nn.Module):
    """Two halves that are read by a layer each, tied in number; and a group that is tied to none."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.both = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 1)
        self.left, self.right, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x):
        left, right = self.both(self.stem(x).relu()).chunk(2, dim=1)
        return self.head((self.left(left) + self.right(right)).mean((2, 3)))


def test_tied_groups_go_together(tmp_path):
    model = randomize(Chunked().eval(), 0)
    data = [(torch.randn(8, 3, 8, 8), torch.randint(4, (8,)))]
    combed = cpd.comb(model, data[0][0])
    tied = [item for item in combed.open if item.ties]
    assert [item.size for item in tied] == [8, 8]
    assert comb_keeps(combed, tied[0].name) == (8, 8)  # alone, the tie brings back what went
    found = cpd.sensitivity(model, combed, data, ratios=(0.25, 0.5))
    alone = [item.name for item in combed.open if not item.ties]
    assert list(found.by_group) == [item.name for item in combed.open if item.name != tied[1].name]
    points = found.by_group[tied[0].name]
    assert [(point.kept, point.tied) for point in points] == [(6, (tied[1].name,)), (4, (tied[1].name,))]
    assert all(not found.by_group[name][0].tied for name in alone)
    scores = cpd.score(model, combed, criterion="magnitude")
    plan = combed.plan({item.name: sorted(scores[item.name].topk(4).indices.tolist()) for item in tied})
    narrow = cpd.shrink(copy.deepcopy(model), plan)
    assert narrow.both.out_channels == 8
    assert points[1].error == pytest.approx(logits_error(narrow, model, data))
    assert found.to_dict()["points"][found.points.index(points[0])]["tied"] == (tied[1].name,)
    label = f"{tied[0].name} with {tied[1].name}"
    assert label in [str(cell) for cell in sensitivity_table(found).columns[0].cells]
    assert label in found.plot(tmp_path / "map.svg").read_text()


def comb_keeps(combed: cpd.Comb, name: str) -> tuple[int, ...]:
    """The widths of the tied groups once one of them was to be halved."""
    groups = combed.plan({name: range(4)}).groups
    return tuple(len(groups[item.name]) for item in combed.open if item.ties)


def found_positions(model: nn.Module, combed: cpd.Comb, name: str, count: int) -> list[int]:
    """The positions of highest magnitude."""
    scores = cpd.score(model, combed, criterion="magnitude")[name]
    return sorted(scores.topk(count).indices.tolist())
