"""Distill: a narrower student is trained back against the unpruned teacher, `L = L_task + weight * L_KD`.

Reading order: the settings (`config`), `distill`, and the loop that it runs. The parts of the loss are in `losses`,
what is restored after a training in `accelerator`, what is kept in `best`. Devices, mixed precision, DDP: `accelerate`.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import islice
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cpd import processes
from cpd.distillation.accelerator import Trainee, accelerating, placed, set_training
from cpd.distillation.best import Best
from cpd.distillation.config import TRAINING, DistillConfig, EpochRecord, Progressed
from cpd.distillation.kd import Distillation
from cpd.distillation.mixing import Mixing
from cpd.distillation.optimizers import Untouched, lr_schedule, make_optimizer
from cpd.distillation.request import CHECKPOINT, PRUNER, check_data, check_models, is_shared_out, steps_per_epoch
from cpd.errors import CheckpointError, CPDError, InputError, TrainingError
from cpd.files.checkpoint import Checkpoint
from cpd.files.reading import conform
from cpd.model.arguments import DATA, MODEL
from cpd.model.inputs import Batch, batches, evaluated
from cpd.model.outputs import Outputs, reader
from cpd.model.progress import Part, part, shown
from cpd.model.randomness import random_states, random_states_kept, seeded, set_random_states
from cpd.model.tensors import named_tensors, restore, state_of
from cpd.options import EVALUATE, LOSS, NUMBER, OUTPUTS, checked, or_none
from cpd.tasks.loss import LossFunction, loss_on
from cpd.tasks.metric import metric_name

if TYPE_CHECKING:
    from timm.utils import ModelEmaV3

log = logging.getLogger("cpd")

Evaluate = Callable[[nn.Module], float]


class ShrinksWhileTrained(Protocol):
    """What `distill` asks of a pruner: `cpd.Pruner` is one, `cpd.Sparsifier` another.

    Attributes:
        optimizer: whose state is sliced with the parameters; set by `distill`.
        done: whether it will shrink the student no more.
    """

    optimizer: torch.optim.Optimizer | None

    @property
    def done(self) -> bool:
        """Whether it will shrink the student no more."""

    def step(self) -> bool:
        """Note one optimizer step; shrink the student if it is time. True if it shrank."""

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""


@runtime_checkable
class MasksGradients(Protocol):
    """A pruner that keeps weights at zero: `cpd.Sparsifier` is one."""

    def mask_gradients(self) -> None:
        """Set the gradients of those weights to zero, before they are clipped."""


@checked(
    student=MODEL, teacher=or_none(MODEL), data=DATA, loss=LOSS, evaluate=EVALUATE, config=TRAINING, pruner=PRUNER,
    checkpoint=CHECKPOINT, outputs=OUTPUTS, before=NUMBER,
)  # fmt: skip
def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    data: Iterable[Any],
    *,
    loss: LossFunction | None = None,
    evaluate: Evaluate | None = None,
    config: DistillConfig | None = None,
    pruner: ShrinksWhileTrained | None = None,
    checkpoint: Checkpoint | None = None,
    outputs: Outputs | None = None,
    before: float | None = None,
) -> list[EpochRecord]:
    """Train `student` in place to imitate `teacher`, by the loss `task_loss + kd_weight * kd_loss`.

    The training runs on the device that `accelerate` chooses: a GPU if there is one, or several GPUs under `accelerate
    launch`, where each process trains on its share of the batches. Afterwards the devices, training flags and
    `requires_grad` of both models, the global random states and the global state of accelerate are restored; the
    student's gradients are cleared. On a CPU, the same seed and data give the same weights; on a GPU, as far as its
    kernels are deterministic.

    Args:
        student: The model to train. Its parameters with `requires_grad` are trained.
        teacher: A model that returns the same logits; it is not changed. None if `config` has no distillation loss.
        data: Batches of (input, target), or mappings, in any iterable that can be iterated once for each epoch. If it
            has no length, the learning rate is constant in the first epoch.
        loss: The task's loss, `loss(output, target) -> scalar`. Default: cross-entropy if the targets are classes.
        evaluate: `evaluate(model) -> float`, where higher is better. It is called before the training and after each
            epoch, without gradients, on the student in eval mode on the training device (under DDP in every process).
            The number is stored in `EpochRecord.metric` and decides which weights are kept (`keep_best`).
        config: The settings. Default: `DistillConfig()`.
        pruner: A `cpd.Pruner` of the student, which prunes it on its schedule during the training. Its optimizer is
            set.
        checkpoint: Written at the start, at every pruning step, every few minutes and at the end. If it was read
            (`Checkpoint.read`), the training continues from it. `student` and `pruner` must then be in the state from
            before the first pruning step, and the data must come in the same order. It does if the order depends on
            the global random generators, on the loader's own or on `set_epoch`: all of these are seeded in each epoch.
        outputs: The parts of the output that are compared and to which an inferred loss applies, as for `cpd.comb`.
            Default: the logits.
        before: The value of `evaluate` for the student before the training, if it is known.

    Returns:
        One `EpochRecord` for each epoch; `kept` marks the one whose weights the student has. The list is empty for
        `epochs=0`, which reads and changes nothing.

    Raises:
        InputError: If models, targets and outputs do not fit each other, or the config does not fit the machine.
        TrainingError: If the data is empty or cannot be iterated again, or if the loss or a weight is not finite. The
            student then has the weights from the start of that epoch.

    Examples:
        >>> from copy import deepcopy
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))
        >>> comb = cpd.comb(model, torch.randn(1, 3, 8, 8))
        >>> data = [torch.randn(32, 3, 8, 8)]
        >>> student = cpd.shrink(deepcopy(model), comb.plan({"0": range(8)}))
        >>> config = cpd.DistillConfig(epochs=5, task_weight=0)  # the teacher alone, without labels
        >>> epochs = cpd.distill(student, model, data, config=config)
        >>> epochs[-1].kd_loss < epochs[0].kd_loss
        True
    """
    config = config or DistillConfig()
    check_models(student, teacher, config)
    if config.epochs == 0:
        return []
    check_data(data, config)
    with accelerating(config.mixed_precision) as accelerator, random_states_kept():
        device, reference = accelerator.device, teacher if config.needs_teacher else None
        with placed(student, device), placed(reference, device):
            with nullcontext() if checkpoint is None else checkpoint.taken_up():
                run = _Run(accelerator, student, reference, data, loss, config, pruner, checkpoint, reader(outputs))
            return run.train(evaluate, before)


class _Run:
    """One call of `distill`: both models on the training device, the optimizer, and how far the data goes."""

    def __init__(
        self,
        accelerator: Accelerator,
        student: nn.Module,
        teacher: nn.Module | None,
        data: Iterable[Any],
        loss: LossFunction | None,
        config: DistillConfig,
        pruner: ShrinksWhileTrained | None,
        checkpoint: Checkpoint | None,
        read: Callable[[Any], Any],
    ) -> None:
        self.accelerator, self.student, self.teacher = accelerator, student, teacher
        self.loss, self.config, self.pruner, self.checkpoint, self.read = loss, config, pruner, checkpoint, read
        state = None if checkpoint is None else checkpoint.state
        if state is not None:
            if pruner is not None:
                pruner.load_state_dict(state["pruner"])
            _load(student, state["student"])
        self.inner = make_optimizer(student, config.optimizer, config.peak_lr, config.weight_decay, config.momentum)
        self.schedule = lr_schedule(self.inner, config.scheduler, config.epochs, config.warmup)
        self.kd: Distillation | None = None
        if state is not None:
            if teacher is not None and state["kd"] is not None:
                self.kd = Distillation(config, student, teacher, read=read).to(accelerator.device)
                self.kd.load(state["kd"])
                self.add_projections()
            self.inner.load_state_dict(state["optimizer"])
        self.trainee, self.optimizer = accelerator.prepare(Trainee(student), self.inner)
        if pruner is not None:
            pruner.optimizer = self.inner
        self.data, self.steps = data, steps_per_epoch(data, config.accumulate)
        #: Accelerate shares out a DataLoader, so that no process loads what another one takes.
        self.shard = accelerator.prepare_data_loader(data) if is_shared_out(data) else processes.Share(data)
        self.ema, self.mixing, self.untouched = self.averaged(), Mixing(config, read), Untouched(student)
        #: Where the training stands: epochs behind, steps of this one, its losses, records of those behind.
        self.epoch, self.done, self.sums = 0, 0, dict[str, list[float]]()
        self.records, self.best = list[EpochRecord](), Best()

    def averaged(self) -> ModelEmaV3 | None:
        """An average of the student's weights, which starts from what they are now."""
        if self.config.ema is None:
            return None
        from timm.utils import ModelEmaV3

        return ModelEmaV3(self.student, decay=self.config.ema)

    # ------------------------------------------------------------------------------ the loop

    def train(self, evaluate: Evaluate | None, before: float | None) -> list[EpochRecord]:
        """All epochs; what an epoch that fails has done since the last shrink is undone."""
        state, epochs = self.resumed(), math.ceil(self.config.epochs)
        if state is None and evaluate is not None and self.may_be_kept:
            self.best.consider(
                0, self.metric(evaluate, "before the training") if before is None else before, self.judged
            )
        with shown(self.config.progress if self.accelerator.is_main_process else False), self.part() as under_way:
            while self.epoch < epochs:
                self.kept = state_of(self.student)
                try:
                    with seeded(self.data, self.config.seed + self.epoch):
                        record = self.one_epoch(under_way, state)
                    _check_weights(self.student, self.kept, self.epoch)
                    record = self.evaluated(record, evaluate)
                except CPDError:
                    restore(self.student, self.kept)
                    raise
                finally:
                    self.student.zero_grad(set_to_none=True)
                self.records.append(record)
                self.untouched.tell()
                log.info("%s", self.records[-1].told(metric_name(evaluate), epochs))
                log.debug("%s", self.records[-1])
                self.epoch, self.done, self.sums, state = self.epoch + 1, 0, {}, None
        self.keep(metric_name(evaluate))
        self.save()
        return self.records

    def part(self) -> AbstractContextManager[Part]:
        """All epochs as a part of what is under way."""
        total = None if self.steps is None else self.config.epochs * self.steps
        return part("", total, self.done if self.steps is None else self.epoch * self.steps + self.done)

    def one_epoch(self, under_way: Part, state: Mapping[str, Any] | None) -> EpochRecord:
        """One pass over the data, or the fraction of it that is left."""
        config, sums = self.config, defaultdict[str, list[float]](list, self.sums)
        self.sums = sums
        share = min(1.0, config.epochs - self.epoch)
        limit = max(1, round(share * self.steps)) if self.steps is not None and share < 1 else None
        set_training(self.student.to(self.accelerator.device), config.freeze_batchnorm)
        groups = islice(self.groups(), limit)
        if state is not None:  # what has been read is read again, as workers count what they have read
            for _ in islice(groups, self.done):
                pass
            set_random_states(state["random"])
        elif self.epoch == 0:
            self.save()
        start, first, aside = time.perf_counter(), self.done, 0.0
        for group in groups:
            inside = 0.5 if self.steps is None else min(1.0, (self.done + 0.5) / self.steps)
            self.set_lr(self.epoch + inside)
            self.step(group, f"step {self.done + 1} of epoch {self.epoch + 1}")
            self.done += 1
            paused = time.perf_counter()
            shrunk = self.pruner is not None and self.pruner.step()
            if shrunk:
                self.shrunk()
            if self.checkpoint is not None and (shrunk or self.due()):
                self.save()
            aside += time.perf_counter() - paused
            under_way.advance(name=f"epoch {self.epoch + 1} of {math.ceil(config.epochs)}, loss {sums['loss'][-1]:.4g}")
        speed = (self.done - first) / (time.perf_counter() - start - aside)
        if limit is None:
            self.steps, under_way.total = self.done, config.epochs * self.done
        means = {name: fmean(values) for name, values in sums.items()}
        lr = float(self.inner.param_groups[0]["lr"])
        return EpochRecord(self.epoch + 1, means["loss"], means.get("task"), means.get("kd"), lr, speed)

    def groups(self) -> Iterator[list[Batch]]:
        """This process's batches in runs of `accumulate`; the last run may be shorter.

        Where accelerate does not share out a loader, process i of n takes every n-th batch from the i-th on, and an
        incomplete last round is left out.
        """
        mine = batches(self.shard)
        try:
            while group := list(islice(mine, self.config.accumulate)):
                yield group
        except TrainingError as error:
            if self.epoch == 0:
                raise
            raise TrainingError(
                f"The data gave batches in epoch 1 but none in epoch {self.epoch + 1}: it can be iterated only "
                "once. Pass a DataLoader, a list, or an object whose __iter__ starts again from the beginning. The "
                "student keeps what it learned in the earlier epochs."
            ) from error

    def shrunk(self) -> None:
        """The student is narrower now: wrap it anew, and take what it has become for what is put back."""
        self.kept, self.best, self.ema = state_of(self.student), Best(), self.averaged()
        if self.accelerator.num_processes > 1:  # the buckets of DDP have the old shapes
            del self.trainee
            self.accelerator._models.clear()
            gc.collect()  # as long as it lives, so do the gradients' accumulators, which know the old shapes
            self.trainee = self.accelerator.prepare_model(Trainee(self.student))

    # ------------------------------------------------------------------------------ one step

    def set_lr(self, epochs: float) -> None:
        """Set the learning rate of every parameter, so many epochs into the training."""
        self.schedule.step(epochs)
        for options in self.inner.param_groups[1:]:
            if options.get("projection"):
                options["lr"] = self.inner.param_groups[0]["lr"]

    def step(self, group: list[Batch], where: str) -> None:
        """One optimizer step on the mean gradient of the group; each batch's losses are added to `sums`."""
        self.optimizer.zero_grad()
        for batch in group:
            with nullcontext() if batch is group[-1] else self.accelerator.no_sync(self.trainee):
                parts = self.losses(batch)
                values = self.reduced(parts)
                if not math.isfinite(values["loss"]):
                    raise TrainingError(
                        f"The loss is not finite at {where} ({values}). The student has its weights from the epoch's "
                        f"start or the last pruning step again. Check the batch for NaN, or use a lower lr than "
                        f"{self.config.peak_lr:g} (or another mixed_precision, if one is set)."
                    )
                self.accelerator.backward(parts["loss"] / len(group))
            for name, value in values.items():
                self.sums[name].append(value)
        self.untouched.look()
        self.share_projections()
        _mask_gradients(self.pruner)
        if self.config.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self.trainee.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.student)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The parts of the loss on one batch, `loss` being their weighted sum."""
        config, parts = self.config, dict[str, Tensor]()
        batch = batch.to(self.accelerator.device)
        if config.mixup or config.cutmix:
            batch = self.mixing(self.student, batch)
        if self.teacher is not None and self.kd is None:
            self.kd = Distillation(config, self.student, self.teacher, batch.call.part(1), self.read).to(
                self.accelerator.device
            )
        reference = None
        with nullcontext() if self.kd is None else self.kd.watching():
            if self.teacher is not None:
                with torch.no_grad(), self.accelerator.autocast():
                    reference = batch.on(self.teacher, "The teacher")
            output, task = loss_on(batch, self.student, self.loss, self.read, "The student", self.trainee)
        if task is not None:
            parts["task"], parts["loss"] = task, config.task_weight * task
        if self.kd is not None:
            parts["kd"] = self.kd(output, reference, batch.target)
            self.add_projections()
            parts["loss"] = config.weight_of_kd * parts["kd"] + parts.get("loss", 0)
        if "loss" not in parts:
            raise InputError("A batch has no target and kd is 'none': pass targets, loss= or kd='kl' to have a loss.")
        if not parts["loss"].requires_grad:
            raise InputError("The loss has no gradient: compute it from the model's output, without detaching it.")
        return parts

    def reduced(self, parts: dict[str, Tensor]) -> dict[str, float]:
        """The parts as numbers, averaged over the processes: what is not finite is seen by all of them."""
        values = torch.stack([part.detach().float() for part in parts.values()])
        return dict(zip(parts, self.accelerator.reduce(values, reduction="mean").tolist(), strict=True))

    def evaluated(self, record: EpochRecord, evaluate: Evaluate | None) -> EpochRecord:
        """The record with the user's metric; under DDP all processes first take over the buffers of one."""
        if self.accelerator.num_processes > 1:
            processes.copy_from_first(self.student.buffers())
        if evaluate is None:
            return record
        found = self.metric(evaluate, f"after epoch {record.epoch}")
        if self.may_be_kept:
            self.best.consider(record.epoch, found, self.judged)
        return replace(record, metric=found)

    @property
    def judged(self) -> nn.Module:
        """What is evaluated, and has the weights that the student gets in the end."""
        return self.student if self.ema is None else self.ema.module

    def metric(self, evaluate: Evaluate, when: str) -> float:
        """What `evaluate` gives; under DDP the first process's number counts for all."""
        with random_states_kept(), part("evaluate"):
            found = evaluated(evaluate, self.judged, when)
        assert found is not None
        return processes.from_first(lambda: found)

    @property
    def may_be_kept(self) -> bool:
        """Whether the weights as they are now may be those in the end: nothing is pruned after it."""
        return self.config.keep_best and (self.pruner is None or self.pruner.done)

    def keep(self, metric: str) -> None:
        """Give the student the weights that it has in the end, and mark their epoch."""
        kept = self.epoch if self.best.epoch is None else self.best.epoch
        if kept != self.epoch:
            self.best.give(self.student, metric)
        elif self.ema is not None:
            restore(self.student, state_of(self.ema.module))
        self.records = [replace(record, kept=record.epoch == kept) for record in self.records]

    # ------------------------------------------------------------------------------ distillation's own parameters

    def add_projections(self) -> None:
        """Let the optimizer train the projections that there are now."""
        assert self.kd is not None
        now = list(self.kd.projections.values())
        for options in self.inner.param_groups:
            if options.get("projection"):
                for gone in set(options["params"]) - set(now):
                    self.inner.state.pop(gone, None)
                options["params"] = now
                return
        if now:
            first = self.inner.param_groups[0]
            self.inner.add_param_group({"params": now, "projection": True, "lr": first["lr"], "weight_decay": 0.0})

    def share_projections(self) -> None:
        """Average the gradients of the projections, which are no part of what DDP wraps."""
        if self.kd is not None and self.accelerator.num_processes > 1:
            for value in self.kd.projections.values():
                if value.grad is not None:
                    value.grad = processes.total(value.grad) / self.accelerator.num_processes

    # ------------------------------------------------------------------------------ state

    def due(self) -> bool:
        """Whether it is time for a checkpoint; the first process's clock counts."""
        return processes.from_first(lambda: self.checkpoint is not None and self.checkpoint.due)

    def save(self) -> None:
        """Write a checkpoint: all that `resumed` takes up."""
        if self.checkpoint is None:
            return
        state = {
            "epoch": self.epoch,
            "done": self.done,
            "sums": dict(self.sums),
            "records": [record.to_dict() for record in self.records],
            "best": self.best.state_dict(),
            "student": state_of(self.student),
            "optimizer": self.inner.state_dict(),
            "ema": None if self.ema is None else state_of(self.ema.module),
            "kd": None if self.kd is None else self.kd.state(),
            "pruner": None if self.pruner is None else self.pruner.state_dict(),
            "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
            "random": random_states(),
        }
        processes.from_first(lambda: self.checkpoint.write(state))  # type: ignore[union-attr]

    def resumed(self) -> dict[str, Any] | None:
        """Take up the state of the checkpoint, of which models and optimizer have theirs already."""
        if self.checkpoint is None or (state := self.checkpoint.state) is None:
            return None
        with self.checkpoint.taken_up():
            now = conform(state, Progressed, "a state")
            self.epoch, self.done, self.sums, self.records = now.epoch, now.done, now.sums, list(now.records)
            if "best" in state:  # there is none in a checkpoint of an earlier version
                self.best.load_state_dict(state["best"])
            if self.ema is not None and state["ema"] is not None:
                _load(self.ema.module, state["ema"])
            if self.accelerator.scaler is not None and state["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            with random_states_kept():  # they are set where the data goes on
                set_random_states(state["random"])
        log.info("The training continues in epoch %d, after step %d.", self.epoch + 1, self.done)
        return state


def _mask_gradients(pruner: ShrinksWhileTrained | None) -> None:
    """Set the gradients of weights that a pruner keeps at zero to zero."""
    if isinstance(pruner, MasksGradients):
        pruner.mask_gradients()


@torch.no_grad()
def _load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's tensors into a model, all of which must fit."""
    tensors = named_tensors(model)
    wrong = [name for name, found in tensors.items() if name not in state or state[name].shape != found.shape]
    if wrong or len(state) != len(tensors):
        differs = (wrong or sorted(set(state) - set(tensors)))[0]
        raise CheckpointError(f"The checkpoint belongs to a different model: {differs} differs.")
    restore(model, state)


@torch.no_grad()
def _check_weights(student: nn.Module, kept: dict[str, Tensor], epoch: int) -> None:
    """Raise `TrainingError` if a value that was finite in `kept` no longer is."""
    for name, tensor in named_tensors(student).items():
        if bool((kept[name].isfinite() & ~tensor.isfinite()).any()):
            raise TrainingError(
                f"{name!r} holds values that are not finite after epoch {epoch + 1}. The student has its weights from "
                "the start of the epoch again. Use a lower lr, or set max_grad_norm."
            )
