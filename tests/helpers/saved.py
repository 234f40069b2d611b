"""The model, the data and the runs behind `tests/saved`, whose files an earlier commit wrote: they stay as they are.

Only names of `import cpd` are used, so that `tests/saved/make.py` runs on that commit too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cpd


class Classifier(nn.Module):
    """Five classes of 16 x 16 images: a residual convolution, then attention whose heads an attribute counts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.heads = 4
        self.qkv = nn.Linear(16, 48, bias=False)
        self.proj = nn.Linear(16, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = F.avg_pool2d(x + self.conv(x), 4).flatten(2).transpose(1, 2)
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1)
        return self.head((x + self.proj(y)).mean(1))


def fixed(*shape: int, step: float = 0.7) -> Tensor:
    """Numbers in [-1, 1] that no generator draws, the same under every version of torch."""
    count = torch.Size(shape).numel()
    return torch.sin(step * torch.arange(1, count + 1, dtype=torch.double) ** 1.1).float().view(shape)


def classifier() -> Classifier:
    """The model at its weights."""
    model = Classifier()
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            scale = 1.5 / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 0.2
            parameter.copy_(scale * fixed(*parameter.shape, step=0.7 + 0.1 * index))
        model.norm.weight.add_(1)
    return model


IMAGES = fixed(2, 3, 16, 16)


def batches() -> list[tuple[Tensor, Tensor]]:
    """Six batches of eight images, whose brightness tells the class."""
    labels = torch.arange(48) * 7 % 5
    images = fixed(48, 3, 16, 16, step=0.3) + 0.5 * labels.view(-1, 1, 1, 1) - 1
    return list(zip(images.split(8), labels.split(8), strict=True))


class Interrupted(BaseException):
    """The end of a run in the midst of its training."""


def trained(folder: Path | None, *, stop: int | None = None, **options: Any) -> cpd.Result:
    """A run of three epochs, interrupted at a call of its loss."""
    calls = 0

    def loss(output: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise Interrupted
        return F.cross_entropy(output, target)

    return cpd.compress(
        classifier(), target_macs=0.5, data=batches(), example_inputs=IMAGES[:1], loss=loss, epochs=3, lr=1e-2,
        round_to=1, output_dir=folder, checkpoint_minutes=1e-6, progress=False, **options,
    )  # fmt: skip
