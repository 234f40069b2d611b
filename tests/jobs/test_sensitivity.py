"""Sensitivity: each group pruned alone."""

from __future__ import annotations

import copy

import pytest
from torch import nn

import cpd
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
    assert found.plot(tmp_path / "map.svg").read_text().count("<svg") == 1
    with pytest.raises(cpd.InputError, match="ending"):
        found.plot(tmp_path / "map.docx")
    with pytest.raises(cpd.InputError, match="ratios"):
        cpd.sensitivity(model, combed, data, ratios=(1.5,))


def found_positions(model: nn.Module, combed: cpd.Comb, name: str, count: int) -> list[int]:
    """The positions of highest magnitude."""
    scores = cpd.score(model, combed, criterion="magnitude")[name]
    return sorted(scores.topk(count).indices.tolist())
