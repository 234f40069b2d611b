"""What a training is given, looked at before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from types import GeneratorType
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from cpd import processes
from cpd.distillation.accelerator import placed
from cpd.distillation.config import DistillConfig
from cpd.distillation.kd import Distillation
from cpd.errors import InputError, TrainingError, of_the_user
from cpd.files.checkpoint import Checkpoint
from cpd.model.inputs import Batch, device_of, evaluating
from cpd.model.randomness import random_states_kept
from cpd.options import Check, instance

CHECKPOINT = instance(Checkpoint, "a cpd.files.checkpoint.Checkpoint")
PRUNER = Check(
    "a cpd.Pruner of the student",
    lambda value: (
        not isinstance(value, type)
        and hasattr(value, "optimizer")
        and all(callable(getattr(value, name, None)) for name in ("step", "state_dict", "load_state_dict"))
    ),
)


def check_models(student: nn.Module, teacher: nn.Module | None, config: DistillConfig) -> None:
    """Raise `InputError` unless the student can be trained and the teacher, if needed, is another model."""
    trained = {id(p): name for name, p in student.named_parameters() if p.requires_grad}
    if not trained:
        raise InputError("No parameter of the student has requires_grad: set it on those that should be trained.")
    if not config.needs_teacher:
        return
    if teacher is None:
        raise InputError(f"kd={config.kd!r} needs a teacher: pass the unpruned model, or kd='none'.")
    shared = [trained[id(p)] for p in teacher.parameters() if id(p) in trained]
    if shared:
        raise InputError(
            f"Student and teacher share the parameter {shared[0]!r}, so the teacher would change with the student. "
            "Pass a copy.deepcopy(model) made before pruning as teacher."
        )


def check_data(data: Iterable[Any], config: DistillConfig) -> None:
    """Raise before anything is read if the data cannot last as many epochs as are asked for."""
    if isinstance(data, (GeneratorType, map, filter, zip)) and config.epochs > 1:
        raise TrainingError(
            f"The data is a {type(data).__name__}, which can be iterated only once, but epochs is {config.epochs:g}. "
            "Pass a DataLoader, a list, or an object whose __iter__ starts again from the beginning."
        )
    if config.epochs < 1 and length_of(data) is None:
        raise InputError("A fraction of an epoch needs data with a length (__len__): use epochs=1.")


def check_distillation(
    student: nn.Module, teacher: nn.Module, batch: Batch, config: DistillConfig, read: Callable[[Any], Any]
) -> None:
    """Take the distillation loss once, of a sample or two, before there is a narrower student.

    Raises:
        InputError: if the teacher does not take these inputs, there is no module of a name in `features`, or the loss
            cannot be taken of what the models give.
    """
    few = Batch(batch.call.part(2), None, batch.number)
    with random_states_kept(), torch.no_grad(), placed(teacher, device_of(student)), evaluating(student):
        kd = Distillation(config, student, teacher, few.call.part(1), read).to(device_of(student))
        with kd.watching():
            reference, output = few.on(teacher, "The teacher"), few.on(student)
        with of_the_user(f"kd={config.kd!r}", "on the outputs of the models for the first batch of data"):
            value = kd(output, reference)
    if not bool(torch.isfinite(value)):
        raise InputError(f"The distillation loss kd={config.kd!r} is {float(value)} on the first batch of data.")


def length_of(data: Any) -> int | None:
    """The number of batches, or of samples; None if the data does not tell."""
    try:
        with of_the_user("len(data)"):
            return len(data)
    except InputError as error:
        if isinstance(error.__cause__, (TypeError, NotImplementedError)):
            return None
        raise


def steps_per_epoch(data: Iterable[Any], accumulate: int = 1) -> int | None:
    """Optimizer steps in one pass over the data, with `accumulate` batches a step; None if the data has no length."""
    length, count = length_of(data), processes.count()
    if length is None:
        return None
    return math.ceil((math.ceil(length / count) if is_shared_out(data) else length // count) / accumulate)


def is_shared_out(data: Iterable[Any]) -> bool:
    """Whether accelerate gives each process its share of the batches."""
    return processes.count() > 1 and isinstance(data, DataLoader)
