"""Optimizers: made by name, and their state follows the parameters when a model shrinks during its training."""

from __future__ import annotations

import torch
from torch import nn

from cpd.errors import InputError


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
