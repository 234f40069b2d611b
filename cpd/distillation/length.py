"""How long the data of a training is, and whether it can be read as often as is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import GeneratorType
from typing import Any

from torch.utils.data import DataLoader

from cpd import processes
from cpd.distillation.config import DistillConfig
from cpd.errors import InputError, TrainingError


def check_data(data: Iterable[Any], config: DistillConfig) -> None:
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
    return math.ceil((math.ceil(length / count) if is_shared_out(data) else length // count) / accumulate)


def is_shared_out(data: Iterable[Any]) -> bool:
    """Whether accelerate gives each process its share of the data."""
    return processes.count() > 1 and isinstance(data, DataLoader)
