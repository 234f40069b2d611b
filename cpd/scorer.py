"""Score: one number for every position of every open group; the lowest go first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cpd.comb import Comb, Group
from cpd.criteria import CRITERIA, Criterion, Setting
from cpd.errors import InputError, TrainingError
from cpd.inputs import check_model

Normalization = Literal["memory", "macs", "none"]


def score(
    model: nn.Module,
    comb: Comb,
    data: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    *,
    criterion: str | Criterion = "hessian",
    normalization: Normalization = "none",
    exponent: float = 0.5,
    limit: int = 16,
    probes: int = 1,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Score every position of every open group.

    Args:
        model: the unpruned model; left as it was.
        comb: its comb.
        data: batches of (input, target), mappings, or None for criteria that need none.
        loss: `loss(output, target) -> scalar`; None infers cross-entropy for class targets.
        criterion: a name in `cpd.criteria.CRITERIA`, or a callable of a `Setting`.
        normalization: what a removed position saves, by which its score is divided: "memory" (elements of all
            tensors that carry it, B x H x W in CPD), "macs", or "none".
        exponent: the power of what is saved (score / saved^exponent). With 1, layers of high resolution are emptied
            first; see docs/decisions.md for what was measured.
        limit: at most this many batches are read.
        probes: random vectors a batch, for `hessian`.
        seed: for those.

    Returns:
        {group name: Tensor[size]} on the CPU, float64.

    Raises:
        InputError: an unknown criterion or normalization.
        TrainingError: no data where it is needed, no batch, or a loss that is not finite.
    """
    check_model(model)
    if isinstance(criterion, str) and criterion not in CRITERIA:
        raise InputError(f"Unknown criterion {criterion!r}; known are {', '.join(CRITERIA)}.")
    if normalization not in ("memory", "macs", "none"):
        raise InputError(f"Unknown normalization {normalization!r}; known are memory, macs and none.")
    function = CRITERIA[criterion] if isinstance(criterion, str) else criterion
    scores = function(Setting(model, comb, data, loss, limit, probes, seed))
    result = {}
    for group in comb.open:
        value = scores[group.name].detach().to("cpu", torch.float64)
        if not bool(torch.isfinite(value).all()):
            raise TrainingError(f"The scores of {group.name} are not finite: check the data and the loss.")
        result[group.name] = value / max(_saved(comb, group, normalization), 1e-12) ** exponent
    return result


def _saved(comb: Comb, group: Group, normalization: Normalization) -> float:
    """What one removed position of a group saves."""
    if normalization == "none":
        return 1.0
    return comb.cost.memory_of(group.axis) if normalization == "memory" else comb.cost.macs_of(group.axis)
