"""Samples that lie in arrays or in a data set, put into batches as they are asked for: none is read before.

What is larger than memory stays where it is: a tensor or a numpy array that is mapped into memory (`torch.load` with
`mmap=True`, `numpy.memmap`, `numpy.load` with `mmap_mode`), a slice of a safetensors file, an array of h5py or zarr.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

#: Samples in a batch.
BATCH = 64


def are_arrays(value: object) -> bool:
    """Whether a value is an array of samples, or a pair of one of inputs and one of targets, of as many samples."""
    if (shape := _shape(value)) is not None:
        return len(shape) > 1 and shape[0] > 0
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        return False
    inputs, targets = map(_shape, value)
    if inputs is None or targets is None or len(inputs) < 2 or not targets or not inputs[0]:
        return False
    return inputs[0] == targets[0] and len(inputs) != len(targets)  # two alike are two batches of inputs


def as_batches(data: Iterable[Any], seed: int = 0) -> Iterable[Any]:
    """A loader of samples that lie in arrays or in a data set; anything else, which holds batches, as it is.

    Args:
        data: what a user gives.
        seed: of the order, which is another one in every pass.
    """
    rows: Dataset[Any] | None = None
    if are_arrays(data):
        rows = _Rows(*(data if isinstance(data, (tuple, list)) else (data,)))
    elif isinstance(data, Dataset) and not isinstance(data, IterableDataset) and _holds_samples(data):
        rows = data
    if rows is None:
        return data
    return DataLoader(rows, BATCH, shuffle=True, generator=torch.Generator().manual_seed(seed))


class _Rows(Dataset[Any]):
    """Samples of one array, or of one of inputs and one of targets."""

    def __init__(self, *arrays: Any) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return int(cast("tuple[int, ...]", _shape(self.arrays[0]))[0])

    def __getitem__(self, index: int) -> Any:
        found = tuple(_tensor(array[index : index + 1])[0] for array in self.arrays)
        return found if len(found) > 1 else found[0]


def _shape(value: Any) -> tuple[int, ...] | None:
    """The extents of an array, whatever library it is of; None of anything else."""
    if isinstance(value, type) or not hasattr(value, "__getitem__"):
        return None
    found = value.get_shape() if callable(getattr(value, "get_shape", None)) else getattr(value, "shape", None)
    return tuple(found) if isinstance(found, (tuple, list)) else None


def _tensor(rows: Any) -> Tensor:
    """Some rows in memory."""
    return rows.clone() if isinstance(rows, Tensor) else torch.from_numpy(np.array(rows))


def _holds_samples(data: Any) -> bool:
    """Whether the items of a data set are samples: images without a dimension for the batch, or with one number."""
    if not hasattr(data, "__len__") or not len(data):
        return False
    item = data[0]
    if isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], Tensor):
        target = item[1]
        return item[0].dim() == 3 or isinstance(target, int) or (isinstance(target, Tensor) and not target.dim())
    return isinstance(item, Tensor) and item.dim() == 3
