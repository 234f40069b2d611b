"""What a run is of: model, teacher, data and loss, as far as they can be told.

A run that goes on from a checkpoint, and the processes that train one model together, must be given the same. What is
told may miss a difference, and never tells one where there is none: a loader that shuffles or augments gives another
first batch each time, so only batches that are held in a list or tuple are looked at.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cpd import processes
from cpd.distillation.request import length_of
from cpd.model.tensors import hash_of

#: Everything that may be told, in the order in which processes compare it.
TOLD = (
    "weights of the model", "weights of the teacher", "loss", "number of batches", "batch size", "data set",
    "number of samples", "first batch",
)  # fmt: skip


def identity(model: nn.Module, teacher: nn.Module | None, data: Iterable[Any] | None, loss: Any) -> dict[str, Any]:
    """What a run is of, each by a name that users read; what cannot be told is left out.

    Args:
        model: the unpruned model.
        teacher: what it learns from, if that is another model.
        data: the batches.
        loss: the function.
    """
    found: dict[str, Any] = {"weights of the model": hash_of(model.state_dict())[:16]}
    if teacher is not None:
        found["weights of the teacher"] = hash_of(teacher.state_dict())[:16]
    if loss is not None:
        found["loss"] = _name(loss)
    if data is not None:
        found |= _of_data(data)
    return found


def agreed_identity(
    model: nn.Module, teacher: nn.Module | None, data: Iterable[Any] | None, loss: Any
) -> dict[str, Any]:
    """What a run is of, as all processes that take part in it must say.

    Raises:
        TrainingError: if one says something else than the first.
    """
    found = identity(model, teacher, data, loss)
    for what in TOLD:
        processes.check_same(repr(found.get(what)), what)
    return found


def _of_data(data: Iterable[Any]) -> dict[str, Any]:
    """The number of batches, their size, and the data set behind them; of a list also what is in its first batch."""
    source = getattr(data, "dataset", None)
    found: dict[str, Any] = {
        "number of batches": length_of(data),
        "batch size": size if isinstance(size := getattr(data, "batch_size", None), int) else None,
        "data set": None if source is None else type(source).__name__,
        "number of samples": length_of(source),
    }
    if isinstance(data, (list, tuple)) and data:
        leaves = (leaf for leaf in tree_leaves(data[0]) if isinstance(leaf, Tensor))
        found["first batch"] = hash_of({str(index): leaf for index, leaf in enumerate(leaves)})[:16]
    return {name: value for name, value in found.items() if value is not None}


def _name(function: Any) -> str:
    """What a function, a partial one, a method or an object that is called is called."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))
