"""A small classifier and random images of its classes, for a teacher and its student."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLASSES = 4


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.relu(self.bn(self.conv(x))).mean((2, 3))))


def make(seed: int = 0, dropout: float = 0.0) -> Net:
    torch.manual_seed(seed)
    return Net(dropout)


def images(count: int = 6, size: int = 16, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 3, 6, 6, generator=generator) + 0.5,
            torch.randint(CLASSES, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def state(model: nn.Module) -> dict[str, Tensor]:
    """Its tensors as they are now."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, kept: dict[str, Tensor]) -> bool:
    """Whether they still are, to the bit."""
    return all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
