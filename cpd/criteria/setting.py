"""What a criterion is given: the model, its gates, and batches with a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cpd.comb import Comb
from cpd.errors import TrainingError
from cpd.gates import Gates, parameters_of
from cpd.inputs import Batch, batches, device_of, evaluating, move
from cpd.losses import task_loss


@dataclass(frozen=True)
class Setting:
    """What a criterion works on.

    Attributes:
        model: the unpruned model; a criterion leaves it as it was.
        comb: its comb.
        data: batches, or None.
        loss: `loss(output, target) -> scalar`; None infers one.
        limit: at most this many batches are read.
        probes: random vectors a batch, for criteria that draw some.
        seed: for those.
    """

    model: nn.Module
    comb: Comb
    data: Iterable[Any] | None = None
    loss: Callable[[Any, Any], Tensor] | None = None
    limit: int = 16
    probes: int = 1
    seed: int = 0

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return device_of(self.model)

    def batches(self) -> Iterator[Batch]:
        """The batches to score on, on the model's device, the model in eval mode meanwhile.

        Raises:
            TrainingError: if there is no data.
        """
        if self.data is None:
            raise TrainingError("This criterion needs data: pass data=loader, or choose criterion='magnitude'.")
        with evaluating(self.model):
            for batch in batches(self.data, self.limit):
                yield Batch(batch.call.to(self.device), move(batch.target, self.device))

    def gradients(self, batch: Batch) -> dict[str, Tensor]:
        """dL/dw of every parameter on one batch.

        Raises:
            TrainingError: if the loss is not finite.
        """
        named = dict(self.model.named_parameters())
        with all_require_grad(self.model), torch.enable_grad():
            value = task_loss(batch.call.on(self.model), batch.target, self.loss)
            if value is None:
                raise TrainingError("The batches have no target, so there is no loss to score with: pass loss=….")
            if not bool(torch.isfinite(value)):
                raise TrainingError(f"The loss is {float(value)} on the unpruned model: check the data and the loss.")
            found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        return {
            name: torch.zeros_like(named[name]) if gradient is None else gradient
            for name, gradient in zip(named, found, strict=True)
        }

    def gate_gradients(self, gates: Gates, batch: Batch) -> list[Tensor]:
        """dL/dm of every gate on one batch: sum of w * dL/dw over the gate's slices."""
        gradients = self.gradients(batch)
        weights = parameters_of(self.model)
        return gates.reduce({name: weights[name] * gradient for name, gradient in gradients.items()})


@contextmanager
def all_require_grad(model: nn.Module) -> Iterator[None]:
    """Every floating parameter requires a gradient for the length of a block, also frozen ones."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(parameter.is_floating_point())
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
