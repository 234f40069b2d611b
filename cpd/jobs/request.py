"""What a run is given, checked before any work is done."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cpd import processes
from cpd.config import PruneConfig
from cpd.coupling.comb import Comb
from cpd.distillation.config import DistillConfig
from cpd.distillation.request import check_distillation, steps_per_epoch
from cpd.errors import InputError, TrainingError
from cpd.files.checkpoint import Checkpoint
from cpd.model import sources
from cpd.model.inputs import Call, as_call, batches, check_model, device_of, evaluating
from cpd.model.outputs import Outputs, reader
from cpd.model.randomness import random_states_kept
from cpd.model.tensors import copy_of
from cpd.options import changed
from cpd.sparsity.config import SparseConfig
from cpd.tasks.loss import LossFunction, loss_on, read_by_loss_alone
from cpd.tasks.task import DataName, Loaded, Task, task_of

log = logging.getLogger("cpd")


@dataclass(frozen=True)
class Given:
    """What a run is given, once its task has read it.

    Attributes:
        model: the model itself.
        task: what it is for.
        data: batches, or None.
        calibration: likewise.
        evaluate: the user's, or the task's for data that it has read.
        source: how a fresh model is built by name, where that is told.
    """

    model: nn.Module
    task: Task
    data: Iterable[Any] | None
    calibration: Iterable[Any] | None
    evaluate: Callable[[nn.Module], float] | None
    source: str | None

    def completed(self, settings: PruneConfig) -> PruneConfig:
        """The options of pruning with the outputs that matter: those that are named, else those of the task."""
        asked, task = settings.outputs, self.task
        found = task.outputs(self.model) if asked is None else task.chosen(self.model, asked)
        return replace(settings, outputs=found)

    def batches(self) -> tuple[Iterable[Any] | None, Iterable[Any] | None]:
        """Data and calibration, read by the task."""
        data, calibration = (
            None if item is None else self.task.batches(self.model, item) for item in (self.data, self.calibration)
        )
        return data, calibration


def given_of(
    model: nn.Module | str,
    task: Task | None,
    data: Iterable[Any] | DataName | None,
    calibration: Iterable[Any] | DataName | None,
    evaluate: Callable[[nn.Module], float] | None,
    source: str | None,
) -> Given:
    """Build a model that is given by its name, find its task, and have that read what data is given by name.

    Raises:
        InputError: if there is no such model, or no such data.
    """
    if isinstance(model, str):
        found = sources.resolve(model)
        model, source = found.build(pretrained=True).eval(), source or found.recorded
    model = check_model(model)
    task = task_of(model) if task is None else task

    def loaded(data: Iterable[Any] | DataName | None) -> Loaded:
        if isinstance(data, (str, os.PathLike)):
            return task.load(model, data)
        return Loaded([] if data is None else data)

    first, second = loaded(data), loaded(calibration)
    return Given(
        model,
        task,
        None if data is None else first.training,
        first.plain if calibration is None else second.plain or second.training,
        evaluate or first.evaluate,
        source,
    )


def example_call(model: nn.Module, example_inputs: Any, data: Iterable[Any] | None, task: Task | None = None) -> Call:
    """The example inputs: those given, one sample of the data, or what models of the task or the library take."""
    if example_inputs is None and data is not None:
        example_inputs = next(batches(data, 1)).call.part(1)
    if example_inputs is None:
        example_inputs = (task or Task()).example_inputs(model)
    if example_inputs is None:
        raise InputError(
            f"The input of {type(model).__name__} is not known: pass example_inputs=, a tensor (with a batch "
            "dimension), a tuple, or (tuple, dict)."
        )
    return as_call(example_inputs).to(device_of(model))


def check_data(
    model: nn.Module,
    data: Iterable[Any],
    loss: LossFunction | None,
    outputs: Outputs | None,
    training: DistillConfig,
    teacher: nn.Module | None,
) -> None:
    """The first batch must go through the models and give finite losses, of which the model can learn if it is to.

    Raises:
        TrainingError: if there is no batch, its values or its loss are not finite.
        InputError: if a model fails on the batch, no loss can be inferred, or it has no gradient; if the distillation
            loss cannot be taken.
    """
    batch = next(batches(data, 1, finite=True))
    batch, learns = batch.to(device_of(model)), bool(training.epochs and training.task_weight)
    learns = learns and (loss is not None or batch.learn is not None)
    with torch.set_grad_enabled(learns), evaluating(model):
        _, value = loss_on(batch, model, loss, reader(outputs))
    if value is not None and not bool(torch.isfinite(value.detach())):
        raise TrainingError(
            f"The loss of the unpruned model on the first batch is {float(value.detach())}: check data and loss."
        )
    if learns and value is not None and not value.requires_grad and any(p.requires_grad for p in model.parameters()):
        raise InputError(
            "The value that loss returns has no gradient, so the model cannot learn from it: compute it from the "
            "output with torch, without detach(), item() or no_grad()."
        )
    if training.epochs and training.needs_teacher:
        check_distillation(model, copy_of(model) if teacher is None else teacher, batch, training, reader(outputs))


def kept_for_loss(model: nn.Module, data: Iterable[Any] | None, comb: Comb) -> dict[str, float]:
    """The groups that stay whole since the model's own loss alone reads them, as `ratios` of `cpd.PruneConfig`."""
    if data is None:
        return {}
    batch = next(batches(data, 1)).to(device_of(model))
    with evaluating(model), random_states_kept():
        alone = read_by_loss_alone(model, batch, comb.read)
    return {
        glob.escape(group.name): 0.0 for group in comb.open if alone.issuperset(item.tensor for item in group.members)
    }


def training_settings(
    training: DistillConfig | None,
    epochs: float | None,
    lr: float | None,
    seed: int,
    progress: bool | None,
    usual: Mapping[str, Any] | None = None,
) -> DistillConfig:
    """The settings of the training, with those that a run is given by name, and those of the task where none is given.

    A task's `features` are of its `kd`: another loss that is asked for is taken of what it is usually taken of.
    """
    settings = training or DistillConfig()
    own = changed(settings)
    asked = {name: value for name, value in (usual or {}).items() if name not in own}
    if "kd" in own:
        asked.pop("features", None)
    given: dict[str, Any] = {"epochs": epochs, "lr": lr, "progress": progress}
    return replace(settings, seed=seed, **asked, **{name: value for name, value in given.items() if value is not None})


def steps_an_epoch(config: PruneConfig | SparseConfig, training: DistillConfig, data: Iterable[Any] | None) -> int:
    """Optimizer steps in one pass over the data; 0 where there is none, or its length is not known.

    Raises:
        InputError: a schedule that needs a training, or the length of its data.
    """
    gradual = config.schedule != "one-shot" or getattr(config, "regrow", None) is not None
    learned: str | None = getattr(config, "regularization", None)
    if (gradual or learned is not None) and (data is None or not training.epochs):
        during = f"schedule={config.schedule!r} prunes" if gradual else f"regularization={learned!r} acts"
        other = "schedule='one-shot'" if learned is None else "schedule='one-shot' without regularization"
        raise InputError(f"{during} during the training: pass data=loader and epochs above 0, or use {other}.")
    if data is None:
        return 0
    found = steps_per_epoch(data, training.accumulate)
    if found is None and (gradual or config.prune_from):
        raise InputError(f"schedule={config.schedule!r} needs data with a length (__len__), to know when to prune.")
    return found or 0


def checkpoint_of(
    folder: Path | None,
    resume: bool,
    minutes: float,
    config: PruneConfig | SparseConfig,
    training: DistillConfig,
    model: nn.Module,
    given: Mapping[str, Any],
) -> Checkpoint | None:
    """The checkpoint of a run, read if it is to be resumed.

    Args:
        folder: where it lies; None: there is none.
        resume: whether the run is to go on from it.
        minutes: between two writings at least.
        config: the options of pruning, or of sparsity.
        training: those of the training.
        model: the unpruned model.
        given: what else the run is of, as `cpd.jobs.identity` tells it; a checkpoint that was written before there was
            such is taken to be of the same.

    Raises:
        InputError: nowhere to resume from, or a checkpoint that would be overwritten.
        TrainingError: a process that found another checkpoint than the first, or none.
    """
    if folder is None:
        if resume:
            raise InputError("resume=True needs output_dir: pass the folder of the run that should continue.")
        return None
    shapes = sorted((name, *tensor.shape) for name, tensor in model.state_dict().items())
    model_key = hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]
    key = {**config.settings(), **vars(training), "model": model_key, **given}
    del key["progress"]
    usual = {**type(config)().settings(), **vars(DistillConfig()), **given}
    checkpoint = Checkpoint(folder, key, minutes, usual)
    found = checkpoint.read() if resume else None
    processes.check_same(checkpoint.digest, "checkpoint", "Let output_dir be one folder that all machines can read.")
    if resume and found is None:
        log.info("There is no checkpoint in %s yet, so the run starts from the beginning.", folder)
    if not resume and checkpoint.path.exists():
        raise InputError(
            f"{checkpoint.path} belongs to a run that was interrupted. Pass resume=True to continue that run, or "
            "delete the file to start again."
        )
    return checkpoint
