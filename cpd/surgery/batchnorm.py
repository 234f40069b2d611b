"""What pruning did to the running statistics of BatchNorm, recovered from forward passes alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cpd.errors import TrainingError
from cpd.model.inputs import batches, check_model, device_of, evaluating
from cpd.options import LIMIT


@torch.no_grad()
def recalibrate_batchnorm(model: nn.Module, data: Iterable[Any], *, limit: int | None = None) -> int:
    """Estimate the running statistics of every BatchNorm anew, after its inputs were changed by pruning.

    They become the plain average over the batches of each batch's mean and (unbiased) variance, the
    `momentum=None` mode of `torch.nn.BatchNorm2d`. Forward passes only; only the BatchNorm layers run in
    training mode, so dropout stays off. Training flags and momenta are as before at the end.

    Args:
        model: changed in place, on the device where it is.
        data: batches as `cpd.model.inputs.as_batch` takes them; targets are not used.
        limit: the number of batches to take; all if None.

    Returns:
        The number of layers recalibrated. Layers without running statistics, and those that the forward
        pass does not reach, keep what they have; without any layer the data is not read.

    Raises:
        InputError: if `model` is no module, or `limit` is below 1.
        TrainingError: if the data is empty, or gives statistics that are not finite. As after any other
            error, the old statistics are back.
    """
    model = check_model(model)
    LIMIT.demand("limit", limit, optional=True)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.num_batches_tracked is not None
    }
    if not layers:
        return 0
    with evaluating(model), _averaging(layers):
        for batch in batches(data, limit, finite=True):
            batch.to(device_of(model)).on(model)
        return sum(bool(layer.num_batches_tracked) for layer in layers.values())


@contextmanager
def _averaging(layers: dict[str, _BatchNorm]) -> Iterator[None]:
    """These layers reset and averaging; what was not reached, or all after an error, is then as before."""
    kept = [(layer, layer.momentum, [*map(torch.clone, layer.buffers(recurse=False))]) for layer in layers.values()]
    try:
        for layer in layers.values():
            layer.reset_running_stats()
            layer.momentum = None
            layer.training = True  # not train(): that would reach the dropout which timm keeps inside
        yield
        for name, layer in layers.items():
            if not all(bool(buffer.isfinite().all()) for buffer in layer.buffers(recurse=False)):
                raise TrainingError(
                    f"The statistics of the BatchNorm {name!r} are not finite on this data, so the old ones are "
                    "kept. Check the batches, and the weights before that layer, for NaN or infinite values."
                )
    except BaseException:
        for layer in layers.values():
            layer.reset_running_stats()
        raise
    finally:
        for layer, momentum, buffers in kept:
            layer.momentum = momentum
            if not layer.num_batches_tracked:
                for buffer, old in zip(layer.buffers(recurse=False), buffers, strict=True):
                    buffer.copy_(old)
