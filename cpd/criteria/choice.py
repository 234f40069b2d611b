"""Which criterion a run uses: the one asked for, if it can have what it needs, or the default."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cpd.criteria import DATA_FREE, TARGET_FREE, Criterion
from cpd.errors import InputError
from cpd.model.inputs import batches
from cpd.tasks.loss import LossFunction

#: The criterion that can be read off the gradients of a training.
FROM_TRAINING = "taylor"


def choose_criterion(
    criterion: str | Criterion | None, data: Iterable[Any] | None, loss: LossFunction | None, trains: bool
) -> tuple[str | Criterion, str]:
    """The criterion, and why it is this one.

    Args:
        criterion: the one asked for.
        data: batches that channels are scored on.
        loss: of the model.
        trains: whether the model is trained while it is pruned, which gives gradients where there are no data.

    Raises:
        InputError: one that needs data or targets that are not given.
    """
    if criterion is None and data is None and not trains:
        return "magnitude", "the default without data"
    if criterion is None and data is None:
        return FROM_TRAINING, "computed from the gradients of the training"
    if criterion is None:
        return "obs", "the default with data: estimated change of the logits after the remaining channels are refitted"
    if criterion in DATA_FREE or criterion == FROM_TRAINING or (data is None and callable(criterion)):
        return criterion, "as requested"
    if data is None:
        raise InputError(f"criterion={criterion!r} needs data: pass data=loader, or use {FROM_TRAINING!r}.")
    if criterion not in TARGET_FREE and loss is None and next(batches(data, 1)).target is None:
        raise InputError(f"criterion={criterion!r} needs targets or a loss, but the data has no targets: pass loss=….")
    return criterion, "as requested"


def criterion_name(criterion: str | Criterion) -> str:
    """The name of a criterion, or that of the function it is."""
    return criterion if isinstance(criterion, str) else getattr(criterion, "__name__", type(criterion).__name__)
