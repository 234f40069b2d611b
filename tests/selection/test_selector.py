"""Selection against what it promises."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import cpd
from cpd.selection.limits import Limits, ratios_notes
from cpd.selection.selector import Selector
from cpd.selection.weighing import Weighing, by_capacity
from helpers.layers import Net, batches
from helpers.tiny import INPUT, Tiny
from helpers.training import X, net
from helpers.zoo import around, comb, going_on, group, random_plan, randomize

IMAGE = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def resnet() -> tuple[cpd.Comb, dict[str, Tensor]]:
    torch.manual_seed(0)
    combed = comb(timm.create_model("resnet18").eval(), IMAGE)
    return combed, {item.name: torch.rand(item.size, dtype=torch.double) for item in combed.open}


class AsMacs:
    """A latency that is proportional to the MACs."""

    def __init__(self, combed):
        self.cost = combed.cost

    def milliseconds(self, counts):
        return 2e-9 * self.cost(counts).macs

    def slopes(self, counts):
        return {axis: 2e-9 * slope.macs for axis, slope in self.cost.slopes(counts).items()}

    def local(self, counts):
        return {}


class AsFast:
    """A latency that no width changes."""

    def milliseconds(self, counts) -> float:
        return 1.0

    def local(self, counts) -> dict:
        return {}


@pytest.mark.parametrize("normalization", ["macs", "memory", "parameters", "none"])
def test_a_target_is_met_and_hardly_more(resnet, normalization):
    combed, scores = resnet
    selector = Selector(combed, scores, Limits(round_to=8, max_ratio=0.9), weighing=Weighing(normalization))
    for name in ("macs", "parameters", "activations"):
        full = getattr(combed.cost({}), name)
        counts = selector.meet(lambda figures, name=name: getattr(figures, name), 0.5 * full)
        assert 0.45 * full < getattr(combed.cost(counts), name) <= 0.5 * full
        assert all(width % 8 == 0 for width in counts.values())


def test_what_a_position_saves_is_weighed(resnet):
    """Equal scores, so that only what is saved decides: by MACs the widths of most MACs a position go first."""
    combed, _ = resnet
    equal = {item.name: torch.ones(item.size, dtype=torch.double) for item in combed.open}
    slopes = combed.cost.slopes({})
    costly, cheap = (pick(combed.open, key=lambda item: slopes[item.axis].macs) for pick in (max, min))
    selector = Selector(combed, equal, Limits(round_to=1), weighing=Weighing("macs"))
    counts = selector.counts(1)
    assert counts[costly.axis] < costly.size and counts[cheap.axis] == cheap.size  # noqa: PT018
    latency = Weighing("latency", latency=AsMacs(combed))
    assert Selector(combed, equal, Limits(round_to=1), weighing=latency).counts(1) == counts
    with pytest.raises(cpd.InputError, match="LatencyModel"):
        Weighing("latency")
    with pytest.raises(cpd.InputError, match="normalization"):
        Weighing("beauty")


def test_no_group_is_emptied_and_floors_are_told(resnet):
    combed, scores = resnet
    first = combed.open[0].name
    scores = {**scores, first: torch.zeros_like(scores[first])}  # a threshold would empty it
    selector = Selector(combed, scores, Limits(round_to=8, max_ratio=0.75, min_width=24))
    counts = selector.meet(lambda figures: figures.macs, 0.5 * combed.cost({}).macs)
    assert counts[group(combed, first).axis] == 24
    assert first in selector.at_floor(counts)
    assert selector.at_floor(combed_full := {item.axis: item.size for item in combed.open}) == ()
    assert all(width >= 24 for width in selector.least().values())
    assert combed_full.keys() == counts.keys()


def test_ratios_by_pattern(resnet):
    combed, scores = resnet
    limits = Limits(round_to=8, ratios={"layer4.*": 0.5, "layer1.*": 0.0})
    selector = Selector(combed, scores, limits)
    counts = selector.meet(lambda figures: figures.macs, 0.4 * combed.cost({}).macs)
    for item in combed.open:
        if item.name.startswith("layer4."):
            assert counts[item.axis] == item.size // 2
        if item.name.startswith("layer1."):
            assert counts[item.axis] == item.size
    with pytest.raises(cpd.InputError, match=r"layer9"):
        Selector(combed, scores, Limits(ratios={"layer9*": 0.5}))
    with pytest.raises(cpd.InputError, match=r"channels of 'layer1\.0\.conv2' belong to 'conv1'\. Name that group"):
        Selector(combed, scores, Limits(ratios={"layer1.0.conv2": 0.5}))
    with pytest.raises(cpd.InputError, match="share"):
        Selector(combed, scores, Limits(ratios={"layer4*": 1.5}))
    assert not ratios_notes(combed, limits)


def test_a_pattern_that_names_a_branch_alone_says_where_the_channels_are():
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(x + self.a(x))

    combed = comb(Added(), IMAGE)
    (note,) = ratios_notes(combed, Limits(ratios={"a": 0.0}))
    assert (
        "'a' matches the name of a branch, which is kept, but of no group. The channels of 'a' belong to 'stem'" in note
    )
    assert not ratios_notes(combed, Limits(ratios={"a": 0.0, "stem": 0.0}))


def test_scopes(resnet):
    combed, scores = resnet
    scaled = {name: score * (index + 1) for index, (name, score) in enumerate(scores.items())}
    full = combed.cost({}).macs
    same = Selector(combed, scaled, Limits(round_to=1), "group")
    counts = same.meet(lambda figures: figures.macs, 0.5 * full)
    shares = [counts[item.axis] / item.size for item in combed.open]
    assert max(shares) - min(shares) < 0.05
    classes = Selector(combed, scaled, Limits(round_to=1), "isomorphic")
    counts = classes.meet(lambda figures: figures.macs, 0.5 * full)
    alike = [counts[group(combed, f"layer1.{block}.conv1").axis] for block in (0, 1)]
    assert alike[0] < alike[1]  # of two groups alike the one of lower scores loses more
    with pytest.raises(cpd.InputError, match="scope"):
        Selector(combed, scores, scope="everything")


def test_scores_of_weights_count_within_their_group_times_its_capacity(resnet):
    combed, _ = resnet
    scores = {item.name: torch.rand(item.size, dtype=torch.float64) + 0.5 for item in combed.open}
    first, second = combed.open[0], combed.open[-1]
    scores[first.name][0] = -torch.inf  # a position that has gone
    found = by_capacity(combed, scores)
    scaled = by_capacity(combed, {**scores, second.name: 100 * scores[second.name]})
    assert torch.allclose(found[second.name], scaled[second.name])  # the scale of a group does not count
    assert found[first.name][0] == -torch.inf
    for item in (first, second):
        slope, mine = combed.cost.slopes({})[item.axis], found[item.name]
        expected = slope.macs**0.75 * slope.parameters**0.25
        assert float(mine[mine.isfinite()].mean()) == pytest.approx(expected)


def test_the_same_seed_gives_the_same_plan_to_the_byte():
    model, plans = randomize(Net().eval(), 0), []
    for _ in range(2):
        combed = comb(model, batches()[0][0][:1])
        scores = cpd.score(model, combed, batches())
        selector = Selector(combed, scores, Limits(round_to=1))
        plan = selector.plan(selector.meet(lambda figures: figures.macs, 0.5 * combed.cost({}).macs))
        plans.append(repr(plan.to_dict()))
    assert plans[0] == plans[1]


@pytest.mark.parametrize("round_to", [1, 8])
@pytest.mark.parametrize("name", ["net", "vit_tiny_patch16_224", "shufflenet_v2_x0_5", "attention"])
def test_what_is_selected_later_keeps_nothing_that_has_gone(name: str, round_to: int) -> None:
    """Neither a tie nor a width that is as fast brings back a position: the next shrink starts from the last."""
    if name == "net":
        model, x = net(), X
    elif name == "attention":
        model, x = nn.TransformerEncoderLayer(24, 6, 48, batch_first=True), torch.randn(1, 5, 24)
    elif name.startswith("vit"):
        model, x = timm.create_model(name), torch.randn(1, 3, 224, 224)
    else:
        model, x = torchvision.models.get_model(name, weights=None), torch.randn(1, 3, 64, 64)
    combed = comb(model.eval(), x)
    for seed in range(3):
        first = random_plan(combed, 0.3, seed=seed, at_least=1)
        selector = going_on(combed, first, seed, round_to)
        assert selector.plan(selector.counts(0)).groups == first.groups
        for steps in range(0, len(selector._path), 1 + len(selector._path) // 7):
            counts = selector.counts(steps)
            selector.plan(counts).since(first)
            selector.plan(selector.widened(counts, AsFast())).since(first)


@pytest.mark.parametrize("round_to", [1, 8])
def test_what_is_selected_around_a_plan_keeps_all_that_it_keeps(resnet, round_to: int) -> None:
    combed, _ = resnet
    inner = random_plan(combed, 0.4, seed=1, at_least=1)
    selector = around(combed, inner, 2, round_to)
    for steps in range(0, len(selector._path) + 7, 1 + len(selector._path) // 7):
        inner.since(selector.plan(selector.counts(steps)))
    narrowest = selector.counts(len(selector._path))
    assert {g.name: narrowest[g.axis] for g in combed.open} == {g.name: len(inner.groups[g.name]) for g in combed.open}
    assert selector.at_floor(narrowest) == ()  # the limits are not what stopped it


def test_selection_meets_the_cost_in_multiples():
    torch.manual_seed(0)
    model = Tiny(width=64)
    comb = cpd.comb(model, INPUT)
    selector = Selector(comb, cpd.score(model, comb, criterion="magnitude"), Limits(round_to=8, max_ratio=0.75))
    full = comb.cost({}).macs
    counts = selector.meet(lambda figures: figures.macs, 0.5 * full)
    assert 0.4 < comb.cost(counts).macs / full <= 0.5
    assert all(width % 8 == 0 and width >= 16 for width in counts.values())
    plan = selector.plan(counts)
    kept = {group.name: len(plan.groups[group.name]) for group in comb.open}
    assert kept == {group.name: counts[group.axis] for group in comb.open}
