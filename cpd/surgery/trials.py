"""Trials: how near a model stays to what it was once something has gone, without training, tried on copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn

from cpd.model.allocator import memory_reused
from cpd.model.tensors import copy_of
from cpd.plan import Plan
from cpd.surgery.calibration import Calibration
from cpd.surgery.recovery import error_without, recovered_error
from cpd.surgery.shrink import shrink


class Trials:
    """Plans tried on copies of a model; by all processes together, where there are several.

    Args:
        data: batches, as `cpd.model.inputs.as_batch` takes them.
        seed: of the places where layers are looked at.
        memory_gb: GiB of activations that may be alive at a time, about.
        layers: whether layers may be refitted.
        read: gives the part of an output that matters.
    """

    def __init__(
        self, data: Iterable[Any], *, seed: int, memory_gb: float, layers: bool, read: Callable[[Any], Any]
    ) -> None:
        self._calibrated = partial(
            Calibration, data=data, seed=seed, memory_gb=memory_gb, layers=layers, read=read, together=True
        )
        self._calibration: Calibration | None = None

    def forget(self) -> None:
        """The model has changed, or will: what it makes of the data is to be found anew."""
        self._calibration = None

    def calibration(self, unpruned: nn.Module, limit: int) -> Calibration:
        """The data, at most so many batches, and what the model as it is makes of them; found once."""
        if self._calibration is None:
            self._calibration = self._calibrated(unpruned, limit=limit)
        return self._calibration

    @memory_reused()
    def error(self, model: nn.Module, plan: Plan, limit: int, *, roughly: bool) -> float:
        """The error of the logits once a plan has been applied and recovered from; or roughly that."""
        calibration = self.calibration(model, limit)
        return recovered_error(shrink(copy_of(model), plan), calibration, plan, roughly=roughly)

    @memory_reused()
    def error_without(self, model: nn.Module, plan: Plan, limit: int) -> float:
        """The error of the logits without the branches that a plan removes, the layers before them refitted."""
        calibration = self.calibration(model, limit)
        return error_without(shrink(copy_of(model), plan), calibration, plan)
