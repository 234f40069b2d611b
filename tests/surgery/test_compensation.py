"""Compensation and recovery against what they promise."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cpd
from cpd.model.inputs import Batch, Call
from cpd.surgery import recovery
from cpd.surgery.calibration import Calibration
from cpd.surgery.compensation import compensate, refit
from cpd.surgery.recovery import logits_error, recover, recovered_error
from cpd.trace.streams import streams
from helpers.layers import Net, batches
from helpers.zoo import comb, dense, random_plan, randomize


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
    plan = replace(comb(Net().eval(), batches()[0][0][:1]).plan({}), architecture=None)  # one that tells of no model
    with pytest.raises(cpd.InputError, match="run alike"):
        compensate(narrow, model, plan, batches())
    assert all(torch.equal(tensor, before[name]) for name, tensor in narrow.state_dict().items())
    found = recover(narrow, Calibration(model, batches()), plan)
    assert "compensation" not in found.errors
    assert found.failure is not None


def test_recovery_keeps_what_comes_nearest():
    model = randomize(Net().eval(), 0)
    narrow, plan = narrowed(model)
    data = batches(samples=256)
    calibration = Calibration(model, data)
    before = logits_error(narrow, model, [Batch(call, None) for call in calibration.held()])
    found = recover(narrow, calibration, plan)
    assert found.errors["nothing"] == pytest.approx(before)
    assert found.chosen == min(found.errors, key=found.errors.get)
    assert found.errors.keys() == {"nothing", "recalibration", "compensation", "compensation with BatchNorm"}
    assert found.agreements.keys() == found.errors.keys()
    assert logits_error(narrow, model, batches(seed=9)) == pytest.approx(found.errors[found.chosen], rel=0.5)
    assert found.errors[found.chosen] < 0.1 * found.errors["nothing"]


def test_recovery_keeps_no_variant_whose_outputs_are_not_finite():
    """Its error is not a number, which compares as neither more nor less than any other."""
    model = randomize(Net().eval(), 0)
    narrow, plan = narrowed(model)
    norm = next(module for module in narrow.modules() if isinstance(module, nn.BatchNorm2d))
    norm.running_mean.fill_(float("nan"))
    found = recover(narrow, Calibration(model, batches()), plan)
    assert found.errors["nothing"] == float("inf")
    assert found.chosen != "nothing"
    assert all(tensor.isfinite().all() for tensor in narrow.state_dict().values())


def test_recovery_goes_on_from_what_was_found_of_the_same_plan(monkeypatch):
    model = randomize(Net().eval(), 0)
    narrow, plan = narrowed(model)
    calibration = Calibration(model, batches(samples=256))
    error = recovered_error(copy.deepcopy(narrow), calibration, plan)
    afresh = copy.deepcopy(narrow)
    expected = recover(afresh, Calibration(model, batches(samples=256)), plan)
    assert error == pytest.approx(expected.errors["compensation with BatchNorm"], rel=1e-6)
    passes = []
    monkeypatch.setattr(recovery, "refit", lambda *args, **options: passes.append(options) or refit(*args, **options))
    assert recover(narrow, calibration, plan).errors == pytest.approx(expected.errors, rel=1e-6)
    assert [options.get("norms") for options in passes] == [False, expected.chosen == recovery.WITH_NORMS]
    for found, wanted in zip(narrow.parameters(), afresh.parameters(), strict=True):
        torch.testing.assert_close(found, wanted)


def test_what_was_found_without_compensation_is_not_called_so():
    """Selection may have recalibrated BatchNorm alone; recovery does not take that for a compensation."""
    model = randomize(Net().eval(), 0)
    narrow, plan = narrowed(model)
    calibration = Calibration(model, batches(samples=256), layers=False)
    recovered_error(copy.deepcopy(narrow), calibration, plan)
    assert recover(narrow, calibration, plan).errors.keys() == {"nothing", "recalibration"}


def test_dense_models_stay_in_their_precision():
    model = dense(Net())
    narrow, plan = narrowed(model)
    compensate(narrow, model, plan, [(x.double(), y) for x, y in batches()])
    assert {tensor.dtype for tensor in narrow.parameters()} == {torch.double}


class Residual(nn.Module):
    """Blocks whose branches end in what stands between a layer and a sum."""

    def __init__(self, end: str, width: int = 16) -> None:
        super().__init__()
        self.end, self.stem = end, nn.Conv2d(3, width, 1)
        self.first = nn.ModuleList(nn.Conv2d(width, 24, 1) for _ in range(3))
        self.last = nn.ModuleList(nn.Conv2d(24, width, 1, bias=end != "norm") for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(3))
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(width)) for _ in range(3))
        self.linear = nn.ModuleList(nn.Linear(24, width) for _ in range(3))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i in range(3):
            y = F.relu(self.first[i](x))
            if self.end == "channels last":
                y = (self.linear[i](y.permute(0, 2, 3, 1)) * self.scales[i]).permute(0, 3, 1, 2)
            elif self.end == "scale":
                y = 0.7 * self.last[i](y) * self.scales[i].view(1, -1, 1, 1)
            else:
                y = self.norms[i](self.last[i](y)) if self.end == "norm" else F.dropout(self.last[i](y), 0.5, False)
            x = x + y if i else torch.add(y, x)
        return self.head(x.permute(0, 2, 3, 1)).flatten(1)


@pytest.mark.parametrize("end", ["norm", "scale", "channels last", "dropout"])
def test_the_last_layer_of_a_branch_makes_up_for_what_came_before(end, monkeypatch):
    """All branches know the same functions of two channels that none changes: a later one makes up for the first."""
    model = randomize(Residual(end).eval(), 0)
    model.head = nn.Identity()  # which cannot make up for anything itself
    with torch.no_grad():
        for first, last, linear in zip(model.first, model.last, model.linear, strict=True):
            first.weight.copy_(model.first[0].weight)
            first.bias.copy_(model.first[0].bias)
            first.weight[:, 2:] = 0
            last.weight[:2] = 0
            linear.weight[:2] = 0
    images = torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    assert len(streams(model, Call((images[:1],), {}))) == 3
    combed = comb(model, images[:1])
    unpruned = copy.deepcopy(model)
    compensate(unpruned, model, combed.plan({}), [images])
    assert logits_error(unpruned, model, [images]) < 1e-9
    plan = combed.plan({"first.0": [0]})
    narrow = cpd.shrink(copy.deepcopy(model), plan)
    other = copy.deepcopy(narrow)
    compensate(narrow, model, plan, [images])
    monkeypatch.setattr("cpd.surgery.calibration.streams", lambda *_: {})
    compensate(other, model, plan, [images])
    assert logits_error(narrow, model, [images]) < 1e-3
    assert logits_error(other, model, [images]) > 3e-3


class Other(Residual):
    """The other operand of each sum is computed after the branch, or the branch is read twice."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i in range(2):
            y = self.last[i](F.relu(self.first[i](x)))
            x = y + F.relu(x) if i else (y + x) * y.sigmoid()
        return self.head(x.mean((2, 3)))


class Half(nn.Linear):
    """Adds a part of what its layer gives."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu() + super().forward(x)[:, :8]


def test_a_branch_that_is_no_stream_keeps_its_own_target():
    found = streams(Other("none").eval(), Call((torch.randn(1, 3, 8, 8),), {}))
    assert all(stream.other is None for stream in found.values())  # what it is added to is not known in time
    assert streams(Half(8, 16), Call((torch.randn(1, 8),), {})) == {}


def test_parts_that_fit_into_memory_give_nearly_what_all_at_once_does():
    model = randomize(Net().eval(), 0)
    narrow, plan = narrowed(model)
    data, held_out = batches(samples=256), batches(seed=9)
    in_parts = copy.deepcopy(narrow)
    error = logits_error(narrow, model, held_out)
    one = Calibration(model, data)
    several = Calibration(model, data, memory_gb=1e-4)
    assert (len(one.parts), one.samples) == (1, several.samples)
    assert len(several.parts) > 3
    assert sum(int(part.held.sum()) for part in several.parts) == one.samples // 4
    images = [part.call.args[0] for part in several.parts]
    assert all(image.is_shared() for image in images)  # in files that are mapped into memory
    assert torch.equal(torch.cat(images), one.parts[0].call.args[0])
    compensate(narrow, model, plan, data)
    compensate(in_parts, model, plan, data, memory_gb=1e-4)
    assert logits_error(narrow, model, held_out) < 0.1 * error
    assert logits_error(in_parts, model, held_out) < 0.1 * error


def test_images_of_several_shapes_are_all_used():
    model = randomize(Net().eval(), 0)
    (x, y), *_ = batches(samples=64)
    found = Calibration(model, [(x, y), (torch.cat([x, x], -1), y)])
    assert found.samples == 2 * len(x)


def test_a_classifier_with_fewer_rows_than_features_is_refitted_only_if_others_gain():
    """Twelve images of noise: what fits nine of them says nothing of the others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    x = torch.randn(12, 64)
    plan = comb(model, x[:1]).plan({"0": range(0, 64, 2)})
    narrow = cpd.shrink(copy.deepcopy(model), plan)
    before = logits_error(narrow, model, [torch.randn(512, 64)])
    for item in compensate(narrow, model, plan, [x]):
        assert item.after <= item.before
    assert logits_error(narrow, model, [torch.randn(512, 64)]) < 1.1 * before


GROUPED = {
    "conv": [nn.Conv2d(64, 32, 2, 2, groups=4)],
    "transposed": [nn.ConvTranspose2d(64, 32, 2, 2, groups=4)],
    "transposed, with a norm": [nn.ConvTranspose2d(64, 32, 3, 2, groups=4, bias=False), nn.BatchNorm2d(32)],
}


def grouped(kind: str) -> nn.Module:
    layers = (nn.Conv2d(3, 64, 3, 2, 1), nn.ReLU(), *copy.deepcopy(GROUPED[kind]), nn.ReLU(), nn.Conv2d(32, 2, 1))
    return randomize(nn.Sequential(*layers).eval(), 0)


@pytest.mark.parametrize("kept", [(1, 3), (2,)])
@pytest.mark.parametrize("kind", GROUPED)
def test_a_layer_whose_groups_go_is_refitted_group_by_group(kind, kept):
    model, images = grouped(kind), torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    combed = comb(model, images[:1])
    plan = combed.plan({next(group.name for group in combed.open if group.size == 4): kept})
    narrow = cpd.shrink(copy.deepcopy(model), plan)
    assert narrow[2].groups == len(kept)
    before = logits_error(narrow, model, [images])
    refits = {item.weight: item for item in compensate(narrow, model, plan, [images])}
    assert refits["2.weight"].before < 1e-9  # the groups that stay give what they gave
    assert logits_error(narrow, model, [images]) < before
    inner = {group.name: [0, *range(2, group.size)] for group in combed.open if group.size != 4}
    plan = combed.plan(inner | {name: channels for name, channels in plan.groups.items() if channels == kept})
    narrow = cpd.shrink(copy.deepcopy(model), plan)
    refits = {item.weight: item for item in compensate(narrow, model, plan, [images])}
    assert 0 < refits["2.weight"].after < refits["2.weight"].before


@pytest.mark.parametrize("kind", GROUPED)
def test_a_model_with_a_grouped_layer_is_compressed_with_data(kind):
    side = {"conv": 4, "transposed": 16}.get(kind, 17)
    data = [(torch.randn(8, 3, 16, 16), torch.randint(2, (8, side, side)))]
    found = cpd.compress(grouped(kind), target_macs=0.4, data=data, epochs=0, round_to=1, progress=False)
    assert not any("Compensation was not possible" in note for note in found.report.notes)
    assert any("Recovery without training" in note for note in found.report.notes)
