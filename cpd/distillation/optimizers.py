"""Optimizers: made by name, and their state follows the parameters when a model shrinks during its training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cpd.errors import InputError, TrainingError
from cpd.plan import Plan
from cpd.surgery.shrink import named_tensors, sliced


def make_optimizer(
    model: nn.Module, name: str, lr: float, weight_decay: float, momentum: float
) -> torch.optim.Optimizer:
    """An optimizer of timm for the parameters of `model`; biases and norms get no weight decay.

    Raises:
        InputError: if timm cannot make it on this machine or of these settings, or it needs second derivatives.
    """
    from timm.optim import create_optimizer_v2  # some seconds to import, hence not at the top

    plain = name == "sgd" and momentum == 0  # which Nesterov's form does not allow
    try:
        made: torch.optim.Optimizer = create_optimizer_v2(
            model, "momentum" if plain else name, lr, weight_decay, momentum
        )
    except Exception as error:  # whatever an optimizer raises for what it lacks: a GPU, a package, a momentum
        raise InputError(
            f"The optimizer {name!r} cannot be made here (lr={lr:g}, weight_decay={weight_decay:g}, "
            f"momentum={momentum:g}): {error} Take another one, as 'sgd' or 'adamw'."
        ) from error
    if getattr(made, "is_second_order", False):  # as timm marks those that differentiate the gradient once more
        raise InputError(f"The optimizer {name!r} needs second derivatives, which this training does not give it.")
    return made


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
                    "Prune before the training (one-shot), or take an optimizer whose state has the shape of the "
                    "parameters: SGD, Adam, AdamW, RMSprop, Lion, …. The model is as it was."
                )
            if tensors:
                found.append(Entry(state, key, sliced(value, kept[id(parameter)])))
    return found


def narrow_state(entries: list[Entry]) -> None:
    """Put into place what `narrowed_state` found."""
    for entry in entries:
        entry.state[entry.key] = entry.value
