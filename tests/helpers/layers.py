"""A net with a layer of every kind that compensation knows, and batches for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Net(nn.Module):
    """Layers of every kind that compensation knows: plain, depthwise, grouped, transposed, linear."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.depth = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(width, 8, 2, 2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.conv1(x)))
        x = F.gelu(self.conv2(F.gelu(self.depth(x)) + x))
        return self.head(F.gelu(self.up(x)).mean((2, 3)))


def batches(samples: int = 48, side: int = 12, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Images of few degrees of freedom, so that channels can stand in for each other."""
    g = torch.Generator().manual_seed(seed)
    images = F.interpolate(torch.randn(samples, 3, 4, 4, generator=g), side, mode="bilinear")
    return [(part, torch.randint(5, (len(part),), generator=g)) for part in images.split(16)]
