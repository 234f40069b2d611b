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


def takes_channels_last(
    model: nn.Module, call: Call, read: Callable[[Any], Any] = whole, *, backward: bool = False
) -> bool:
    """Whether a model on a processor gives the same for `channels_last(call)`: one that calls `view` may refuse it.

    Args:
        model: in eval mode.
        call: one that it runs on; it is run on two of its samples, for a view may join samples and channels.
        read: gives the part of an output that matters.
        backward: whether the gradient of the images is to be the same too.
    """
    call = call.part(1).resized(2)
    images = [leaf for leaf in tree_leaves(tuple(call)) if isinstance(leaf, Tensor) and leaf.dim() in _FORMATS]
    if device_of(model).type != "cpu" or not any(image.is_floating_point() for image in images):
        return False

    def given(call: Call) -> list[Tensor]:
        fresh = tree_map_only(Tensor, lambda leaf: leaf.detach().requires_grad_(_differentiable(leaf)), tuple(call))
        with torch.set_grad_enabled(backward):
            output = logits(read(Call(*fresh).on(model)))
        inputs = [leaf for leaf in tree_leaves(fresh) if isinstance(leaf, Tensor) and leaf.requires_grad]
        found = torch.autograd.grad(output.sum(), inputs, allow_unused=True) if output.requires_grad else ()
        return [tensor.detach() for tensor in (output, *found) if tensor is not None]

    expected = given(call)
    try:
        found = given(channels_last(call))
    except Exception as error:
        let_through(error)
        return False
    return len(found) == len(expected) and all(map(_near, found, expected))


def _differentiable(leaf: Tensor) -> bool:
    return leaf.dim() in _FORMATS and leaf.is_floating_point()


def _near(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    apart = (found - expected).abs() <= TOLERANCE * expected.abs().max()
    return bool(apart.all())
