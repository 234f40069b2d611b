"""What public functions take in common, and what it may be: models, inputs, data."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cpd.errors import InputError
from cpd.model.inputs import Call, as_call, not_finite
from cpd.model.samples import are_arrays
from cpd.options import PATH, Check, instance

MODEL = instance(nn.Module, "a torch.nn.Module: the model itself, rather than its state dict, its class or its name")
NAMED_MODEL = Check(
    f"{MODEL.wanted[: MODEL.wanted.index(':')]}, or a name as 'timm:resnet18'",
    lambda value: MODEL.accepts(value) or (isinstance(value, str) and ":" in value),
)
TENSOR = instance(Tensor, "a tensor")
OPTIMIZER = instance(torch.optim.Optimizer, "a torch.optim.Optimizer")


def _is_call(value: object) -> bool:
    try:
        as_call(value)
    except InputError:
        return False
    return True


def unusable(value: Any) -> str | None:
    """What is wrong with example inputs, in words that follow their name; None if nothing is."""
    call = as_call(value)
    tensors = [leaf for leaf in tree_leaves(tuple(call)) if isinstance(leaf, Tensor)]
    if not tensors:
        return "holds no tensor. Where a shape is known alone, take torch.randn(1, 3, 224, 224)."
    empty = next((tensor for tensor in tensors if not tensor.numel()), None)
    if empty is not None:
        return f"holds a tensor without values, of shape {list(empty.shape)}: give at least one sample."
    if not_finite(call):
        return "holds values that are not finite (NaN or infinity): check what they are made of."
    return None


INPUTS = Check("a tensor, a non-empty tuple of arguments, or (tuple, dict)", _is_call, fault=unusable)


def _are_batches(value: object) -> bool:
    """Whether a value can give batches: an iterable, but for those whose items are no batches."""
    wrong = isinstance(value, (str, bytes, Mapping, Tensor, nn.Module, type, Call))
    return not wrong and (isinstance(value, Iterable) or hasattr(type(value), "__getitem__"))


def _wrong_first(value: Any) -> str | None:
    """What is wrong with a list that holds no batch at its beginning; other data is looked at while it is read."""
    if isinstance(value, (list, tuple)) and value and not isinstance(value[0], (Tensor, tuple, list, Mapping)):
        return (
            f"must give batches, as (input, target), a mapping or a tensor; its first item is of type "
            f"{type(value[0]).__name__}."
        )
    return None


DATA = Check(
    "batches of (input, target), in a DataLoader, a list, or anything else that can be iterated",
    _are_batches,
    fault=_wrong_first,
)


def _more_than_once(value: Any) -> str | None:
    if isinstance(value, Iterator) and not hasattr(type(value), "__len__"):  # some loaders, which can, have a length
        return "can be iterated only once (it is an iterator); pass a list or a DataLoader."
    return _wrong_first(value)


#: What is read several times.
REPEATED_DATA = Check(DATA.wanted, _are_batches, fault=_more_than_once)


def is_name(value: object) -> bool:
    """Whether data is given by its name, a text or a path, rather than as batches."""
    return isinstance(value, (str, os.PathLike)) and PATH.accepts(value)


#: What is read several times, or samples that are put into batches (`cpd.model.samples`).
SAMPLES_OR_DATA = Check(
    f"{DATA.wanted}; or samples, in a data set or in arrays",
    lambda value: are_arrays(value) or _are_batches(value),
    fault=lambda value: None if are_arrays(value) else _more_than_once(value),
)
#: The same, or the name of what a task reads (`cpd.Task.load`).
NAMED_DATA = Check(
    f"{SAMPLES_OR_DATA.wanted}; or the name of what the model's task reads",
    lambda value: is_name(value) or SAMPLES_OR_DATA.accepts(value),
    fault=lambda value: None if is_name(value) or are_arrays(value) else _more_than_once(value),
)
