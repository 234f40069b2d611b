"""Optimizers and schedules of their learning rate, made by name; and parameters that they have nothing to do for."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from cpd.errors import InputError, some

log = logging.getLogger("cpd")

#: Parameters that are named at most.
NAMED = 8


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
            f"momentum={momentum:g}): {error} Use another one, such as 'sgd' or 'adamw'."
        ) from error
    if getattr(made, "is_second_order", False):  # as timm marks those that differentiate the gradient once more
        raise InputError(
            f"The optimizer {name!r} needs second derivatives, which this training does not compute: use another one."
        )
    return made


def lr_schedule(optimizer: torch.optim.Optimizer, name: str, epochs: float, warmup: float) -> Any:
    """A scheduler of timm whose time is in epochs, parts of them too; `warmup` is a share of them."""
    from timm.scheduler import create_scheduler_v2  # some seconds to import, hence not at the top

    rising = warmup * epochs
    length: Any = epochs - rising
    schedule, _ = create_scheduler_v2(
        optimizer, name, num_epochs=length, decay_epochs=length / 3, min_lr=0.0, warmup_lr=0.0,
        decay_rate=1.0 if name == "poly" else 0.1, warmup_epochs=rising, warmup_prefix=True,
    )  # fmt: skip
    return schedule


class Untouched:
    """The parameters of a model that no step of the first epoch had a gradient for.

    A classifier is one of them where only features are compared: the features change, and it no longer fits them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = [name for name, value in model.named_parameters() if value.requires_grad]

    def look(self) -> None:
        """Leave out those that have a gradient now, and those that have gone."""
        if self.names:
            grads = {name: value.grad for name, value in self.model.named_parameters()}
            self.names = [name for name in self.names if name in grads and not _is_any(grads[name])]

    def tell(self) -> None:
        """Warn of those that are left, once."""
        if self.names:
            log.warning(
                "These parameters get no gradient from the loss, so they are not trained: %s. To train a classifier "
                "as well, set task_weight above 0 or kd='kl'.", some(self.names, NAMED),
            )  # fmt: skip
        self.names = []


def _is_any(grad: Tensor | None) -> bool:
    return grad is not None and bool(grad.any())
