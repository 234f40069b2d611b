"""Recovery without training: compensation, BatchNorm recalibration, or both: what comes nearest to the original.

Compensation fits each layer to what it gave before; recalibration restores the spread of every BatchNorm's input,
which least squares shrinks. Where little went, both together are best; where much went, recalibration after
compensation amplifies errors. So all four are tried, and the outputs decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cpd.errors import InputError
from cpd.model.inputs import batches, device_of, evaluating, logits
from cpd.model.outputs import whole
from cpd.model.tensors import restore, state_of
from cpd.plan import Plan
from cpd.surgery.batchnorm import recalibrate_batchnorm
from cpd.surgery.compensation import compensate


@dataclass(frozen=True)
class Recovery:
    """What was tried.

    Attributes:
        chosen: name of what was kept.
        errors: name -> mean squared difference of the logits from the unpruned model's, relative to their variance.
        failure: why compensation was not possible, if it was not.
    """

    chosen: str
    errors: dict[str, float]
    failure: str | None = None

    def __str__(self) -> str:
        tried = ", ".join(f"{name} {error:.3g}" for name, error in self.errors.items())
        return f"Recovery without training: kept {self.chosen!r}. Relative squared error of the logits: {tried}."


def recover(
    model: nn.Module,
    original: nn.Module,
    plan: Plan,
    data: Iterable[Any],
    *,
    limit: int = 16,
    compensation: bool = True,
    read: Callable[[Any], Any] = whole,
) -> Recovery:
    """Bring a narrower model near to the unpruned one, in place, by forward passes alone.

    Args:
        model: the narrower model.
        original: the unpruned one; left as it was.
        plan: what `model` keeps of it.
        data: batches; targets are not used.
        limit: at most this many are read.
        compensation: whether closed-form compensation is tried too.
        read: gives the part of an output that matters.

    Raises:
        TrainingError: if there is no data, or statistics are not finite.
    """
    failure = None
    errors = {"nothing": logits_error(model, original, data, limit, read)}
    states = {"nothing": state_of(model)}

    def note(name: str) -> None:
        errors[name], states[name] = logits_error(model, original, data, limit, read), state_of(model)

    if recalibrate_batchnorm(model, data, limit=limit):
        note("recalibration")
    restore(model, states["nothing"])
    if compensation:
        try:
            compensate(model, original, plan, data, limit=limit)
            note("compensation")
            if "recalibration" in errors and recalibrate_batchnorm(model, data, limit=limit):
                note("compensation and recalibration")
        except InputError as error:
            failure = str(error)
    chosen = min(errors, key=lambda name: errors[name])
    restore(model, states[chosen])
    return Recovery(chosen, errors, failure)


@torch.no_grad()
def logits_error(
    model: nn.Module,
    original: nn.Module,
    data: Iterable[Any],
    limit: int | None = None,
    read: Callable[[Any], Any] = whole,
) -> float:
    """The mean squared difference of two models' logits, relative to the variance of the second's."""
    difference = total = count = 0.0
    mean: Tensor | float = 0.0
    with evaluating(model), evaluating(original):
        for batch in batches(data, limit):
            found = logits(read(batch.to(device_of(model)).on(model))).double()
            expected = logits(read(batch.to(device_of(original)).on(original))).double().to(found.device)
            difference += float((found - expected).square().sum())
            mean = mean + expected.sum(0)
            total += float(expected.square().sum())
            count += len(expected)
    spread = total - float((torch.as_tensor(mean) / count).square().sum()) * count
    return difference / max(spread, 1e-30)
