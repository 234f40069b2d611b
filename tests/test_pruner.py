"""Pruner: a training of one's own around it, and `distill` and `compress` on a schedule."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cpd
from cpd.criteria import CRITERIA
from cpd.distillation.distiller import DistillConfig, distill
from cpd.errors import CheckpointError, InputError, NothingToPruneError, TrainingError
from cpd.model.tensors import named_tensors
from cpd.pruner import Pruner
from cpd.selection.schedule import Schedule
from cpd.surgery.shrink import shrink
from helpers.training import X, loader, net
from helpers.zoo import comb, random_plan

pytestmark = pytest.mark.usefixtures("undeployed")


# ---------------------------------------------------------------- the comb of a narrower model


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
        model, X, target_macs=0.4, steps=24, schedule=Schedule("cubic", start=0.25, end=0.75, interval=4),
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
    with pytest.raises(CheckpointError, match="state belongs to a different model"):
        Pruner(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)), X, target_macs=0.5, steps=10).load_state_dict(
            first.state_dict()
        )


def test_what_is_wrong_is_said_before_anything_changes() -> None:
    model = net()
    with pytest.raises(InputError, match="exactly one target"):
        Pruner(model, X, steps=10)
    with pytest.raises(InputError, match="needs data"):
        Pruner(model, X, target_macs=0.5, steps=10, criterion="obs")
    with pytest.raises(InputError, match=r"^criterion must be a name .*; got 'size'"):
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
    assert any("ran out before the pruning schedule" in note for note in result.report.notes)


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
