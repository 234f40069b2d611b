"""Masks of `torch.nn.utils.prune`: a weight that a hook computes of `weight_orig` and `weight_mask` at each call."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import prune

from cpd.model.tensors import derived


def masked_weights(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Each parameter that a mask lies on, with the module and its attribute that holds the product of both."""
    return {
        f"{path}.{name}_orig".removeprefix("."): (module, name)
        for path, module in model.named_modules()
        for name, hook in derived(module).items()
        if isinstance(hook, prune.BasePruningMethod)
    }


def masks_applied(model: nn.Module) -> nn.Module:
    """Multiply every mask into its weight, in place, and take it off; the parameters stay the same objects."""
    for module, name in masked_weights(model).values():
        prune.remove(module, name)
    return model
