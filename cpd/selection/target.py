"""Request: what `compress` was asked for, checked before any work is done."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cpd.coupling.cost import Figures
from cpd.deploy.latency import LatencyComparison
from cpd.distillation.losses import task_loss
from cpd.errors import InputError, TargetError, TrainingError
from cpd.model import sources
from cpd.model.inputs import Call, as_call, batches, device_of, evaluating, move
from cpd.selection.selector import Limits

#: Targets that a stop watch decides.
MEASURED = ("target_speedup", "target_latency_ms")


@dataclass(frozen=True)
class Target:
    """One target: a measured speed-up or latency, or a cost figure to get down to."""

    name: str
    value: float

    @property
    def is_measured(self) -> bool:
        """Whether the target is measured rather than computed."""
        return self.name in MEASURED

    def speedup(self, original_ms: float) -> float:
        """A measured target as original over compressed latency.

        Raises:
            TargetError: the original is as fast as that already.
        """
        if self.name == "target_speedup":
            return self.value
        if original_ms <= self.value:
            raise TargetError(
                f"The model takes {original_ms:.3g} ms as it is, and target_latency_ms={self.value:g}: there is "
                "nothing to do. Ask for less."
            )
        return original_ms / self.value

    def attained(self, found: LatencyComparison) -> float:
        """How fast a candidate is for what a measured target asks: 1 is the target, above is faster."""
        if self.name == "target_speedup":
            return found.speedup / self.value
        return self.value / found.candidate_ms

    def of(self, figures: Figures) -> float:
        """The figure of a cost that the target speaks of."""
        names = {"target_macs": "macs", "target_params": "parameters", "target_memory": "activations"}
        return float(getattr(figures, names[self.name]))

    def absolute(self, full: Figures) -> float:
        """The target as a number: a share up to 1 is one of the original's figure."""
        return self.value * self.of(full) if self.value <= 1 else self.value


def check_target(*values: float | None) -> Target:
    """The one target that was given.

    Raises:
        InputError: if it is not exactly one, not a number, or out of range.
    """
    names = (*MEASURED, "target_macs", "target_params", "target_memory")
    given = [Target(name, value) for name, value in zip(names, values, strict=True) if value is not None]
    if len(given) != 1:
        raise InputError(
            f"Give exactly one target of {', '.join(names)}; got {[item.name for item in given] or 'none'}."
        )
    (target,) = given
    if isinstance(target.value, bool) or not isinstance(target.value, (int, float)) or not math.isfinite(target.value):
        raise InputError(f"{target.name} must be a number; got {target.value!r}.")
    if target.name == "target_speedup" and target.value < 1:
        raise InputError(
            f"target_speedup is original over compressed latency, so at least 1; got {target.value:g}. "
            "For half the latency ask for 2."
        )
    if target.name == "target_latency_ms" and target.value <= 0:
        raise InputError(f"target_latency_ms must be above 0; got {target.value:g}.")
    if target.value <= 0:
        raise InputError(f"{target.name} must be above 0: a share up to 1, or a number; got {target.value:g}.")
    return target


def check_limits(
    round_to: int,
    max_ratio: float,
    min_width: int,
    ratios: Mapping[str, float],
    tolerance: float,
    threads: int,
    score_batches: int,
) -> Limits:
    """The limits of a selection, and the other numbers beside them.

    Raises:
        InputError: if one is out of range.
    """
    numbers = {"round_to": round_to, "min_width": min_width, "threads": threads, "score_batches": score_batches}
    for name, value in numbers.items():
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be an integer of at least 1; got {value!r}.")
    for name, share in (("max_ratio", max_ratio), ("tolerance", tolerance)):
        if not 0 < share < 1:
            raise InputError(f"{name} must lie between 0 and 1; got {share!r}.")
    return Limits(round_to, max_ratio, min_width, dict(ratios))


def example_call(model: nn.Module, example_inputs: Any, data: Iterable[Any] | None) -> Call:
    """The example inputs: those given, one sample of the data, or what timm and torchvision models take."""
    if isinstance(data, Iterator):
        raise InputError("data can be iterated only once (it is an iterator); pass a list or a DataLoader.")
    if example_inputs is None and data is not None:
        example_inputs = next(batches(data, 1)).call.part(1)
    if example_inputs is None:
        example_inputs = sources.default_inputs(model)
    if example_inputs is None:
        raise InputError(
            f"The input of {type(model).__name__} is not known: pass example_inputs=, a tensor (with its batch "
            "dimension), a tuple, or (tuple, dict)."
        )
    return as_call(example_inputs).to(device_of(model))


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy of a model.

    Raises:
        InputError: if it cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:  # a user's module may hold anything
        raise InputError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); compress works on a copy. "
            "Detach tensors that the module keeps, or define __deepcopy__."
        ) from error


def check_data(model: nn.Module, data: Iterable[Any], loss: Callable[[Any, Any], Tensor] | None) -> None:
    """The first batch must go through the model and give a finite loss.

    Raises:
        TrainingError: if there is no batch or the loss is not finite.
        InputError: if the model fails on the batch, or no loss can be inferred.
    """
    batch = next(batches(data, 1))
    device = device_of(model)
    with torch.no_grad(), evaluating(model):
        try:
            output = batch.call.to(device).on(model)
        except Exception as error:  # the user's forward may raise anything
            raise InputError(f"The model fails on the first batch of data: {type(error).__name__}: {error}.") from error
        value = task_loss(output, move(batch.target, device), loss)
    if value is not None and not bool(torch.isfinite(value)):
        raise TrainingError(
            f"The loss of the unpruned model on the first batch is {float(value)}: check data and loss."
        )
