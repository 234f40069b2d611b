"""Branches chosen, removed and recovered from in whole runs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import cpd
from cpd.deploy.kernels import KernelTimes
from cpd.deploy.latency import LatencyProbe
from cpd.deploy.latency_model import LatencyModel
from cpd.surgery.calibration import Calibration
from cpd.surgery.recovery import error_without, recover


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int, share: float) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))
        nn.init.constant_(self.last[1].weight, share)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.last(self.first(x)))


class Net(nn.Module):
    """Residual blocks, the later of which give little, or what an earlier one can give."""

    def __init__(self, shares: tuple[float, ...] = (1.0, 0.02, 0.05, 0.02)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(Block(8, share) for share in shares)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Excited(nn.Module):
    """A layer, a gate that is nearly the same for every image, a layer that reads their product, an arm of little."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.arm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(8, 4, 3)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 32, 1), nn.Conv2d(32, 16, 1), nn.Sigmoid())
        self.last, self.head = nn.Conv2d(16, 8, 1), nn.Linear(12, 5)
        nn.init.normal_(self.gate[2].weight, std=0.01)
        nn.init.constant_(self.arm.weight, 1e-3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        wide = torch.relu(self.wide(x))
        found = torch.cat([self.last(wide * self.gate(wide)), self.arm(x)], 1)
        return self.head(torch.relu(found).mean((2, 3)))


#: Of every group most stays, so that the target asks for more than channels.
ASKED = {"target_macs": 0.45, "round_to": 1, "max_ratio": 0.2}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(32, 3, 8, 8, generator=generator), torch.randint(5, (32,), generator=generator)) for _ in range(4)
    ]


def test_a_layer_takes_up_a_gate_and_those_after_an_arm_its_mean(data):
    torch.manual_seed(0)
    model = Excited().eval()
    combed = cpd.comb(model, data[0][0])
    assert [branch.name for branch in combed.branches if branch.frozen is None] == ["gate", "gate#2", "arm"]
    calibration = Calibration(model, data)
    for name in ("gate", "arm"):
        plan = combed.plan({}, remove=[name])
        plain = calibration.judge(cpd.shrink(copy.deepcopy(model), plan))[0]
        found = error_without(cpd.shrink(copy.deepcopy(model), plan), calibration, plan)
        assert found < 1e-2 * min(plain, 1)
        small = cpd.shrink(copy.deepcopy(model), plan)
        recover(small, calibration, plan)
        assert calibration.judge(small)[0] <= 2 * found


def test_what_gives_little_goes(model, data, tmp_path):
    result = cpd.compress(model, data=data, epochs=0, progress=False, **ASKED)
    assert set(result.plan.removed) <= {"blocks.1", "blocks.2", "blocks.3"}
    assert len(result.plan.removed) >= 2
    assert result.report.result.macs <= 0.45 * result.report.original.macs
    assert all(type(result.model.get_submodule(name)) is nn.Identity for name in result.plan.removed)
    rows = {row.name: row.removed for row in result.report.branches}
    assert [name for name, removed in rows.items() if removed] == list(result.plan.removed)
    assert any(note.startswith(f"Branches removed: {len(result.plan.removed)} of 4") for note in result.report.notes)
    assert f"{len(result.plan.removed)} of 4 branches removed" in result.report.to_html()
    folder = result.save(tmp_path / "out")
    assert f"without {len(result.plan.removed)} of its 4 branches" in (folder / "README.md").read_text()
    loaded = cpd.load(folder, model=Net()).eval()
    with torch.no_grad():
        assert torch.equal(loaded(data[0][0]), result.model.eval()(data[0][0]))


@pytest.mark.parametrize(
    "options",
    [{"branches": False}, {"max_removed": 0.0}, {"ratios": {"blocks.?": 0}}],
    ids=lambda item: next(iter(item)),
)
def test_what_is_protected_stays(model, data, options):
    result = cpd.compress(model, target_macs=0.6, round_to=1, data=data, epochs=0, progress=False, **options)
    assert result.plan.removed == ()


def test_no_more_go_than_may(model, data):
    result = cpd.compress(model, data=data, epochs=0, progress=False, **{**ASKED, "target_macs": 0.6}, max_removed=0.25)
    assert len(result.plan.removed) == 1


def test_without_data_branches_stay(model):
    with pytest.raises(cpd.InputError, match=r"branches=True needs data=: without data, the importance of a branch"):
        cpd.compress(model, target_macs=0.6, example_inputs=torch.randn(1, 3, 8, 8), branches=True)
    result = cpd.compress(model, target_macs=0.6, round_to=1, example_inputs=torch.randn(1, 3, 8, 8), progress=False)
    assert result.plan.removed == ()
    assert result.report.branches == ()


def test_branches_leave_one_after_the_other(model, data):
    """On a gradual schedule, with moments and an average of the weights; and on from a checkpoint of it."""
    images, labels = data[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    unpruned = copy.deepcopy(model)
    pruner = cpd.Pruner(
        model, images[:1], steps=8, schedule="linear", prune_until=1.0, optimizer=optimizer, data=data, **ASKED
    )
    counts = []
    for step in range(8):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        pruner.step()
        counts.append(len(pruner.plan.removed))
        if step == 4:
            state = pruner.state_dict()
            halfway = copy.deepcopy(model)
    assert pruner.done
    assert sorted(counts) == counts
    assert counts[0] < counts[-1]
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == set(map(id, model.parameters()))
    again = cpd.Pruner(unpruned, images[:1], steps=8, schedule="linear", prune_until=1.0, data=data, **ASKED)
    again.load_state_dict(state)
    assert len(again.plan.removed) == counts[4]
    assert set(again.plan.removed) <= set(pruner.plan.removed)  # in the order of the model, not of leaving
    assert [p.shape for p in unpruned.parameters()] == [p.shape for p in halfway.parameters()]


def test_the_layer_before_a_branch_gives_what_the_branch_gave(data):
    """A block whose branch is what the one before it could give: nearly all of it is made up for."""
    torch.manual_seed(1)
    model = Net((1.0, 0.5, 0.5)).eval()
    combed = cpd.comb(model, data[0][0][:1])
    calibration = Calibration(model, data)
    plan = combed.plan({}, remove=["blocks.1"])
    alone = calibration.judge(cpd.shrink(copy.deepcopy(model), plan))[0]
    taken_up = error_without(cpd.shrink(copy.deepcopy(model), plan), calibration, plan)
    narrow = cpd.shrink(copy.deepcopy(model), plan)
    recovered = min(recover(narrow, calibration, plan).errors.values())
    assert taken_up < 0.7 * alone
    assert recovered < 0.7 * taken_up


def test_predicted_latency_without_a_branch(model, data):
    """What is left is predicted to take what its own operations take."""
    image = data[0][0][:1]
    combed, probe = cpd.comb(model, image), LatencyProbe(model, image, threads=1)
    latency = LatencyModel(combed, probe.profile(seconds=0.2), KernelTimes(1))
    names = [branch.name for branch in combed.branches]
    left = latency.milliseconds({})
    for count in range(1, len(names) + 1):
        without = latency.without(combed.removal(names[:count]).gone)
        assert 0 < without.milliseconds({}) < left
        assert without.original_ms == latency.original_ms
        assert sum(share.ms for share in without.shares) == pytest.approx(without.milliseconds({}), rel=0.2)
        left = without.milliseconds({})
