"""Runs of `cpd.compress` that may be interrupted in their training."""

from __future__ import annotations

from pathlib import Path

import torch

import cpd
from cpd.selection.schedule import Schedule
from helpers.training import X, loader, net


class Interrupted(BaseException):
    pass


OPTIONS = {
    "target_macs": 0.5,
    "example_inputs": X[:1],
    "epochs": 3,
    "lr": 1e-2,
    "round_to": 1,
    "schedule": Schedule("linear", end=0.8, interval=3),
    "checkpoint_minutes": 1e-6,
}


def run(folder: Path | None, *, stop: int | None = None, resume: bool = False, **options) -> cpd.Result:
    """A run that is interrupted at a call of its loss."""
    calls = 0

    def loss(output, target):
        nonlocal calls
        calls += 1
        if calls == stop:
            raise Interrupted
        return torch.nn.functional.cross_entropy(output, target)

    return cpd.compress(net(), data=Shuffled(), loss=loss, output_dir=folder, resume=resume, **{**OPTIONS, **options})


class Shuffled:
    """Batches in an order that the global generator decides."""

    def __len__(self) -> int:
        return 6

    def __iter__(self):
        items = loader()
        for index in torch.randperm(6).tolist():
            x, y = items[index]
            yield x + 0.1 * torch.randn(x.shape), y
