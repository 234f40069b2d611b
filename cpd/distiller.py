"""Distill: a narrower student is trained back against the unpruned teacher, `L = L_task + weight * L_KD`.

Reading order: the settings, `distill`, and the loop that it runs. The parts of the loss are in `cpd.losses`, what
is put back after a training in `cpd.training`. Devices, mixed precision and DDP are left to `accelerate`.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import islice
from numbers import Real
from statistics import fmean
from types import GeneratorType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cpd import processes
from cpd.errors import CPDError, InputError, TrainingError
from cpd.inputs import Batch, batches, check_model, logits, move
from cpd.losses import KD_LOSSES, LossFunction, task_loss
from cpd.pruner import Pruner
from cpd.surgeon import named_tensors, restore, state_of
from cpd.training import Trainee, accelerating, placed, random_states_kept, seeded

log = logging.getLogger("cpd")

Evaluate = Callable[[nn.Module], float]
DEFAULT_LR = {"sgd": 0.01, "adamw": 5e-4}


def _within(value: object, low: float, below: float = math.inf, *, exclusive: bool = False) -> bool:
    """True if `value` is a real number in `[low, below)`, in `(low, below)` if exclusive."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    return low <= float(value) < below and not (exclusive and float(value) == low)


def _knows_optimizer(name: object) -> bool:
    """True if timm can make an optimizer of that name."""
    if not isinstance(name, str) or name in DEFAULT_LR:
        return isinstance(name, str)
    from timm.optim import list_optimizers  # some seconds to import, hence not at the top

    return name in list_optimizers()


@dataclass(frozen=True)
class DistillConfig:
    """How a student is trained; every value is checked on construction.

    Attributes:
        epochs: passes over the data, >= 0. A fraction (0.5, 2.5) ends within the last pass and needs data
            with a length. 0 trains nothing.
        optimizer: a name of `timm.optim.list_optimizers()`, as "sgd" (with Nesterov momentum) or "adamw".
        lr: the peak learning rate, > 0. None takes 0.01 for "sgd", 5e-4 for "adamw"; any other optimizer
            needs it given.
        momentum: of the optimizers that have one, in [0, 1).
        weight_decay: >= 0; biases and norm weights (all 1-d parameters) are left out, as timm does.
        warmup: the share of the training, in [0, 1), in which the rate rises linearly from zero to its
            peak; from there it falls to zero as half a cosine. It is set anew at every step.
        kd: the distillation loss: "kl" (`kl_divergence`), or "none".
        kd_weight: the weight of the distillation loss beside the task's, >= 0; 0 is the same as kd="none".
        temperature: by which the logits are divided in the distillation loss, > 0.
        mixed_precision: "no", "bf16", or "fp16" (with loss scaling; not on a CPU).
        accumulate: batches whose gradients are averaged for one step, >= 1.
        max_grad_norm: the L2 norm to which the gradient of all parameters is clipped, > 0; None: no clipping.
        seed: for `random`, NumPy and PyTorch while training, >= 0; their former states are put back after it.
        progress: whether a progress bar is shown on stderr; None: if stderr is a terminal.

    Raises:
        InputError: if a value is out of range; the message gives the range.
    """

    epochs: float = 10
    optimizer: str = "sgd"
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup: float = 0.05
    kd: str = "kl"
    kd_weight: float = 1.0
    temperature: float = 2.0
    mixed_precision: str = "no"
    accumulate: int = 1
    max_grad_norm: float | None = 5.0
    seed: int = 0
    progress: bool | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        kinds, clip = (*KD_LOSSES, "none"), self.max_grad_norm
        checks = (
            ("epochs", _within(self.epochs, 0), "a finite number >= 0 (0 trains nothing)"),
            ("optimizer", _knows_optimizer(self.optimizer), "a name of timm.optim.list_optimizers()"),
            ("lr", self.lr is None or _within(self.lr, 0, exclusive=True), "a number > 0, or None"),
            ("lr", self.lr is not None or self.optimizer in DEFAULT_LR, "given for this optimizer"),
            ("momentum", _within(self.momentum, 0, 1), "in [0, 1)"),
            ("weight_decay", _within(self.weight_decay, 0), "a number >= 0"),
            ("warmup", _within(self.warmup, 0, 1), "a share of the training in [0, 1)"),
            ("kd", self.kd in kinds, f"one of {', '.join(kinds)}"),
            ("kd_weight", _within(self.kd_weight, 0), "a number >= 0"),
            ("temperature", _within(self.temperature, 0, exclusive=True), "a number > 0"),
            ("mixed_precision", self.mixed_precision in ("no", "fp16", "bf16"), "one of no, fp16, bf16"),
            ("accumulate", isinstance(self.accumulate, int) and self.accumulate >= 1, "an integer >= 1"),
            ("max_grad_norm", clip is None or _within(clip, 0, exclusive=True), "a number > 0, or None"),
            ("seed", isinstance(self.seed, int) and 0 <= self.seed < 2**31, "an integer in [0, 2^31)"),
            ("progress", self.progress in (None, True, False), "True, False, or None"),
        )
        for name, good, wanted in checks:
            if not good:
                raise InputError(f"DistillConfig: {name} is {getattr(self, name)!r}; it must be {wanted}.")

    @property
    def peak_lr(self) -> float:
        """The learning rate at the end of the warm-up."""
        return self.lr if self.lr is not None else DEFAULT_LR[self.optimizer]

    @property
    def needs_teacher(self) -> bool:
        """Whether the distillation loss counts."""
        return self.kd != "none" and self.kd_weight > 0


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch of `distill` gave; losses are means over its batches.

    Attributes:
        epoch: counted from 1.
        loss: the whole loss that was minimised.
        task_loss: its task part; None if there was no target.
        kd_loss: its distillation part before weighting; None without one.
        lr: the learning rate at the last step.
        steps_per_second: optimizer steps a second, evaluation not counted.
        metric: what `evaluate` returned; None without it.
    """

    epoch: int
    loss: float
    task_loss: float | None
    kd_loss: float | None
    lr: float
    steps_per_second: float
    metric: float | None = None

    def to_dict(self) -> dict[str, float | int | None]:
        """The fields by name, ready for JSON."""
        return asdict(self)


def lr_factor(progress: float, warmup: float) -> float:
    """The share of the peak learning rate at `progress` in [0, 1] of the training.

    Linear up to `warmup`, then `(1 + cos(pi * t)) / 2`, eq. 5 of SGDR (arXiv 1608.03983) without restarts.
    """
    if progress < warmup:
        return progress / warmup
    return (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup)))) / 2


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    data: Iterable[Any],
    *,
    loss: LossFunction | None = None,
    evaluate: Evaluate | None = None,
    config: DistillConfig | None = None,
    pruner: Pruner | None = None,
) -> list[EpochRecord]:
    """Train `student` in place against `teacher`: `task_loss + kd_weight * kd_loss`.

    Runs wherever `accelerate` puts it: on the GPU if there is one, on several under `accelerate launch`,
    where each process takes its share of the batches. Afterwards devices, training flags and
    `requires_grad` of both models, the global random states and accelerate's global state are as before;
    the student's gradients are cleared. The same seed and data give the same weights on a CPU; on a GPU
    as far as its kernels are deterministic.

    Args:
        student: the model to train: its parameters with `requires_grad`.
        teacher: a model with the same logits; not changed. May be None if `config` has no distillation loss.
        data: batches as `cpd.inputs.as_batch` takes them, in any iterable that can be iterated once an
            epoch. Without a length, the learning rate stands still in its first epoch.
        loss: the task's loss; inferred by `task_loss` if None.
        evaluate: called after each epoch, without gradients, on the student in evaluation mode on the
            training device (under DDP in every process); its number becomes `EpochRecord.metric`.
        config: the settings; `DistillConfig()` if None.
        pruner: of the student, which it shrinks on its schedule meanwhile; its optimizer is set.

    Returns:
        One record an epoch; empty for `epochs=0`, where nothing is read or changed.

    Raises:
        InputError: if models, targets and outputs do not fit each other, or the machine not the config.
        TrainingError: if the data is empty, cannot be iterated again, or the loss or a weight is not
            finite. The student then has the weights from the start of that epoch.
    """
    config = config or DistillConfig()
    _check_models(student, teacher, config)
    if config.epochs == 0:
        return []
    _check_data(data, config)
    with accelerating(config.mixed_precision) as accelerator, random_states_kept():
        set_seed(config.seed, device_specific=True)
        device, reference = accelerator.device, teacher if config.needs_teacher else None
        with placed(student, device), placed(reference, device):
            return _Run(accelerator, student, reference, data, loss, config, pruner).train(evaluate)


def _check_models(student: nn.Module, teacher: nn.Module | None, config: DistillConfig) -> None:
    """Raise `InputError` unless the student can be trained and the teacher, if needed, is another model."""
    trained = {id(p): name for name, p in check_model(student).named_parameters() if p.requires_grad}
    if not trained:
        raise InputError("No parameter of the student has requires_grad: set it on those to be trained.")
    if not config.needs_teacher:
        return
    if teacher is None:
        raise InputError(f"kd={config.kd!r} needs a teacher: pass the unpruned model, or kd='none'.")
    shared = [trained[id(p)] for p in check_model(teacher).parameters() if id(p) in trained]
    if shared:
        raise InputError(
            f"Student and teacher share the parameter {shared[0]!r}, so the teacher would change with the "
            "student. Pass as teacher a copy.deepcopy(model) made before pruning."
        )


def _check_data(data: Iterable[Any], config: DistillConfig) -> None:
    """Raise before anything is read if the data cannot last as many epochs as are asked for."""
    if isinstance(data, (GeneratorType, map, filter, zip)) and config.epochs > 1:
        raise TrainingError(
            f"The data is a {type(data).__name__}, which can be iterated once only, but epochs is "
            f"{config.epochs:g}. Pass a DataLoader, a list, or an object whose __iter__ starts afresh."
        )
    if config.epochs < 1 and _length(data) is None:
        raise InputError("A fraction of an epoch needs data with a length (__len__); use epochs=1.")


def _length(data: Iterable[Any]) -> int | None:
    """The number of batches; None if the data does not tell."""
    try:
        return len(data)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def steps_per_epoch(data: Iterable[Any], accumulate: int = 1) -> int | None:
    """Optimizer steps in one pass over the data, with `accumulate` batches a step; None if the data has no length."""
    length, count = _length(data), processes.count()
    if length is None:
        return None
    return math.ceil((math.ceil(length / count) if _is_shared_out(data) else length // count) / accumulate)


def _is_shared_out(data: Iterable[Any]) -> bool:
    return processes.count() > 1 and isinstance(data, DataLoader)


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
        pruner: Pruner | None,
    ) -> None:
        from timm.optim import create_optimizer_v2  # some seconds to import, hence not at the top

        self.accelerator, self.student, self.teacher = accelerator, student, teacher
        self.loss, self.config, self.pruner = loss, config, pruner
        plain = config.optimizer == "sgd" and config.momentum == 0  # which Nesterov's form does not allow
        name = "momentum" if plain else config.optimizer
        optimizer = create_optimizer_v2(student, name, config.peak_lr, config.weight_decay, config.momentum)
        self.peaks = [float(group["lr"]) for group in optimizer.param_groups]
        self.trainee, self.optimizer = accelerator.prepare(Trainee(student), optimizer)
        if pruner is not None:
            pruner.optimizer = optimizer
        self.data, self.steps = data, steps_per_epoch(data, config.accumulate)
        #: Accelerate shares out a DataLoader, so that no process loads what another one takes.
        self.shard = accelerator.prepare_data_loader(data) if _is_shared_out(data) else processes.Share(data)

    def train(self, evaluate: Evaluate | None) -> list[EpochRecord]:
        """All epochs; what an epoch that fails has done since the last shrink is undone."""
        records: list[EpochRecord] = []
        wanted = sys.stderr.isatty() if self.config.progress is None else self.config.progress
        hidden = not (wanted and self.accelerator.is_main_process)
        with Progress(console=Console(stderr=True), disable=hidden) as bar:
            for epoch in range(math.ceil(self.config.epochs)):
                self.kept = state_of(self.student)
                try:
                    with seeded(self.data, self.config.seed + epoch):
                        record = self.epoch(epoch, bar)
                    _check_weights(self.student, self.kept, epoch)
                except CPDError:
                    restore(self.student, self.kept)
                    raise
                finally:
                    self.student.zero_grad(set_to_none=True)
                records.append(self.evaluated(record, evaluate))
                log.info("distill: %s", records[-1])
        return records

    def epoch(self, epoch: int, bar: Progress) -> EpochRecord:
        """One pass over the data, or the fraction of it that is left."""
        config, done, sums = self.config, 0, defaultdict[str, list[float]](list)
        share = min(1.0, config.epochs - epoch)
        limit = max(1, round(share * self.steps)) if self.steps is not None and share < 1 else None
        task = bar.add_task(f"epoch {epoch + 1}", total=limit or self.steps)
        self.student.to(self.accelerator.device).train()
        start = time.perf_counter()
        for group in islice(self.groups(epoch), limit):
            inside = 0.5 if self.steps is None else min(1.0, (done + 0.5) / self.steps)
            factor = lr_factor((epoch + inside) / config.epochs, config.warmup)
            self.step(group, factor, f"step {done + 1} of epoch {epoch + 1}", sums)
            done += 1
            if self.pruner is not None and self.pruner.step():
                self.shrunk()
            bar.update(task, advance=1, description=f"epoch {epoch + 1}  loss {sums['loss'][-1]:.4g}")
        speed = done / (time.perf_counter() - start)
        self.steps = done if limit is None else self.steps
        means = {name: fmean(values) for name, values in sums.items()}
        lr = float(self.optimizer.param_groups[0]["lr"])
        return EpochRecord(epoch + 1, means["loss"], means.get("task"), means.get("kd"), lr, speed)

    def groups(self, epoch: int) -> Iterator[list[Batch]]:
        """This process's batches in runs of `accumulate`; the last run may be shorter.

        Where accelerate does not share out a loader, process i of n takes every n-th batch from the i-th on, and an
        incomplete last round is left out.
        """
        mine = batches(self.shard)
        try:
            while group := list(islice(mine, self.config.accumulate)):
                yield group
        except TrainingError as error:
            if epoch == 0:
                raise
            raise TrainingError(
                f"The data gave batches in epoch 1 but none in epoch {epoch + 1}: it can be iterated once "
                "only. Pass a DataLoader, a list, or an object whose __iter__ starts afresh. The student keeps "
                "what it learned in the epochs before."
            ) from error

    def shrunk(self) -> None:
        """The student is narrower now: wrap it anew, and take what it has become for what is put back."""
        self.kept = state_of(self.student)
        if self.accelerator.num_processes > 1:  # the buckets of DDP have the old shapes
            self.accelerator._models.remove(self.trainee)
            self.trainee = self.accelerator.prepare_model(Trainee(self.student))

    def step(self, group: list[Batch], factor: float, where: str, sums: dict[str, list[float]]) -> None:
        """One optimizer step on the mean gradient of the group; each batch's losses are added to `sums`."""
        for options, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            options["lr"] = peak * factor
        self.optimizer.zero_grad()
        for batch in group:
            with nullcontext() if batch is group[-1] else self.accelerator.no_sync(self.trainee):
                parts = self.losses(batch)
                values = self.reduced(parts)
                if not math.isfinite(values["loss"]):
                    raise TrainingError(
                        f"The loss is not finite at {where} ({values}); the student is back at its weights "
                        f"from the start of the epoch. Check the batch for NaN, or take a lower lr than "
                        f"{self.config.peak_lr:g} (or another mixed_precision, if any is set)."
                    )
                self.accelerator.backward(parts["loss"] / len(group))
            for name, value in values.items():
                sums[name].append(value)
        if self.config.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self.trainee.parameters(), self.config.max_grad_norm)
        self.optimizer.step()

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The parts of the loss on one batch, `loss` being their weighted sum."""
        config, device, parts = self.config, self.accelerator.device, dict[str, Tensor]()
        call = batch.call.to(device)
        output = call.on(self.trainee)
        task = task_loss(output, move(batch.target, device), self.loss)
        if task is not None:
            parts["task"] = parts["loss"] = task
        if self.teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                reference = call.on(self.teacher)
            parts["kd"] = KD_LOSSES[config.kd](logits(output), logits(reference), config.temperature)
            parts["loss"] = config.kd_weight * parts["kd"] + (0 if task is None else task)
        if "loss" not in parts:
            raise InputError("A batch has no target and kd is 'none': pass loss=, targets, or kd='kl'.")
        if not parts["loss"].requires_grad:
            raise InputError("The loss has no gradient: compute it from the output, without detaching it.")
        return parts

    def reduced(self, parts: dict[str, Tensor]) -> dict[str, float]:
        """The parts as numbers, averaged over the processes: what is not finite is seen by all of them."""
        values = torch.stack([part.detach().float() for part in parts.values()])
        return dict(zip(parts, self.accelerator.reduce(values, reduction="mean").tolist(), strict=True))

    def evaluated(self, record: EpochRecord, evaluate: Evaluate | None) -> EpochRecord:
        """The record with the user's metric; under DDP all processes first take over the buffers of one."""
        if self.accelerator.num_processes > 1:
            for buffer in self.student.buffers():
                buffer.copy_(broadcast(buffer))
        if evaluate is None:
            return record
        self.student.eval()
        with random_states_kept(), torch.no_grad():
            return replace(record, metric=float(evaluate(self.student)))


@torch.no_grad()
def _check_weights(student: nn.Module, kept: dict[str, Tensor], epoch: int) -> None:
    """Raise `TrainingError` if a value that was finite in `kept` no longer is."""
    for name, tensor in named_tensors(student).items():
        if bool((kept[name].isfinite() & ~tensor.isfinite()).any()):
            raise TrainingError(
                f"{name!r} holds values that are not finite after epoch {epoch + 1}; the student is back at "
                "its weights from the start of the epoch. Take a lower lr, or set max_grad_norm."
            )
