"""Several models of one set of weights, trained together: each is a slice of the widest.

The sandwich rule (Yu and Huang 2019, arXiv 1903.05134): of each batch the widest model learns, the narrowest, and one
of those between, drawn anew; their gradients are added up for one step. The widest learns from the teacher, and the
others, in place, from what the widest has just made of the batch. Each keeps normalization layers of its own, weights
and statistics (Yu et al. 2019, arXiv 1812.08928, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_map_only

from cpd import processes
from cpd.distillation.config import DistillConfig, EpochRecord
from cpd.distillation.distiller import Evaluate, distill
from cpd.distillation.request import length_of
from cpd.errors import InputError
from cpd.model.outputs import Outputs
from cpd.tasks.loss import LossFunction
from cpd.tasks.metric import metric_name, named

Slice = Callable[[str, Tensor], Tensor]
#: Models that learn of each batch: the widest, the narrowest, and so many between.
BETWEEN = 1
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class Slimmable(nn.Module):
    """Models that share weights; which one a forward in training runs goes by turns, from batch to batch.

    Args:
        members: the widest first.
        slices_of: of each after the first: a name and the first's parameter -> what it has of that, on its graph.

    Attributes:
        turn: which of a batch's turns comes next.
        widest: what the widest made of the batch, without its graph.
    """

    def __init__(self, members: Sequence[nn.Module], slices_of: Sequence[Slice]) -> None:
        super().__init__()
        self.members, self.slices_of = nn.ModuleList(members), slices_of
        self.turns, self.turn = min(len(members), 2 + BETWEEN), 0
        self.widest: Any = None
        widest = dict(members[0].named_parameters())
        norms = {
            f"{path}.{name}" if path else name
            for path, module in members[0].named_modules()
            if isinstance(module, _NORMS)
            for name, _ in module.named_parameters(recurse=False)
        }
        self.shared = [
            [name for name, _ in member.named_parameters() if name in widest and name not in norms]
            for member in members[1:]
        ]

    def trains_alone(self) -> list[Tensor]:
        """The parameters of the others that are slices of the widest's: they are not trained themselves."""
        return [
            parameter
            for member, names in zip(self.members[1:], self.shared, strict=True)
            for name, parameter in member.named_parameters()
            if name in names and parameter.requires_grad
        ]

    def slices(self, index: int) -> dict[str, Tensor]:
        """The parameters that a member has from the widest, on the graph of those."""
        widest, cut = dict(self.members[0].named_parameters()), self.slices_of[index - 1]
        return {name: cut(name, widest[name]) for name in self.shared[index - 1]}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the member whose turn it is; out of training, of the widest."""
        if not (self.training and torch.is_grad_enabled()):
            return self.members[0](*args, **kwargs)
        index, self.turn = self._index(), (self.turn + 1) % self.turns
        if index:
            return functional_call(self.members[index], self.slices(index), args, kwargs)
        output = self.members[0](*args, **kwargs)
        self.widest = tree_map_only(Tensor, Tensor.detach, output)
        return output

    def _index(self) -> int:
        """The member of this turn: the widest, the narrowest, and what is drawn of those between."""
        last = len(self.members) - 1
        if self.turn < 2:
            return self.turn * last
        return int(torch.randint(1, last, ()))

    @torch.no_grad()
    def settle(self) -> Sequence[nn.Module]:
        """The members, each with the weights that it has from the widest."""
        for index, member in enumerate(self.members):
            parameters = dict(member.named_parameters())
            for name, value in self.slices(index).items() if index else ():
                parameters[name].copy_(value)
        return list(self.members)


class _InPlace(nn.Module):
    """What the member whose turn it is learns from: the widest from the teacher, the others from the widest."""

    def __init__(self, teacher: nn.Module, student: Slimmable) -> None:
        super().__init__()
        self.teacher, self._student = teacher, (student,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (student,) = self._student
        return student.widest if student.turn and student.training else self.teacher(*args, **kwargs)


class _Repeated:
    """Batches, each so many times in a row in every process."""

    def __init__(self, data: Iterable[Any], times: int) -> None:
        self.data, self.times = data, times

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.data)
        while len(turn := list(islice(batches, processes.count()))) == processes.count():
            for _ in range(self.times):
                yield from turn

    def __len__(self) -> int:
        if (length := length_of(self.data)) is None:
            raise TypeError("The data has no length.")
        return length // processes.count() * processes.count() * self.times


def check_together(config: DistillConfig) -> None:
    """Raise `InputError` where models that share weights cannot be trained as a config says."""
    if config.kd not in ("kl", "cwd", "none") or config.features:
        raise InputError(
            f"together=True compares only logits: kd must be 'kl', 'cwd' or 'none', without features; got kd="
            f"{config.kd!r}. Change it, or train each member by itself: together=False."
        )
    if config.mixup or config.cutmix:
        raise InputError("together=True does not support mixup and cutmix: leave them out, or pass together=False.")


def distill_together(
    members: Sequence[nn.Module],
    slices_of: Sequence[Slice],
    teacher: nn.Module | None,
    data: Iterable[Any],
    *,
    loss: LossFunction | None = None,
    evaluate: Evaluate | None = None,
    config: DistillConfig,
    outputs: Outputs | None = None,
) -> list[EpochRecord]:
    """Train models that are slices of the widest, in place, all at once.

    Args:
        members: the widest first; what the others share with it becomes a slice of it.
        slices_of: of each after the first: a name and the first's parameter -> what it has of that, on its graph.
        teacher: what the widest learns from.
        data: as for `distill`, and so are `loss`, `config` and `outputs`.
        loss: likewise.
        evaluate: of one model; the mean over the members is what counts.
        config: likewise; an epoch is one pass over the data.
        outputs: likewise.

    Raises:
        InputError: if a setting does not suit models that share weights, or what `distill` raises.
    """
    check_together(config)
    student = Slimmable(members, slices_of)
    frozen = student.trains_alone()
    guide = None if teacher is None or not config.needs_teacher else _InPlace(teacher, student)
    settings = replace(config, accumulate=config.accumulate * student.turns)
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        return distill(
            student, guide, _Repeated(data, student.turns), loss=loss, evaluate=_mean(evaluate), config=settings,
            outputs=outputs,
        )  # fmt: skip
    finally:
        student.widest = None
        for parameter in frozen:
            parameter.requires_grad_(True)
        student.settle()


def _mean(evaluate: Evaluate | None) -> Evaluate | None:
    """The mean of a metric over the members."""
    if evaluate is None:
        return None

    @named(metric_name(evaluate))
    def evaluated(student: nn.Module) -> float:
        assert isinstance(student, Slimmable)
        return fmean(evaluate(member) for member in student.settle())

    return evaluated
