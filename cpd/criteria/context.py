"""What a criterion is given: the model, its gates, and batches with a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cpd.coupling.comb import Comb
from cpd.criteria.gates import Gates, parameters_of
from cpd.errors import TrainingError
from cpd.model.inputs import Batch, batches, device_of, in_mode
from cpd.model.memory_format import channels_last, takes_channels_last
from cpd.options import instance
from cpd.tasks.loss import loss_on, task_loss

#: float16 gradients of small losses vanish unless the loss is enlarged (Micikevicius et al., arXiv 1710.03740).
LOSS_SCALE = 1024.0


@dataclass(frozen=True)
class Setting:
    """What a criterion works on.

    Attributes:
        model: the unpruned model; a criterion leaves it as it was.
        comb: its comb.
        data: batches, or None.
        loss: `loss(output, target) -> scalar`, the mean over the batch; None infers one.
        limit: at most this many batches are read.
        probes: random vectors a batch, for criteria that draw some.
        seed: for those.
        training: whether the model runs in train mode (batch statistics, dropout) rather than in eval mode.
        precision: the dtype of `torch.autocast`; None computes in the weights' own.
        total: sums a tensor over several processes, each of which has a share of every batch; a criterion that sums
            over batches calls it on its sums.
        place: the rank of this process among those, and how many they are: what each finds of the sums of all may be
            shared out.
        reliability: {group name: how far its scores are no noise, from 0 to 1}, which a criterion fills where its
            samples tell it; selection draws the scores of a group towards their mean by it.
        untrusted: {group name: why its scores say too little}, which a criterion fills; selection leaves these whole.
    """

    model: nn.Module
    comb: Comb
    data: Iterable[Any] | None = None
    loss: Callable[[Any, Any], Tensor] | None = None
    limit: int = 16
    probes: int = 1
    seed: int = 0
    training: bool = False
    precision: torch.dtype | None = None
    total: Callable[[Tensor], Tensor] = lambda tensor: tensor
    place: tuple[int, int] = (0, 1)
    reliability: dict[str, float] = field(default_factory=dict)
    untrusted: dict[str, str] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return device_of(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that gradients are rounded to."""
        found = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
        return self.precision or found

    def batches(self) -> Iterator[Batch]:
        """The batches to score on, on the model's device, the model in its mode meanwhile.

        Running statistics are as before at the end, in train mode too. Images have their channels innermost in memory,
        where the model gives the same for them.

        Raises:
            TrainingError: if there is no data.
        """
        if self.data is None:
            raise TrainingError("This criterion needs data: pass data=loader, or choose criterion='magnitude'.")
        with in_mode(self.model, self.training), _buffers_kept(self.model, self.training):
            innermost = None
            for batch in batches(self.data, self.limit, finite=True):
                call = batch.call.to(self.device)
                if innermost is None:
                    innermost = not self.training and takes_channels_last(
                        self.model, call, self.comb.read, backward=True
                    )
                yield batch.to(self.device)._replace(call=channels_last(call) if innermost else call)

    def own(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Normal numbers of a shape, samples outermost: this process's part of what one process would draw for all."""
        rank, count = self.place
        return torch.randn(count, *shape, generator=generator)[rank]

    def output(self, batch: Batch) -> Any:
        """The model's output; dropout draws the same numbers whenever the same batch is run."""
        with self._repeatable():
            return batch.on(self.model)

    @contextmanager
    def _repeatable(self) -> Iterator[None]:
        """Random numbers that are the same in each such block, and autocast as `precision` says."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            with torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision is not None):
                yield

    def loss_of(self, batch: Batch) -> Tensor:
        """The loss on one batch, a scalar.

        Raises:
            TrainingError: if there is none, or it is not finite.
        """
        if self.loss is None and batch.learn is not None:
            with self._repeatable():
                _, value = loss_on(batch, self.model, None, self.comb.read)
        else:
            value = task_loss(self.output(batch), batch.target, self.loss, self.comb.read, batch.place)
        if value is None:
            raise TrainingError("The batches have no target, so there is no loss to score with: pass loss=….")
        if not bool(torch.isfinite(value)):
            raise TrainingError(f"The loss is {float(value)} on the unpruned model: check the data and the loss.")
        return value

    def gradients(self, batch: Batch, names: list[str]) -> dict[str, Tensor]:
        """dL/dw of some parameters on one batch; those that the loss does not depend on are left out."""
        named = dict(self.model.named_parameters())
        with require_grad(self.model, names), torch.enable_grad():
            scale = LOSS_SCALE if self.dtype is torch.float16 else 1.0
            found = torch.autograd.grad(self.loss_of(batch) * scale, [named[name] for name in names], allow_unused=True)
        return {name: value.div_(scale) for name, value in zip(names, found, strict=True) if value is not None}

    def gate_gradients(self, gates: Gates, batch: Batch) -> list[Tensor]:
        """dL/dm of every gate on one batch: sum of w * dL/dw over the gate's slices."""
        weights, gradients = parameters_of(self.model), self.gradients(batch, gates.tensors)

        def product(name: str) -> Tensor | None:
            gradient = gradients.pop(name, None)  # each is read once; two products need not exist at a time
            return None if gradient is None else gradient.mul_(weights[name])

        return [self.mean(value) for value in gates.reduce(product)]

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over processes: of a gradient, that of the whole batch."""
        found = self.total(torch.cat([tensor.flatten(), tensor.new_ones(1)]))
        return (found[:-1] / found[-1]).view_as(tensor)

    def sum_of(self, count: int) -> int:
        """The sum of a number over processes."""
        return int(self.total(torch.tensor(count)))


SETTING = instance(Setting, "a cpd.criteria.Setting")


@contextmanager
def require_grad(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """These parameters alone require a gradient for the length of a block."""
    wanted = set(names)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted and parameter.is_floating_point())
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _buffers_kept(model: nn.Module, training: bool) -> Iterator[None]:
    """Buffers that a pass in train mode changes are as before at the end."""
    before: Mapping[str, Tensor] = {n: b.clone() for n, b in model.named_buffers()} if training else {}
    try:
        yield
    finally:
        for name, buffer in model.named_buffers():
            if name in before:
                buffer.data.copy_(before[name])
