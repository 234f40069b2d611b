"""Bits: masks as one bit a weight, and tensors of which most is zero as a bitmap and the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def packed_bits(mask: Tensor) -> Tensor:
    """A bool tensor as bytes, eight bits in one, the last filled up with zeros: uint8 [ceil(numel / 8)]."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def unpacked_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `packed_bits`.

    Raises:
        ValueError: if there are too few bits, or too many, for the shape.
    """
    count = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.dim() != 1 or len(bits) != -(-count // 8):
        raise ValueError(f"{len(bits)} bytes are no mask of shape {list(shape)}")
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count).astype(bool)).reshape(tuple(shape))
