"""The state of an optimizer, narrowed with the parameters it belongs to."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cpd.errors import TrainingError
from cpd.model.tensors import named_tensors, sliced
from cpd.plan import Plan


class Entry(NamedTuple):
    """A tensor of an optimizer's state, and what it becomes."""

    state: dict[str, Any]
    key: str
    value: Tensor


def narrowed_state(optimizer: torch.optim.Optimizer, model: nn.Module, plan: Plan) -> list[Entry]:
    """What the state of an optimizer becomes when `plan` is applied to `model`; nothing changes yet.

    Momentum, the moments of Adam and whatever else has the shape of its parameter is sliced as the parameter is;
    step counts and other single numbers stay.

    Raises:
        TrainingError: if the optimizer keeps something of another shape for a parameter that becomes narrower
            (factored moments, a history of directions).
    """
    kept: dict[int, Mapping[int, Tensor]] = {}
    names: dict[int, str] = {}
    for name, tensor in named_tensors(model).items():
        if name in plan.kept:
            kept[id(tensor)], names[id(tensor)] = plan.kept[name], name
    found = []
    for parameter in (item for group in optimizer.param_groups for item in group["params"]):
        state = optimizer.state.get(parameter, {}) if id(parameter) in kept else {}
        for key, value in state.items():
            tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.numel() > 1]
            if tensors and (not isinstance(value, Tensor) or value.shape != parameter.shape):
                raise TrainingError(
                    f"{type(optimizer).__name__} keeps {key!r} of shape {list(tensors[0].shape)} for "
                    f"{names[id(parameter)]} of shape {list(parameter.shape)}, which cannot be narrowed with it. "
                    "Prune before the training (one-shot), or use an optimizer whose state has the shape of the "
                    "parameters: SGD, Adam, AdamW, RMSprop, Lion, …. The model is unchanged."
                )
            if tensors:
                found.append(Entry(state, key, sliced(value, kept[id(parameter)])))
    return found


def narrow_state(entries: list[Entry]) -> None:
    """Put into place what `narrowed_state` found."""
    for entry in entries:
        entry.state[entry.key] = entry.value


def drop_parameters(optimizer: torch.optim.Optimizer, gone: Collection[int]) -> None:
    """Take parameters, by their `id`, and their state out of an optimizer; its groups stay, in their order."""
    for group in optimizer.param_groups:
        for parameter in (item for item in group["params"] if id(item) in gone):
            optimizer.state.pop(parameter, None)
        group["params"] = [item for item in group["params"] if id(item) not in gone]
