"""The surroundings of a training: accelerate, the random states and the device, each as it was afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, set_seed
from torch import nn

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


def random_states() -> dict[str, Any]:
    """The states of the global generators of Python, NumPy and PyTorch."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Put back what `random_states` gave."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Put the global random states of Python, NumPy and PyTorch back at the end."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)


@contextmanager
def seeded(data: Any, seed: int) -> Iterator[None]:
    """Random numbers that depend on `seed` alone for the length of a block, those of a loader too.

    The global generators are seeded (put them back with `random_states_kept`), and for that time those of the loader
    and its samplers; whatever has a `set_epoch` is told the seed in place of an epoch.
    """
    set_seed(seed)
    holders = [data]
    for name in ("data", "dataset", "sampler", "batch_sampler"):
        holders += [inner for holder in holders if (inner := getattr(holder, name, None)) is not None]
    found = [getattr(holder, "generator", None) for holder in holders]
    generators = {id(item): item for item in found if isinstance(item, torch.Generator)}.values()
    states = [(generator, generator.get_state()) for generator in generators]
    for generator, _ in states:
        generator.manual_seed(seed)
    for holder in holders:
        if callable(set_epoch := getattr(holder, "set_epoch", None)):
            set_epoch(seed)
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


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


class Trainee(nn.Module):
    """What accelerate wraps and patches in the student's place, so that the student itself stays as it is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the model."""
        return self.model(*args, **kwargs)
