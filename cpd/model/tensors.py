"""Tensors of a model by name: all of them, a copy of all, the kept part of one."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cpd.errors import InputError


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under every name it has."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return tensors


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    return {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}


@torch.no_grad()
def restore(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Write back what `state_of` kept."""
    for name, tensor in named_tensors(model).items():
        tensor.copy_(state[name])


def sliced(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """The kept positions of a tensor along each dimension named."""
    for dim, indices in kept.items():
        tensor = tensor.index_select(dim, indices.to(tensor.device))
    return tensor


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy of a model.

    Raises:
        InputError: if it cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:  # a user's module may hold anything
        raise InputError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); compress works on a copy. "
            "Detach tensors that the module keeps, or define __deepcopy__."
        ) from error
