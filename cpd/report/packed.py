"""Packed weights: of tensors that are mostly zero a bitmap and the other values, in one safetensors file.

bits     one bit an entry of every such tensor, one after the other
values   what the entries are that are not zero: as they are, or as int8 with a scale for each row of its first
         dimension
scales   those, bfloat16
rest     all other tensors, themselves a safetensors file
index    what the tensors are: names, types, shapes, as JSON

All are bytes, compressed by LZMA. Nothing in the file is executed when it is read, and no more is unpacked
than the shapes say.
"""

from __future__ import annotations

import json
import lzma
import math
from collections.abc import Mapping
from typing import TypedDict

import torch
from safetensors.torch import load, save
from torch import Tensor

from cpd.files.reading import conform
from cpd.model.bits import packed_bits, unpacked_bits

FORMAT = "cpd-packed-1"
#: Tensors of fewer zeros are kept as they are.
LEAST_ZEROS = 1 / 8
#: The largest file that is unpacked, and the largest index; what LZMA may take of memory.
MOST_BYTES, MOST_TEXT, MEMORY = 2**36, 2**28, 2**30
#: What 8 bits may leave of error in a row, relative to its values: a finer step takes more bytes and is no better use.
ERROR = 0.012
_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)}


class _Entry(TypedDict):
    """One sparse tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: int


class _Index(TypedDict):
    """What `index` holds."""

    format: str
    int8: bool
    rest: int
    tensors: tuple[_Entry, ...]


def pack(tensors: Mapping[str, Tensor], *, int8: bool = False) -> bytes:
    """Tensors as a file.

    Args:
        tensors: contiguous, on the CPU.
        int8: whether the values of sparse ones are rounded to 8 bits.
    """
    sparse = {name: tensor for name, tensor in tensors.items() if _is_sparse(tensor)}
    bits, values, scales, entries = list[Tensor](), list[Tensor](), list[Tensor](), list[_Entry]()
    for name, tensor in sparse.items():
        stays = tensor != 0
        if int8:
            scale = _scale(tensor)
            scales.append(scale.flatten())
            found = (tensor.float() / scale).round().clamp(-127, 127).to(torch.int8)[stays]
        else:
            found = tensor[stays]
        bits.append(packed_bits(stays))
        values.append(found.view(torch.uint8))
        entries.append({"name": name, "dtype": str(tensor.dtype), "shape": tuple(tensor.shape), "values": len(found)})
    rest = save({name: tensor for name, tensor in tensors.items() if name not in sparse})
    index: _Index = {"format": FORMAT, "int8": int8, "rest": len(rest), "tensors": tuple(entries)}
    none = torch.zeros(0, dtype=torch.uint8)
    return save({
        "bits": _compressed(torch.cat([none, *bits]).numpy().tobytes()),
        "values": _compressed(torch.cat([none, *values]).numpy().tobytes()),
        "scales": _compressed(torch.cat([torch.zeros(0), *scales]).bfloat16().view(torch.uint8).numpy().tobytes()),
        "rest": _compressed(rest),
        "index": _compressed(json.dumps(index).encode()),
    })  # fmt: skip


def unpack(content: bytes) -> dict[str, Tensor]:
    """The tensors of a file that `pack` gave.

    Raises:
        ValueError: if it is none, or damaged.
    """
    try:
        parts = load(content)
        text = _decompressed(parts["index"], MOST_TEXT)
        index = conform(json.loads(text), _Index, "the index of packed weights")
        if index["format"] != FORMAT:
            raise ValueError(f"its format is {index['format']!r}")
        entries = index["tensors"]
        sizes = [math.prod(entry["shape"]) for entry in entries]
        widths = [1 if index["int8"] else _DTYPES[entry["dtype"]].itemsize for entry in entries]
        lengths = [entry["values"] * width for entry, width in zip(entries, widths, strict=True)]
        bits = _expanded(parts["bits"], sum(-(-size // 8) for size in sizes))
        values = _expanded(parts["values"], sum(lengths))
        found = load(bytes(_expanded(parts["rest"], index["rest"]).numpy()))
        rows = [entry["shape"][0] for entry in entries] if index["int8"] else [0] * len(entries)
        scales = _expanded(parts["scales"], 2 * sum(rows)).view(torch.bfloat16).float()
        for entry, size, own, scale in zip(entries, sizes, values.split(lengths), scales.split(rows), strict=True):
            mask, bits = unpacked_bits(bits[: -(-size // 8)], entry["shape"]), bits[-(-size // 8) :]
            found[entry["name"]] = _restored(entry, mask, own, scale if index["int8"] else None)
    except Exception as error:  # of safetensors, of LZMA, of torch: a file that is none of ours
        raise ValueError(f"these are no packed weights: {error}") from error
    return found


def _restored(entry: _Entry, mask: Tensor, values: Tensor, scale: Tensor | None) -> Tensor:
    dtype = _DTYPES[entry["dtype"]]
    tensor = torch.zeros(mask.shape, dtype=dtype)
    if scale is None:
        tensor[mask] = values.clone().view(dtype)
        return tensor
    whole = torch.zeros(mask.shape)
    whole[mask] = values.clone().view(torch.int8).float()
    return (whole * scale.reshape(-1, *[1] * (mask.dim() - 1))).to(dtype)


def _is_sparse(tensor: Tensor) -> bool:
    if str(tensor.dtype) not in _DTYPES or tensor.dim() < 2 or not tensor.numel():
        return False
    return 1 - int(torch.count_nonzero(tensor)) / tensor.numel() >= LEAST_ZEROS


def _scale(tensor: Tensor) -> Tensor:
    """The step of each row of the first dimension: as coarse as its error allows, and no value above 127 steps.

    Rounding to steps leaves a root mean square error of a step over the square root of 12.
    """
    rows = tensor.float().flatten(1)
    size = rows.square().sum(1) / torch.count_nonzero(rows, 1).clamp_min(1)
    scale = torch.maximum(rows.abs().amax(1) / 127, ERROR * (12 * size).sqrt()).clamp_min(1e-20)
    return scale.bfloat16().float().reshape(-1, *[1] * (tensor.dim() - 1))


def _compressed(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(lzma.compress(content)), dtype=torch.uint8)


def _decompressed(part: Tensor, most: int) -> bytes:
    """What was compressed, at most so many bytes of it."""
    return lzma.LZMADecompressor(memlimit=MEMORY).decompress(bytes(part.numpy()), most)


def _expanded(part: Tensor, size: int) -> Tensor:
    """So many bytes, and no more.

    Raises:
        ValueError: if there are others.
    """
    if not 0 <= size <= MOST_BYTES:
        raise ValueError(f"{size} bytes are too many")
    content = _decompressed(part, size + 1)
    if len(content) != size:
        raise ValueError(f"{len(content)} bytes where {size} are noted")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if size else torch.zeros(0, dtype=torch.uint8)
