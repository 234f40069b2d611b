"""Images with their channels innermost in memory, which convolutions on a processor take faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from cpd.errors import let_through
from cpd.model.inputs import Call, device_of, logits
from cpd.model.outputs import whole

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
#: The most that the two formats' outputs may be apart, relative to the largest value.
TOLERANCE = 1e-3


def channels_last(call: Call) -> Call:
    """The same call with images, [samples, channels, height, width] and those of one dimension more, laid out so."""

    def laid_out(leaf: Tensor) -> Tensor:
        found = _FORMATS.get(leaf.dim())
        return leaf if found is None else leaf.contiguous(memory_format=found)

    return Call(*tree_map_only(Tensor, laid_out, tuple(call)))


@torch.no_grad()
def takes_channels_last(model: nn.Module, call: Call, read: Callable[[Any], Any] = whole) -> bool:
    """Whether a model on a processor gives the same for `channels_last(call)`: one that calls `view` may refuse it.

    Args:
        model: in eval mode.
        call: one that it runs on; one sample is enough.
        read: gives the part of an output that matters.
    """
    images = [leaf for leaf in tree_leaves(tuple(call)) if isinstance(leaf, Tensor) and leaf.dim() in _FORMATS]
    if not images or device_of(model).type != "cpu":
        return False
    expected = logits(read(call.on(model))).double()
    try:
        found = logits(read(channels_last(call).on(model))).double()
    except Exception as error:
        let_through(error)
        return False
    apart = TOLERANCE * float(expected.abs().max())
    return found.shape == expected.shape and bool(((found - expected).abs() <= apart).all())
