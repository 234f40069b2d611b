"""Score: one number for every channel of every open group; the lowest go first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cpd import processes
from cpd.coupling.comb import COMB, Comb
from cpd.criteria import CRITERIA, Criterion, Setting
from cpd.criteria.choice import criterion_name
from cpd.criteria.reliability import drawn
from cpd.errors import InputError, TrainingError, of_the_user
from cpd.model.architecture import check_architecture
from cpd.model.arguments import DATA, MODEL
from cpd.model.inputs import check_model
from cpd.options import FLAG, LIMIT, LOSS, SEED, Check, checked, choice, function, is_function, shown
from cpd.plan import Plan

#: Name -> dtype of mixed precision.
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}

_CRITERION = Check(
    "a name in cpd.criteria.CRITERIA, or a function that takes a cpd.criteria.Setting",
    lambda value: is_function(value) or (isinstance(value, str) and value in CRITERIA),
    names=lambda: CRITERIA,
)


class Scores(dict[str, Tensor]):
    """A dict {group name: Tensor[size]} with the score of every channel.

    Attributes:
        untrusted: {group name: why its scores cannot be relied on}. Selection keeps these groups whole.
        reliability: {group name: share of the variation of its scores that is not noise, from 0 to 1}, for groups where
            it can be estimated from the samples.
    """

    def __init__(
        self, scores: Mapping[str, Tensor], untrusted: Mapping[str, str], reliability: Mapping[str, float]
    ) -> None:
        super().__init__(scores)
        self.untrusted, self.reliability = dict(untrusted), dict(reliability)

    def drawn(self) -> dict[str, Tensor]:
        """The scores as selection compares them: each group's scores are shrunk to their mean by their reliability."""
        return {name: drawn(score, self.reliability.get(name, 1.0)) for name, score in self.items()}


@checked(
    model=MODEL, comb=COMB, data=DATA, loss=LOSS, criterion=_CRITERION, limit=LIMIT, probes=LIMIT, seed=SEED,
    training=FLAG, precision=choice(*PRECISIONS), total=function("total(tensor)"),
)  # fmt: skip
def score(
    model: nn.Module,
    comb: Comb,
    data: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    *,
    criterion: str | Criterion = "hessian",
    limit: int = 16,
    probes: int = 1,
    seed: int = 0,
    training: bool = False,
    precision: str | None = None,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Scores:
    """Score every channel of every open group: estimate what its removal costs.

    Selection divides these scores by what a channel saves (the option `normalization` of `cpd.PruneConfig`).

    Args:
        model: The unpruned model. It is not changed.
        comb: The comb of the model.
        data: Batches of (input, target), or mappings. Criteria that look only at the weights need no data.
        loss: `loss(output, target) -> scalar`, the mean over the batch. Default: cross-entropy if the targets are
            classes.
        criterion: A name in `cpd.criteria.CRITERIA`, or a function that takes a `cpd.criteria.Setting` and returns
            {group name: Tensor[size]}.
        limit: Largest number of batches to read.
        probes: Random vectors for each batch, for `hessian`.
        seed: Seed of those vectors, and of dropout in train mode.
        training: Whether the model runs in train mode. Its buffers are restored at the end.
        total: A function that sums a tensor over several processes, each with its share of the batches
            (`cpd.processes.total`).
        precision: "bf16" or "fp16" for mixed precision (`torch.autocast`). Default: the dtype of the weights.

    Returns:
        {group name: Tensor[size]}, float64 on the CPU. The attribute `untrusted` is {group name: why its scores cannot
        be relied on}; `reliability` is {group name: share of their variation that is not noise}; `drawn()` returns the
        scores as selection compares them.

    Raises:
        InputError: The criterion or the precision is unknown, the criterion does not score every group, or the comb
            belongs to another model.
        TrainingError: Data is needed but missing or empty, or a loss is not finite.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))
        >>> comb = cpd.comb(model, torch.randn(1, 3, 8, 8))
        >>> data = [(torch.randn(32, 3, 8, 8), torch.randint(10, (32,)))]
        >>> scores = cpd.score(model, comb, data, criterion="taylor")
        >>> scores["0"].shape
        torch.Size([16])
        >>> plan = comb.plan({"0": scores["0"].topk(8).indices})
        >>> cpd.shrink(model, plan)[0]
        Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
    """
    model = check_model(model)
    check_architecture(
        model, comb.architecture, InputError, "The comb was made for",
        "Call cpd.comb on this model, or, if it was shrunk by a plan, score it with comb.narrowed(model, plan).",
    )  # fmt: skip
    function = CRITERIA[criterion] if isinstance(criterion, str) else criterion
    dtype = None if precision is None else PRECISIONS[precision]
    setting = Setting(model, comb, data, loss, limit, probes, seed, training, dtype)
    if total is not None:
        together = total is processes.total
        place = (processes.rank(), processes.count()) if together else setting.place
        setting = replace(setting, total=total, place=place)
    with of_the_user(f"The criterion {criterion_name(criterion)}"):
        scores = function(setting)
    if not isinstance(scores, Mapping):
        raise InputError(f"The criterion must return {{group name: tensor}}; it returned {shown(scores)}.")
    result = {}
    for group in comb.open:
        value = scores.get(group.name)
        if not isinstance(value, Tensor) or tuple(value.shape) != (group.size,):
            found = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else "no score"
            raise InputError(
                f"The criterion returned {found} for {group.name}; it must return a tensor with one number for each of "
                f"its {group.size} channels, and the same for every group of comb.open."
            )
        value = value.detach().to("cpu", torch.float64)
        if not bool(torch.isfinite(value).all()):
            raise TrainingError(f"The scores of {group.name} are not finite: check the data and the loss.")
        result[group.name] = value
    return Scores(result, setting.untrusted, setting.reliability)


def whole_scores(comb: Comb, plan: Plan, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores of what a plan has left, at its places in the unpruned model; -inf elsewhere."""
    whole = dict[str, Tensor]()
    for group in comb.open:
        whole[group.name] = torch.full((group.size,), -math.inf, dtype=torch.float64)
        if group.name in scores:  # it has not gone with a branch
            whole[group.name][list(plan.groups[group.name])] = scores[group.name].to("cpu", torch.float64)
    return whole
