"""Distillation: its settings, and `distill` and its promises."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cpd.distillation.distiller import DistillConfig, EpochRecord, distill
from cpd.distillation.losses import kl_divergence
from cpd.distillation.optimizers import Untouched, lr_schedule
from cpd.errors import InputError, TrainingError
from cpd.surgery.batchnorm import recalibrate_batchnorm
from helpers.teaching import CLASSES, Net, images, make, same, state

BRIEF = DistillConfig(epochs=1, lr=0.05, warmup=0.0)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny models; on a busy machine more threads take ten times as long
    yield
    torch.set_num_threads(threads)


def damaged(teacher: nn.Module) -> nn.Module:
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.conv.weight[::2] = 0
        student.head.weight.mul_(-0.5)
    return student


# Settings


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("epochs", {"epochs": -1}),
        ("epochs", {"epochs": math.inf}),
        ("epochs", {"epochs": "3"}),
        ("optimizer", {"optimizer": "sdg", "lr": 0.1}),
        ("lr", {"optimizer": "lamb"}),
        ("lr", {"lr": 0.0}),
        ("momentum", {"momentum": 1.0}),
        ("weight_decay", {"weight_decay": -1e-4}),
        ("warmup", {"warmup": 1.0}),
        ("kd", {"kd": "l2"}),
        ("kd_weight", {"kd_weight": math.nan}),
        ("temperature", {"temperature": 0}),
        ("mixed_precision", {"mixed_precision": "fp8"}),
        ("accumulate", {"accumulate": 0}),
        ("max_grad_norm", {"max_grad_norm": 0}),
        ("seed", {"seed": 0.5}),
        ("progress", {"progress": "yes"}),
    ],
)
def test_config_refuses(name: str, wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=f"^{name} must be .*(; got |optimizer)"):
        DistillConfig(**wrong)


def test_an_optimizer_that_cannot_be_made_is_refused_before_anything_runs() -> None:
    with pytest.raises(InputError, match=r"'sgdc' cannot be made here .* Nesterov"):
        DistillConfig(optimizer="sgdc", lr=0.1, momentum=0.0)
    assert DistillConfig(optimizer="sgdc", lr=0.1).momentum == 0.9
    with pytest.raises(InputError, match="'adahessian' needs second derivatives"):
        DistillConfig(optimizer="adahessian", lr=0.1)


def test_config_defaults() -> None:
    assert DistillConfig().peak_lr == 0.01
    assert DistillConfig(optimizer="adamw").peak_lr == 5e-4
    assert DistillConfig(optimizer="lamb", lr=1e-3).peak_lr == 1e-3
    assert DistillConfig().needs_teacher
    assert not DistillConfig(kd_weight=0).needs_teacher


def test_the_learning_rate_rises_then_falls() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule, found = lr_schedule(optimizer, DistillConfig().scheduler, epochs=2.5, warmup=0.2), []
    for at in (0, 0.25, 0.5, 1.5, 2.499999):
        schedule.step(at)
        found.append(optimizer.param_groups[0]["lr"])
    assert found == pytest.approx([0, 1, 2, 1, 0], abs=1e-4)


# distill


def test_a_damaged_student_recovers() -> None:
    teacher = make()
    teacher.head.weight.data *= 20  # outputs that tell the images apart
    recalibrate_batchnorm(teacher.eval(), images())
    student, config = damaged(teacher), DistillConfig(epochs=6, lr=0.1, kd_weight=4.0)
    data = [(x, teacher(x).argmax(1)) for x, _ in images()]
    before = kl_divergence(student.eval()(data[0][0]), teacher(data[0][0]))
    records = distill(student, teacher, data, config=config, evaluate=lambda model: 0.5)
    after = kl_divergence(student(data[0][0]), teacher(data[0][0]))
    assert after < before / 2
    assert [record.epoch for record in records] == [1, 2, 3, 4, 5, 6]
    assert records[-1].loss < records[0].loss / 2
    assert records[-1].kd_loss < records[0].kd_loss
    for record in records:
        assert record.loss == pytest.approx(record.task_loss + 4.0 * record.kd_loss, rel=1e-5)
        assert record.steps_per_second > 0
        assert record.metric == 0.5
    assert records[0].to_dict()["lr"] == records[0].lr > records[-1].lr > 0


def test_first_loss_is_the_formula_and_one_step_is_plain_sgd() -> None:
    teacher, data = make().eval(), images(1)
    student = damaged(teacher)
    reference, (x, y) = copy.deepcopy(student).train(), data[0]
    config = DistillConfig(
        epochs=1, lr=0.1, momentum=0.0, weight_decay=0.0, warmup=0.0, kd_weight=3.0, max_grad_norm=None
    )
    output = reference(x)
    kd = kl_divergence(output, teacher(x).detach(), config.kd_temperature)
    expected = nn.functional.cross_entropy(output, y) + 3.0 * kd
    expected.backward()
    (record,) = distill(student, teacher, data, config=config)
    assert record.loss == pytest.approx(expected.item(), rel=1e-6)
    assert record.kd_loss == pytest.approx(kd.item(), rel=1e-6)
    assert record.lr == pytest.approx(0.05)  # the middle of half a cosine
    torch.testing.assert_close(student.head.weight, reference.head.weight - 0.05 * reference.head.weight.grad)


def test_a_frozen_batchnorm_keeps_its_statistics_and_learns_its_weights() -> None:
    teacher, data = make().eval(), images(1)
    student = damaged(teacher).train()
    student.bn.running_mean += 0.5
    reference, statistics, (x, y) = copy.deepcopy(student).eval(), state(student.bn), data[0]
    (record,) = distill(student, teacher, data, config=DistillConfig(epochs=1, kd="none", freeze_batchnorm=True))
    assert record.loss == pytest.approx(nn.functional.cross_entropy(reference(x), y).item(), rel=1e-6)
    assert torch.equal(student.bn.running_mean, statistics["running_mean"])
    assert torch.equal(student.bn.running_var, statistics["running_var"])
    assert not torch.equal(student.bn.weight, statistics["weight"])
    assert student.bn.training  # as it was


def test_teacher_and_surroundings_are_left_alone() -> None:
    teacher, student = make(0, dropout=0.5), make(1, dropout=0.5)
    teacher.train()
    teacher.bn.eval()
    teacher.conv.weight.requires_grad_(False)
    student.eval()
    student.bn.weight.requires_grad_(False)
    kept, frozen, names = state(teacher), student.bn.weight.clone(), set(vars(student))
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    distill(student, teacher, images(), config=BRIEF)
    assert same(teacher, kept)
    assert teacher.training
    assert teacher.drop.training
    assert not teacher.bn.training
    assert [p.requires_grad for p in teacher.parameters()] == [False] + [True] * 5
    assert all(p.grad is None for p in [*teacher.parameters(), *student.parameters()])
    assert not any(module.training for module in student.modules())
    assert set(vars(student)) == names
    assert torch.equal(student.bn.weight, frozen)
    assert not student.bn.weight.requires_grad
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_same_seed_same_weights() -> None:
    x, y = (torch.cat(parts) for parts in zip(*images(), strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
    teacher, students = make(0), [make(1, dropout=0.3) for _ in range(3)]
    for student, seed in zip(students, (5, 5, 6), strict=True):
        torch.rand(seed)
        config = DistillConfig(epochs=2, seed=seed, warmup=0.1)
        distill(student, teacher, loader, config=config, evaluate=lambda model: torch.rand(1).item())
    assert same(students[0], state(students[1]))
    assert not same(students[0], state(students[2]))


def test_a_loss_that_is_not_finite_undoes_its_epoch() -> None:
    teacher, student, clean = make(0), make(1), images(3)
    poisoned = [*clean[:2], (clean[2][0] * math.nan, clean[2][1])]
    expected = copy.deepcopy(student)

    class Data:
        epoch = 0

        def __len__(self) -> int:
            return 3

        def __iter__(self):
            Data.epoch += 1
            return iter(poisoned if Data.epoch == 2 else clean)

    seen: list[dict[str, Tensor]] = []
    config = DistillConfig(epochs=3)
    with pytest.raises(TrainingError, match="step 3 of epoch 2"):
        distill(student, teacher, Data(), config=config, before=0.0,
            evaluate=lambda model: seen.append(state(model)) or 0)  # fmt: skip
    assert len(seen) == 1
    assert same(student, seen[0])
    assert not same(student, state(expected))
    assert all(torch.isfinite(tensor).all() for tensor in student.state_dict().values())
    assert all(p.grad is None for p in student.parameters())


def test_weights_that_explode_in_the_last_step_are_undone() -> None:
    student = make(1)
    kept = state(student)
    config = DistillConfig(epochs=1, lr=1e38, warmup=0.0, max_grad_norm=None, kd="none")
    with pytest.raises(TrainingError, match=r"'.*' holds values that are not finite after epoch 1"):
        distill(student, None, images(1), config=config, loss=lambda output, target: 1e6 * output.square().sum())
    assert same(student, kept)


@pytest.mark.parametrize("data", [[], iter(()), DataLoader(TensorDataset(torch.zeros(0, 3, 6, 6)))])
def test_empty_data(data: object) -> None:
    student = make(1)
    kept = state(student)
    with pytest.raises(TrainingError, match="no batch"):
        distill(student, make(0), data, config=BRIEF)
    assert same(student, kept)
    assert student.training


def test_a_generator_lasts_one_epoch() -> None:
    student = make(1)
    kept = state(student)
    with pytest.raises(TrainingError, match="generator, which can be iterated only once"):
        distill(student, make(0), (batch for batch in images()), config=DistillConfig(epochs=2))
    assert same(student, kept)
    (record,) = distill(student, make(0), (batch for batch in images()), config=BRIEF)
    assert record.lr == pytest.approx(0.025)  # no length: the rate of the middle of the epoch
    assert not same(student, kept)


def test_an_iterator_that_comes_back_empty() -> None:
    student, first = make(1), []
    with pytest.raises(TrainingError, match="none in epoch 2"):
        distill(
            student,
            make(0),
            iter(images()),
            config=DistillConfig(epochs=2),
            evaluate=lambda model: first.append(state(model)) or 0,
            before=0.0,
        )
    assert same(student, first[0])


def test_no_epochs_touch_nothing() -> None:
    student = make(1)
    kept = state(student)
    assert distill(student, make(0), iter(()), config=DistillConfig(epochs=0)) == []
    assert same(student, kept)


@pytest.mark.parametrize(("epochs", "batches_read"), [(0.5, 3), (1.5, 9), (2, 12)])
def test_fractions_of_an_epoch(epochs: float, batches_read: int) -> None:
    calls = []
    config = DistillConfig(epochs=epochs, kd="none")

    def loss(output: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        return nn.functional.cross_entropy(output, target)

    records = distill(make(1), None, images(6), loss=loss, config=config)
    assert len(calls) == batches_read
    assert len(records) == math.ceil(epochs)
    assert 0 < records[-1].lr < 0.002  # the schedule has come to its end


def test_a_fraction_needs_a_length() -> None:
    with pytest.raises(InputError, match="__len__"):
        distill(make(1), make(0), iter(images()), config=DistillConfig(epochs=0.5))


def test_accumulated_batches_make_one_step() -> None:
    class Linear(nn.Module):  # no BatchNorm, so that halves of a batch add up to the whole
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(108, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.flatten(1))

    torch.manual_seed(0)
    one, teacher = Linear(), Linear()
    two, (x, y) = copy.deepcopy(one), images(1)[0]
    halves = [(x[:8], y[:8]), (x[8:], y[8:])]
    (record,) = distill(one, teacher, [(x, y)], config=BRIEF)
    (split,) = distill(two, teacher, halves, config=DistillConfig(**{**vars(BRIEF), "accumulate": 4}))
    torch.testing.assert_close(one.fc.weight, two.fc.weight)
    assert split.loss == pytest.approx(record.loss, rel=1e-5)


def test_hugging_face_batches_and_outputs() -> None:
    class HFNet(nn.Module):
        def __init__(self, net: Net) -> None:
            super().__init__()
            self.net = net

        def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(pixel_values)}

    plain, wrapped = make(1), HFNet(make(1))
    data = [{"pixel_values": x, "labels": y} for x, y in images()]
    (record,) = distill(wrapped, HFNet(make(0)), data, config=BRIEF)
    (other,) = distill(plain, make(0), images(), config=BRIEF)
    assert same(wrapped.net, state(plain))
    assert record.task_loss == other.task_loss


def test_without_targets_the_teacher_alone_is_followed() -> None:
    (record,) = distill(make(1), make(0), [x for x, _ in images()], config=BRIEF)
    assert record.task_loss is None
    assert record.loss == record.kd_loss > 0


@pytest.mark.parametrize(("loss", "told"), [({"kd": "mse", "features": ("bn",)}, True), ({"kd": "kl"}, False)])
def test_a_classifier_that_the_loss_does_not_reach_is_told_once(
    loss: dict[str, object], told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    student, teacher = make(1), make()
    before = student.head.weight.clone()
    config = DistillConfig(epochs=2, lr=0.01, weight_decay=0.0, task_weight=0.0, **loss)
    with caplog.at_level("WARNING", "cpd"):
        distill(student, teacher, images(), config=config)
    said = [record.message for record in caplog.records if "not trained: head.weight, head.bias" in record.message]
    assert len(said) == int(told)
    assert torch.equal(student.head.weight, before) is told


def test_what_gets_a_gradient_in_a_later_step_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(3)])
    untouched = Untouched(model)
    for turn in (0, 1):  # as members of a family take turns
        model.zero_grad()
        model[turn](torch.ones(1, 2)).sum().backward()
        untouched.look()
    with caplog.at_level("WARNING", "cpd"):
        untouched.tell()
        untouched.tell()
    assert len(caplog.records) == 1
    assert "not trained: 2.weight." in caplog.text


def test_settings_may_change_between_calls_and_the_users_accelerator_survives() -> None:
    from accelerate import Accelerator

    assert not PartialState._shared_state
    student = make(1)
    for precision in ("no", "bf16", "no"):
        distill(student, make(0), images(2), config=DistillConfig(epochs=1, mixed_precision=precision))
    assert not PartialState._shared_state
    assert student(images(1)[0][0]).dtype == torch.float32
    try:
        mine = Accelerator(mixed_precision="bf16")
        distill(student, make(0), images(2), config=BRIEF)
        assert mine.mixed_precision == "bf16"
        assert AcceleratorState().mixed_precision == "bf16"
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 runs on a GPU")
def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(InputError, match="fp16"):
        distill(make(1), make(0), images(1), config=DistillConfig(epochs=1, mixed_precision="fp16"))
    assert not PartialState._shared_state


def test_what_does_not_fit_is_refused() -> None:
    student, data = make(1), images(1)
    with pytest.raises(InputError, match=r"share the parameter 'conv.weight'"):
        distill(student, student, data, config=BRIEF)
    with pytest.raises(InputError, match="needs a teacher"):
        distill(student, None, data, config=BRIEF)
    with pytest.raises(InputError, match=r"requires_grad"):
        distill(make(1).requires_grad_(False), make(0), data, config=BRIEF)
    with pytest.raises(InputError, match="has no target"):
        distill(student, None, [data[0][0]], config=DistillConfig(epochs=1, kd="none"))
    with pytest.raises(InputError, match="no gradient"):
        distill(
            student,
            None,
            data,
            loss=lambda output, target: torch.tensor(1.0),
            config=DistillConfig(epochs=1, kd="none"),
        )
    with pytest.raises(InputError, match="same task"):
        distill(student, nn.Sequential(nn.Flatten(), nn.Linear(108, 7)), data, config=BRIEF)


def test_no_progress_line_is_written_to_what_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    """In a terminal there is one: see tests/model/test_progress.py."""
    for wanted in (None, False, True):
        distill(make(1), make(0), images(2), config=replace(BRIEF, progress=wanted))
        assert capfd.readouterr() == ("", "")


def test_record_is_plain() -> None:
    record = EpochRecord(1, 0.5, None, 0.5, 0.1, 9.0)
    assert str(record) == "Epoch 1: loss 0.5 (distillation 0.5), 9 steps/s"
    assert str(replace(record, task_loss=0.25, metric=97.5)) == (
        "Epoch 1: loss 0.5 (task 0.25, distillation 0.5), metric 97.5, 9 steps/s"
    )
    assert list(record.to_dict()) == [
        "epoch",
        "loss",
        "task_loss",
        "kd_loss",
        "lr",
        "steps_per_second",
        "metric",
        "kept",
    ]
