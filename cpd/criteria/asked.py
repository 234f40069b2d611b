"""How many samples a model asks for, before any is scored."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

import torch
from torch import nn

from cpd.coupling.comb import Comb
from cpd.criteria.obs import TRUSTED
from cpd.model.inputs import Batch, device_of, evaluating
from cpd.trace.layer_calls import LayerCall, LayerCalls, seen

#: Batches that are read where these are enough.
BATCHES = 16


class Asked(NamedTuple):
    """How many samples a model asks for.

    Attributes:
        samples: so many.
        group: name of the group that asks for them.
        size: its channels.
    """

    samples: int = 1
    group: str = ""
    size: int = 0

    def batches(self, each: int) -> int:
        """How many batches of so many samples are read."""
        return max(BATCHES, math.ceil(self.samples / each))

    def told(self, used: int) -> str:
        """That fewer were used, in a sentence."""
        return (
            f"There are few images for the {self.size} channels of {self.group}: scores and recovery need "
            f"{self.samples} images for it, and {used} were used."
        )


def samples_asked(model: nn.Module, comb: Comb, batch: Batch) -> Asked:
    """The samples from which on it can be told of every open group which of its channels stand in for others.

    A convolution sees a group's channels in every place of an image, a classifier behind a pooling once an image: the
    layer that sees them least often decides.
    """
    places = Counter[str]()

    def after(layer: LayerCall) -> None:
        places[layer.weight] += layer.rows

    one = batch._replace(call=batch.call.part(1).to(device_of(model)))
    with torch.no_grad(), evaluating(model), seen(LayerCalls(model, after=after)):
        one.on(model)
    asked = [Asked()]
    for group in comb.open:
        seen_in = [places[m.tensor] for m in group.members if m.contracted and places[m.tensor]]
        if seen_in:
            asked.append(Asked(math.ceil(group.size / TRUSTED / min(seen_in)), group.name, group.size))
    return max(asked)
