"""Costs, selection and compensation against what they promise."""

from __future__ import annotations

import copy
import time

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import cpd
from cpd.selection.limits import Limits
from cpd.selection.selector import Selector
from cpd.selection.weighing import Weighing, by_capacity
from cpd.surgery.compensation import compensate
from cpd.surgery.recovery import logits_error, recover
from helpers.zoo import comb, dense, group, random_plan, randomize

IMAGE = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Layers of every kind that compensation knows: plain, depthwise, grouped, transposed, linear."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.depth = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(width, 8, 2, 2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.conv1(x)))
        x = F.gelu(self.conv2(F.gelu(self.depth(x)) + x))
        return self.head(F.gelu(self.up(x)).mean((2, 3)))


def batches(samples: int = 48, side: int = 12, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Images of few degrees of freedom, so that channels can stand in for each other."""
    g = torch.Generator().manual_seed(seed)
    images = F.interpolate(torch.randn(samples, 3, 4, 4, generator=g), side, mode="bilinear")
    return [(part, torch.randint(5, (len(part),), generator=g)) for part in images.split(16)]


def flops(model: nn.Module) -> int:
    """As torch counts them; of attention by its matrix products, since not all versions count the CPU's own kernel."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(IMAGE)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "vit_tiny_patch16_224", "densenet121"])
def test_macs_are_those_of_torchs_own_counter(name):
    model = timm.create_model(name, **({"img_size": 64} if "vit" in name else {})).eval()
    combed = comb(model, IMAGE)
    assert 2 * combed.cost({}).macs == flops(model)
    plan = random_plan(combed, 0.3, at_least=1)
    narrow = cpd.shrink(copy.deepcopy(model), plan)
    found = combed.cost({item.axis: len(plan.groups[item.name]) for item in combed.groups})
    assert 2 * found.macs == flops(narrow)
    assert found.parameters == sum(p.numel() for p in narrow.parameters())


def test_thousands_of_candidates_a_second_and_slopes():
    combed = comb(timm.create_model("resnet18").eval(), IMAGE)
    cost, rng = combed.cost, np.random.default_rng(0)
    widths = np.stack([rng.integers(1, axis.size + 1, 2000) for axis in cost.axes], 1)
    start = time.perf_counter()
    found = cost.many(widths)
    assert len(widths) / (time.perf_counter() - start) > 2000
    for index in range(5):
        counts = dict(zip(cost.axes, map(int, widths[index]), strict=True))
        figures, slopes = cost(counts), cost.slopes(counts)
        assert tuple(found[index]) == (figures.parameters, figures.macs, figures.activations)
        for axis in cost.axes[:4]:
            up, down = (cost({**counts, axis: counts[axis] + step}) for step in (1, -1))
            assert slopes[axis].macs == pytest.approx((up.macs - down.macs) / 2)
            assert slopes[axis].activations == pytest.approx((up.activations - down.activations) / 2)


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
    with pytest.raises(cpd.InputError, match="share"):
        Selector(combed, scores, Limits(ratios={"layer4*": 1.5}))


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


# ---------------------------------------------------------------------------------- compensation


def narrowed(model: nn.Module, share: float = 0.4) -> tuple[nn.Module, cpd.Plan]:
    combed = comb(model, batches()[0][0][:1].to(next(model.parameters()).dtype))
    plan = random_plan(combed, share, at_least=1)
    return cpd.shrink(copy.deepcopy(model), plan), plan


def test_compensation_brings_the_outputs_back():
    model = randomize(Net().eval(), 0)
    narrow, plan = narrowed(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held_out = batches(seed=9)
    error = logits_error(narrow, model, held_out)
    refits = compensate(narrow, model, plan, batches(samples=256))
    assert {item.weight for item in refits} == {n for n, p in model.named_parameters() if p.dim() > 1}
    assert all(item.after <= item.before for item in refits)
    assert logits_error(narrow, model, held_out) < 0.1 * error
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_channel_that_others_hold_is_made_up_for_exactly():
    """Channel 4 is the sum of 1 and 2: removing it changes nothing once its reader has been refitted."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5)).double()
    with torch.no_grad():
        model[0].weight[4] = model[0].weight[1] + model[0].weight[2]
        model[0].bias[4] = model[0].bias[1] + model[0].bias[2] + 0.3
    x = torch.randn(400, 6, dtype=torch.double)
    combed = comb(model, x[:1])
    plan = combed.plan({"0": [i for i in range(8) if i != 4]})
    narrow = cpd.shrink(copy.deepcopy(model), plan)
    before = logits_error(narrow, model, [(x, None)])
    compensate(narrow, model, plan, [(x, None)])
    assert before > 0.05
    assert logits_error(narrow, model, [(x, None)]) < 1e-6


def test_an_unpruned_model_is_left_alone():
    model = randomize(Net().eval(), 0)
    copied = copy.deepcopy(model)
    compensate(copied, model, comb(model, batches()[0][0][:1]).plan({}), batches())
    for name, tensor in copied.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_compensation_of_attention():
    torch.manual_seed(0)
    model = randomize(timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=5).eval(), 0)
    data = [(F.interpolate(x, 32), y) for x, y in batches(samples=192)]
    plan = random_plan(combed := comb(model, data[0][0][:1]), 0.3, at_least=1)
    assert any(item.frozen is None for item in combed.groups)
    narrow = cpd.shrink(copy.deepcopy(model), plan)
    before = logits_error(narrow, model, data)
    compensate(narrow, model, plan, data)
    assert logits_error(narrow, model, data) < 0.5 * before


class Unsteady(Net):
    """Runs another way once it is narrower."""

    def forward(self, x: Tensor) -> Tensor:
        if self.conv1.weight.shape[0] < 16:
            x = x + 0 * F.linear(x, self.head.weight[:1, :1].expand(x.shape[-1], x.shape[-1]))
            x = F.pad(x, (0, 1))
        return super().forward(x)


def test_models_that_run_in_another_way_are_refused_and_kept():
    model = Unsteady().eval()
    narrow = Unsteady(width=8).eval()
    before = {name: tensor.clone() for name, tensor in narrow.state_dict().items()}
    plan = comb(Net().eval(), batches()[0][0][:1]).plan({})
    with pytest.raises(cpd.InputError, match="run alike"):
        compensate(narrow, model, plan, batches())
    assert all(torch.equal(tensor, before[name]) for name, tensor in narrow.state_dict().items())
    found = recover(narrow, model, plan, batches())
    assert "compensation" not in found.errors
    assert found.failure is not None


def test_recovery_keeps_what_comes_nearest():
    model = randomize(Net().eval(), 0)
    narrow, plan = narrowed(model)
    data = batches(samples=256)
    found = recover(narrow, model, plan, data)
    assert found.chosen == min(found.errors, key=found.errors.get)
    assert found.errors.keys() == {"nothing", "recalibration", "compensation", "compensation and recalibration"}
    assert logits_error(narrow, model, data, 16) == pytest.approx(found.errors[found.chosen])
    assert found.errors[found.chosen] < 0.1 * found.errors["nothing"]


def test_dense_models_stay_in_their_precision():
    model = dense(Net())
    narrow, plan = narrowed(model)
    compensate(narrow, model, plan, [(x.double(), y) for x, y in batches()])
    assert {tensor.dtype for tensor in narrow.parameters()} == {torch.double}


# ---------------------------------------------------------------------------------- sensitivity


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
