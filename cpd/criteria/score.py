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
    "a name in cpd.criteria.CRITERIA, or a function of a cpd.criteria.Setting",
    lambda value: is_function(value) or (isinstance(value, str) and value in CRITERIA),
    names=lambda: CRITERIA,
)


class Scores(dict[str, Tensor]):
    """{group name: Tensor[size]}.

    Attributes:
        untrusted: {group name: why its scores say too little}: selection leaves these groups whole.
        reliability: {group name: how far its scores are no noise, from 0 to 1}, where the samples tell it.
    """

    def __init__(
        self, scores: Mapping[str, Tensor], untrusted: Mapping[str, str], reliability: Mapping[str, float]
    ) -> None:
        super().__init__(scores)
        self.untrusted, self.reliability = dict(untrusted), dict(reliability)

    def drawn(self) -> dict[str, Tensor]:
        """The scores of each group drawn towards their mean by their reliability, as selection compares them."""
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
    """Score every channel of every open group; `cpd.selection.selector` weighs scores against what a channel saves.

    Args:
        model: the unpruned model; left as it was.
        comb: its comb.
        data: batches of (input, target), mappings, or None for criteria that need none.
        loss: `loss(output, target) -> scalar`, the mean over the batch; None infers cross-entropy for class targets.
        criterion: a name in `cpd.criteria.CRITERIA`, or a callable of a `cpd.criteria.Setting` that returns
            {group name: Tensor[size]}.
        limit: at most this many batches are read.
        probes: random vectors a batch, for `hessian`.
        seed: for those, and for dropout in train mode.
        training: whether the model runs in train mode; its buffers are as before at the end.
        total: sums a tensor over several processes, each of which has a share of the batches (`cpd.processes.total`).
        precision: "bf16" or "fp16" for mixed precision (`torch.autocast`); None computes in the weights' dtype.

    Returns:
        {group name: Tensor[size]} on the CPU, float64, with the attributes `untrusted`: {group name: why its scores say
        too little of it to remove channels by}, and `reliability`: {group name: how far they are no noise}; `drawn()`
        gives them as selection compares them.

    Raises:
        InputError: an unknown criterion or precision, one that does not score every group, or a comb of another model.
        TrainingError: no data where it is needed, no batch, or a loss that is not finite.

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
        model, comb.architecture, InputError, "The comb is",
        "Comb this model, or, if it was shrunk by a plan, score it with comb.narrowed(model, plan).",
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
        raise InputError(f"The criterion must return {{group name: tensor}}, not {shown(scores)}.")
    result = {}
    for group in comb.open:
        value = scores.get(group.name)
        if not isinstance(value, Tensor) or tuple(value.shape) != (group.size,):
            found = list(value.shape) if isinstance(value, Tensor) else "no score"
            raise InputError(
                f"The criterion gave {found} for {group.name}; it must "
                f"return a tensor of {group.size} numbers for it, as for every group of comb.open."
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
