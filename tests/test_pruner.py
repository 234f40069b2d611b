"""Pruner: schedules, nested plans, the optimizer's state, and a training of one's own around it."""

from __future__ import annotations

import copy
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import cpd
from cpd.criteria import CRITERIA
from cpd.distillation.distiller import DistillConfig, distill
from cpd.errors import CheckpointError, InputError, NothingToPruneError, PlanError, TrainingError
from cpd.model.tensors import named_tensors
from cpd.pruner import Pruner
from cpd.selection.schedule import Schedule
from cpd.surgery.optimizer_state import narrow_state, narrowed_state
from cpd.surgery.shrink import shrink
from helpers.zoo import comb, dense, going_on, random_plan, relative_error

pytestmark = pytest.mark.usefixtures("quick")

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Residual, with attention: widths, heads and an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.heads = 4
        self.qkv = nn.Linear(16, 48)
        self.proj = nn.Linear(16, 16)
        self.head = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x)).relu()
        x = F.avg_pool2d(x + self.conv(x), 4).flatten(2).transpose(1, 2)
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1)
        return self.head((x + self.proj(y)).mean(1))


def net() -> Net:
    torch.manual_seed(0)
    return dense(Net()).float()


def loader(batches: int = 6) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 3, 16, 16, generator=g), torch.randint(6, (8,), generator=g)) for _ in range(batches)]


# ---------------------------------------------------------------- schedules


def test_schedules_end_at_everything_and_rise_as_they_say() -> None:
    linear = Schedule("linear", warmup=0.1, end=0.5).events(100)
    cubic = Schedule("cubic", warmup=0.1, end=0.5, interval=8).events(100)
    assert [step for step, _ in linear] == [14, 18, 22, 26, 30, 34, 38, 42, 46, 50]
    assert [share for _, share in linear] == pytest.approx([k / 10 for k in range(1, 11)])
    assert cubic == [(18, pytest.approx(1 - 0.8**3)), (26, pytest.approx(1 - 0.6**3)), (34, pytest.approx(1 - 0.4**3)),
                     (42, pytest.approx(1 - 0.2**3)), (50, 1.0)]  # fmt: skip
    assert Schedule("one-shot", warmup=0.25).events(40) == [(10, 1.0)]
    assert [step for step, _ in Schedule("linear", end=1.0).events(4)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Schedule("exponential"),
        lambda: Schedule("cubic", warmup=0.6),
        lambda: Schedule("cubic", end=1.5),
        lambda: Schedule("cubic", interval=0),
        lambda: Schedule("cubic", interval=30).events(50),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(make) -> None:
    with pytest.raises(InputError):
        make()


# ---------------------------------------------------------------- plans one after the other


@pytest.mark.parametrize("name", ["net", "vit_tiny_patch16_224", "regnety_002"])
def test_two_steps_of_a_plan_make_the_same_model_as_one(name: str) -> None:
    """The difference of two nested plans, applied to the result of the first, is the second."""
    if name == "net":
        model, x = dense(Net()), X.double()
    else:
        model, x = dense(timm.create_model(name)), torch.randn(1, 3, 224, 224, dtype=torch.float64)
    combed = comb(copy.deepcopy(model), x)
    first = random_plan(combed, 0.3, at_least=1)
    narrower = {name: list(positions)[: max(1, len(positions) // 2)] for name, positions in first.groups.items()}
    keep = {group.name: narrower[group.name] for group in combed.open}
    second = combed.plan({**keep, **_raised(combed.plan(keep), first)})
    stepwise = shrink(shrink(copy.deepcopy(model), first), second.since(first))
    at_once = shrink(copy.deepcopy(model), second)
    for (key, found), expected in zip(named_tensors(stepwise).items(), named_tensors(at_once).values(), strict=True):
        assert found.shape == expected.shape, key
        if found.is_floating_point() and found.numel():
            assert torch.allclose(found, expected, rtol=1e-12, atol=0), key
    with torch.no_grad():
        assert relative_error(stepwise(x), at_once(x)) < 1e-12
    with pytest.raises(PlanError, match="has removed"):
        first.since(second)


class AsFast:
    """A latency that no width changes."""

    def milliseconds(self, counts) -> float:
        return 1.0

    def local(self, counts) -> dict:
        return {}


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


def _raised(plan: cpd.Plan, within: cpd.Plan) -> dict[str, list[int]]:
    """Where ties have brought back what `within` lacks: as many of its positions."""
    return {
        name: list(within.groups[name])[: len(positions)]
        for name, positions in plan.groups.items()
        if not set(positions) <= set(within.groups[name])
    }


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "hessian", "fisher", "obs", "bn_scale"])
def test_the_narrowed_comb_scores_as_a_comb_of_the_narrower_model(criterion: str) -> None:
    model, data = net(), loader(2)
    combed = comb(copy.deepcopy(model), X)
    plan = random_plan(combed, 0.4, at_least=1)
    narrow = shrink(copy.deepcopy(model), plan)
    found = cpd.score(narrow, combed.narrowed(narrow, plan), data, criterion=criterion)
    expected = cpd.score(narrow, comb(narrow, X), data, criterion=criterion)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}
    assert min(map(len, found.values())) < min(map(len, cpd.score(model, combed, data, criterion=criterion).values()))
    if criterion != "hessian":  # which draws its vectors site by site
        for name in found:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-9)


# ---------------------------------------------------------------- optimizers


@pytest.mark.parametrize(
    ("make", "keys"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), {"momentum_buffer"}),
        (lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True), {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
        (lambda p: torch.optim.AdamW(p, lr=0.1), {"exp_avg", "exp_avg_sq"}),
        (lambda p: torch.optim.RMSprop(p, lr=0.1), {"square_avg"}),
    ],
)
def test_the_state_of_an_optimizer_is_that_of_the_parameters_kept(make, keys: set[str]) -> None:
    model = net()
    optimizer = make(model.parameters())
    for x, y in loader(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    plan = random_plan(comb(copy.deepcopy(model), X), 0.5, at_least=1)
    before = {name: {k: v.clone() for k, v in optimizer.state[p].items()} for name, p in model.named_parameters()}
    entries = narrowed_state(optimizer, model, plan)
    shrink(model, plan)
    narrow_state(entries)
    narrower = 0
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            expected = before[name][key]
            for dim, index in plan.kept.get(name, {}).items() if key in keys else ():
                expected = expected.index_select(dim, index)
                narrower += 1
            assert torch.equal(value, expected), (name, key)
            assert key not in keys or value.shape == parameter.shape
    assert narrower > 8
    optimizer.zero_grad()
    F.cross_entropy(model(X), torch.tensor([1, 2])).backward()
    optimizer.step()


def test_an_optimizer_that_cannot_be_sliced_is_refused_and_nothing_changes() -> None:
    model = net()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.1)
    pruner = Pruner(model, X, target_macs=0.5, steps=10, schedule=Schedule("linear", end=0.2, interval=2), round_to=1,
                    optimizer=optimizer)  # fmt: skip
    shapes = {name: tensor.shape for name, tensor in named_tensors(model).items()}
    with pytest.raises(TrainingError, match=r"Adafactor keeps 'row_var'.*one-shot"):
        train(pruner, optimizer, 2)
    assert shapes == {name: tensor.shape for name, tensor in named_tensors(model).items()}
    assert not pruner.shrinks


# ---------------------------------------------------------------- the pruner in a loop


def train(pruner: Pruner, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """A training as a user writes it; the share of MACs left after each step."""
    model, left = pruner.model, []
    full = pruner.comb.cost({}).macs
    for step in range(steps):
        x, y = loader()[step % 6]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        pruner.step()
        left.append((pruner.shrinks[-1].macs if pruner.shrinks else full) / full)
    return left


@pytest.mark.parametrize("data", [None, loader(2)])
def test_a_loop_of_ones_own(data) -> None:
    model = net().train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    pruner = Pruner(
        model, X, target_macs=0.4, steps=24, schedule=Schedule("cubic", warmup=0.25, end=0.75, interval=4),
        optimizer=optimizer, data=data, round_to=1,
    )  # fmt: skip
    left = train(pruner, optimizer, 24)
    assert pruner.done
    assert [item.step for item in pruner.shrinks] == [10, 14, 18]
    assert left == sorted(left, reverse=True)
    assert left[8] == 1
    assert 0.4 < left[9] <= 1 - 0.6 * (1 - (2 / 3) ** 3) + 0.01
    assert left[-1] == left[17] <= 0.4
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert model.training
    assert pruner.criterion_name == ("taylor" if data is None else "obs")
    fresh = shrink(net(), pruner.plan)
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in parameters]
    assert fresh.heads == model.heads


def test_scores_are_those_of_taylor_on_the_batches_trained_on() -> None:
    """With a learning rate of zero, what is read off the gradients is the criterion itself."""
    model = net()
    expected = cpd.score(model, comb(copy.deepcopy(model), X), loader(4), criterion="taylor")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = Pruner(model, X, target_macs=0.5, steps=100, schedule="linear", optimizer=optimizer, round_to=1)
    train(pruner, optimizer, 4)
    found = pruner._scores()
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=0)


def test_the_same_seed_gives_the_same_plan_whatever_the_global_generators_are_at() -> None:
    def digest(noise: int) -> str:
        torch.manual_seed(noise)
        model = net()
        pruner = Pruner(model, X, target_params=0.5, steps=4, schedule="one-shot", data=loader(2), round_to=1)
        torch.manual_seed(noise)
        pruner.prune()
        return pruner.shrinks[0].plan_hash

    assert digest(0) == digest(1)


def test_a_state_goes_on_where_it_was_taken() -> None:
    def make(model: nn.Module) -> tuple[Pruner, torch.optim.Optimizer]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
        return Pruner(model, X, target_macs=0.4, steps=24, schedule=Schedule("linear", end=0.75, interval=3),
                      optimizer=optimizer, round_to=1), optimizer  # fmt: skip

    whole, optimizer = make(net())
    train(whole, optimizer, 24)
    first, optimizer = make(net())
    train(first, optimizer, 12)
    again, other = make(net())
    again.load_state_dict(first.state_dict())
    again.model.load_state_dict(first.model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    train(again, other, 12)
    assert [item.plan_hash for item in again.shrinks] == [item.plan_hash for item in whole.shrinks]
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True))
    with pytest.raises(CheckpointError, match="already"):
        again.load_state_dict(first.state_dict())
    with pytest.raises(CheckpointError, match="not of this model"):
        Pruner(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)), X, target_macs=0.5, steps=10).load_state_dict(
            first.state_dict()
        )


def test_what_is_wrong_is_said_before_anything_changes() -> None:
    model = net()
    with pytest.raises(InputError, match="exactly one target"):
        Pruner(model, X, steps=10)
    with pytest.raises(InputError, match="needs data"):
        Pruner(model, X, target_macs=0.5, steps=10, criterion="obs")
    with pytest.raises(InputError, match="Unknown criterion"):
        Pruner(model, X, target_macs=0.5, steps=10, criterion="size")
    with pytest.raises(NothingToPruneError):
        Pruner(nn.Sequential(nn.Conv2d(3, 2, 1)), X, target_macs=0.5, steps=10)
    pruner = Pruner(model, X, target_macs=0.5, steps=1, schedule=Schedule("one-shot"))
    with pytest.raises(InputError, match="before zero_grad"):
        pruner.prune()


def test_a_speed_up_is_met_at_the_last_shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["cpd.selection.search"], "SECONDS", 0.2)
    wide = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 4, 3))
    pruner = Pruner(
        wide, torch.randn(1, 3, 64, 64), target_speedup=1.5, steps=4, schedule=Schedule("linear", end=1.0, interval=2),
        criterion="magnitude", tolerance=0.4,
    )  # fmt: skip
    for _ in range(4):
        pruner.step()
    assert pruner.done
    assert len(pruner.shrinks) == 2
    assert pruner.shrinks[1].macs < pruner.shrinks[0].macs < pruner.comb.cost({}).macs
    assert pruner.search[-1]["speedup"] > 0.9


# ---------------------------------------------------------------- in `distill`


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_student_shrinks_while_it_is_distilled(optimizer: str) -> None:
    teacher, student = net(), net()
    config = DistillConfig(epochs=2, lr=1e-3, optimizer=optimizer, ema=0.9)
    pruner = Pruner(student, X, target_macs=0.5, steps=12, schedule=Schedule("cubic", end=0.75, interval=3),
                    data=loader(), round_to=1)  # fmt: skip
    records = distill(student, teacher, loader(), config=config, pruner=pruner)
    assert len(records) == 2
    assert pruner.done
    assert student.stem.out_channels < 16
    assert all(torch.isfinite(p).all() for p in student.parameters())


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name not in ("obs", "taylor")][:4])
def test_compress_on_a_schedule(criterion: str) -> None:
    result = cpd.compress(
        net(), target_params=0.5, data=loader(), example_inputs=X[:1], epochs=2, lr=1e-3, schedule="linear",
        criterion=criterion, round_to=1, compensation=False,
    )  # fmt: skip
    assert result.report.result.parameters <= 0.5 * result.report.original.parameters
    assert result.report.checks["masked equals shrunk"] < 1e-4
    assert [row["epoch"] for row in result.report.history] == [1, 2]


def test_what_the_data_was_too_short_for_goes_at_the_end() -> None:
    class Short(list):
        def __len__(self) -> int:
            return 20

    result = cpd.compress(
        net(), target_params=0.5, data=Short(loader()), example_inputs=X[:1], epochs=1, lr=1e-3, round_to=1,
        schedule=cpd.Schedule("linear", end=1.0, interval=5), criterion="magnitude",
    )  # fmt: skip
    assert result.report.result.parameters <= 0.5 * result.report.original.parameters
    assert any("ended before the schedule" in note for note in result.report.notes)


def test_the_report_names_the_training() -> None:
    result = cpd.compress(
        net(), target_params=0.5, data=loader(2), example_inputs=X[:1], epochs=1, lr=1e-3,
        training=cpd.DistillConfig(kd="none", ema=0.5),
    )  # fmt: skip
    assert result.report.call["training"] == {"kd": "none", "ema": 0.5}
    assert all(isinstance(row.get("steps_per_second", 1.0), float) for row in result.report.history)


def test_a_criterion_of_ones_own_may_need_no_data() -> None:
    def first_stay(setting) -> dict[str, Tensor]:
        return {group.name: -torch.arange(float(group.size)) for group in setting.comb.open}

    result = cpd.compress(net(), target_params=0.6, example_inputs=X[:1], criterion=first_stay, round_to=1)
    assert result.report.criterion == "first_stay"
    assert all(positions == tuple(range(len(positions))) for positions in result.plan.groups.values())


def test_compress_refuses_a_schedule_without_a_training() -> None:
    with pytest.raises(InputError, match="prunes during the training"):
        cpd.compress(net(), target_macs=0.5, example_inputs=X, schedule="cubic")
    with pytest.raises(InputError, match="with a length"):
        cpd.compress(net(), target_macs=0.5, data=_Endless(), epochs=1, schedule="cubic")


class _Endless:
    def __iter__(self):
        yield from loader()
