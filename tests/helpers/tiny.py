"""A network so small that the whole path takes seconds, and batches for it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import cpd


class Tiny(nn.Module):
    """A residual convnet of 12 classes on 16 x 16 images."""

    def __init__(self, width=32):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 12)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        x = x + self.conv2(self.conv1(x).relu())
        return self.head(x.mean((2, 3)))


INPUT = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def loader(seed=0, batches=3):
    """The same batches for the same seed."""
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 3, 16, 16, generator=g), torch.randint(12, (8,), generator=g)) for _ in range(batches)]


def compressed(model: nn.Module, folder: Path) -> cpd.Result:
    """The model at half of its MACs, trained back for one epoch, in a folder."""
    return cpd.compress(
        model, target_macs=0.5, data=loader(), epochs=1, evaluate=lambda m: float(m.training), output_dir=folder
    )
