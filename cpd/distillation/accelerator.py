"""The surroundings of a training: accelerate, the random states and the device, each as it was afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cpd.errors import InputError
from cpd.model.inputs import device_of, evaluating


@contextmanager
def accelerating(mixed_precision: str) -> Iterator[Accelerator]:
    """An `Accelerator` for the length of a block.

    Accelerate keeps its settings in process-wide dictionaries and refuses a second `Accelerator` with
    others. They are emptied for ours and filled again after it, so that one of the user's own stays usable.

    Args:
        mixed_precision: "no", "bf16" or "fp16".

    Raises:
        InputError: for "fp16" on a CPU.
    """
    shared = (AcceleratorState, GradientState)
    kept = [dict(state._shared_state) for state in shared]
    had_partial, processes = bool(PartialState._shared_state), 1
    try:
        for state in shared:
            state._reset_state()
        accelerator = Accelerator(
            mixed_precision=mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the training loop accumulates
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],  # auxiliary heads
        )
        processes = accelerator.num_processes
        if mixed_precision == "fp16" and accelerator.device.type == "cpu":
            raise InputError("mixed_precision='fp16' does not run on a CPU: use 'no' or 'bf16'.")
        yield accelerator
    finally:
        for state, content in zip(shared, kept, strict=True):
            state._reset_state()
            state._shared_state.update(content)
        if not had_partial and processes == 1:  # with more processes their group lives on
            PartialState._reset_state()


@contextmanager
def placed(model: nn.Module | None, device: torch.device) -> Iterator[None]:
    """`model`, if any, on `device` in eval mode for the length of a block; where and as it was after it."""
    if model is None:
        yield
        return
    origin = device_of(model)
    with evaluating(model):
        try:
            model.to(device)
            yield
        finally:
            model.to(origin)


def set_training(student: nn.Module, freeze_batchnorm: bool) -> None:
    """Put a student into train mode; BatchNorms stay in eval mode where they are frozen."""
    student.train()
    for module in student.modules() if freeze_batchnorm else ():
        if isinstance(module, _BatchNorm):
            module.eval()


class Trainee(nn.Module):
    """What accelerate wraps and patches in the student's place, so that the student itself stays as it is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, run: Callable[[nn.Module], Any]) -> Any:
        """What `run` makes of the model: its output, or with that its loss."""
        return run(self.model)
