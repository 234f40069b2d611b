"""RigL: weights that are small go, and as many come back where the gradient is largest, layer by layer.

Evci et al. 2020, "Rigging the Lottery" (arXiv 1911.11134), algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cpd.sparsity.masks import Masks
from cpd.sparsity.patterns import Pattern, prunable

#: The share of the weights of a layer that are exchanged at first (section 4.1).
AT_FIRST = 0.3


def rigl_share(time: float) -> float:
    """The share of the weights that stay which are exchanged, some way (0 to 1) through the training."""
    return AT_FIRST / 2 * (1 + math.cos(math.pi * min(max(time, 0.0), 1.0)))


def swapped(model: nn.Module, masks: Masks, pattern: Pattern, gradients: Mapping[str, Tensor], share: float) -> Masks:
    """The masks in which a share of the units that stay is exchanged for others; of each layer as many stay.

    Args:
        model: the model, masked.
        masks: as they are.
        pattern: which weights go together.
        gradients: magnitudes of the dense gradients, by the name of the parameter; a layer without keeps its mask.
        share: of the units that stay.
    """
    layers, found = prunable(model), dict(masks.kept)
    for name, mask in masks.kept.items():
        if name not in gradients or name not in layers:
            continue
        units = pattern.units(layers[name])
        stays = units.sums(mask.double()) > 0
        count = min(round(share * int(stays.sum())), int((~stays).sum()))
        if count < 1:
            continue
        sizes = units.sizes
        size = units.sums(layers[name].weight.detach().abs().cpu()) / sizes
        growth = units.sums(gradients[name].cpu()) / sizes
        going = torch.where(stays, size, torch.inf).argsort(stable=True)[:count]
        coming = torch.where(stays, -torch.inf, growth).argsort(descending=True, stable=True)[:count]
        stays[going], stays[coming] = False, True
        found[name] = units.spread(stays)
    return Masks(found, masks.pattern)
