"""The best of a training is kept: of before it, and of every epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import cpd
from cpd.distillation.distiller import DistillConfig, distill
from cpd.files.checkpoint import Checkpoint
from helpers.teaching import images, make, same, state
from helpers.tiny import INPUT, Tiny
from helpers.tiny import loader as tiny_loader


def judged(values: list[float], seen: list[dict[str, Tensor]]) -> Callable[[nn.Module], float]:
    """Gives these values in turn, and notes the weights that they were given for."""
    left: Iterator[float] = iter(values)

    def evaluate(model: nn.Module) -> float:
        seen.append(state(model))
        return next(left)

    return evaluate


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ([0.5, 0.1, 0.9, 0.2], 2),
        ([0.9, 0.1, 0.2, 0.3], 0),  # a training that only makes it worse
        ([0.5, 0.5, 0.5, 0.5], 3),  # of equally good ones the later
    ],
)
def test_the_best_of_before_and_of_every_epoch_is_kept(values: list[float], kept: int) -> None:
    student, seen = make(1), list[dict[str, Tensor]]()
    records = distill(student, make(0), images(2), config=DistillConfig(epochs=3), evaluate=judged(values, seen))
    assert same(student, seen[kept])
    assert [record.epoch for record in records if record.kept] == ([kept] if kept else [])
    assert [record.metric for record in records] == pytest.approx(values[1:])


@pytest.mark.parametrize("values", [[math.nan], [0.5, math.inf]])
def test_a_metric_that_is_not_finite_is_refused(values: list[float]) -> None:
    student = make(1)
    start = state(student)
    with pytest.raises(cpd.InputError, match=r"one finite number.* (before the training|after epoch 1) it gave"):
        distill(student, make(0), images(2), config=DistillConfig(epochs=3), evaluate=judged(values, []))
    assert same(student, start)


def test_the_last_is_kept_where_that_is_wanted_or_nothing_is_evaluated() -> None:
    student, seen = make(1), list[dict[str, Tensor]]()
    config = DistillConfig(epochs=3, keep_best=False)
    records = distill(student, make(0), images(2), config=config, evaluate=judged([0.9, 0.5, 0.1], seen))
    assert same(student, seen[-1])
    assert [record.kept for record in records] == [False, False, True]
    assert distill(student, make(0), images(2), config=DistillConfig(epochs=1))[-1].kept


def test_what_is_known_of_before_is_not_evaluated_again() -> None:
    student, seen = make(1), list[dict[str, Tensor]]()
    start = state(student)
    distill(student, make(0), images(2), config=DistillConfig(epochs=1), evaluate=judged([0.1], seen), before=0.9)
    assert len(seen) == 1
    assert same(student, start)


def test_an_average_of_the_weights_is_what_is_kept() -> None:
    student, seen = make(1), list[dict[str, Tensor]]()
    config = DistillConfig(epochs=2, ema=0.5)
    distill(student, make(0), images(2), config=config, evaluate=judged([0.1, 0.9, 0.2], seen))
    assert same(student, seen[1])


def test_the_best_is_in_the_checkpoint(tmp_path: Path) -> None:
    student, seen = make(1), list[dict[str, Tensor]]()

    def evaluate(model: nn.Module) -> float:
        if len(seen) == 2:
            raise KeyboardInterrupt
        return judged([(0.5, 0.9)[len(seen)]], seen)(model)

    config = DistillConfig(epochs=3)
    checkpoint = Checkpoint(tmp_path, {}, minutes=1e-9)  # written after every step
    with pytest.raises(KeyboardInterrupt):
        distill(student, make(0), images(2), config=config, evaluate=evaluate, checkpoint=checkpoint)
    again = Checkpoint(tmp_path, {})
    again.read()
    student = make(1)
    distill(student, make(0), images(2), config=config, evaluate=lambda model: 0.1, checkpoint=again)
    assert same(student, seen[1])


@pytest.mark.usefixtures("undeployed")
@pytest.mark.parametrize("schedule", ["one-shot", "linear"])
def test_compress_keeps_the_best_once_all_pruning_is_done(schedule: str) -> None:
    """The metric falls with every call: before pruning, after it, recovered, epochs 1 to 4."""
    calls = list[int]()

    def falling(model: nn.Module) -> float:
        calls.append(model.conv1.out_channels)
        return 100.0 - len(calls)

    torch.manual_seed(0)
    result = cpd.compress(
        Tiny(), target_macs=0.5, data=tiny_loader(), example_inputs=INPUT, evaluate=falling, epochs=4,
        schedule=schedule, prune_until=0.5,
    )  # fmt: skip
    kept = [row["epoch"] for row in result.report.history if row.get("kept")]
    narrowest = result.model.conv1.out_channels
    if schedule == "one-shot":
        assert kept == [0]
        assert result.report.result.metric == result.report.history[0]["metric"]
        assert any("No epoch improved the model" in note for note in result.report.notes)
    else:
        assert kept == [2]  # the first whose weights are all pruned
        assert calls[kept[0]] == narrowest < calls[kept[0] - 1]
        assert any("The weights after epoch 2 of 4 did best and are kept" in note for note in result.report.notes)
    assert result.report.metric_name == "falling"
