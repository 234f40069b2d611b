"""Mixup and CutMix: images mixed in pairs, and their targets as class probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cpd.distillation.config import DistillConfig
from cpd.errors import InputError
from cpd.model.inputs import Batch, Call, evaluating, logits


class Mixing:
    """Mixes batches as a config says.

    Args:
        config: the settings.
        read: gives the part of an output that holds the classes.
    """

    def __init__(self, config: DistillConfig, read: Callable[[Any], Any]) -> None:
        self.config, self.read = config, read
        self._mix: Callable[[Any, Any], Any] | None = None

    def __call__(self, model: nn.Module, batch: Batch) -> Batch:
        """A batch of images of a model, mixed in pairs, and their targets as class probabilities.

        Raises:
            InputError: if it is no batch of images and class indices.
        """
        config, call, target = self.config, batch.call, batch.target
        if len(call.args) != 1 or not isinstance(target, Tensor) or target.dim() != 1 or target.is_floating_point():
            raise InputError("mixup and cutmix need batches of (images, class indices [N]).")
        if self._mix is None:
            from timm.data import Mixup

            with torch.no_grad(), evaluating(model):
                classes = logits(self.read(call.part(1).on(model))).shape[1]
            self._mix = Mixup(config.mixup, config.cutmix, label_smoothing=0.0, num_classes=classes)
        if len(target) == 1:
            return batch
        if len(target) % 2:  # images are mixed in pairs
            call, target = call.part(len(target) - 1), target[:-1]
        images, target = self._mix(call.args[0].clone(), target)
        return batch._replace(call=Call((images,), call.kwargs), target=target)
