"""Models of the benchmarks that no package ships, written out: the residual network of He et al. for CIFAR-10."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

STEPS = "num_batches_tracked"


class PaddedShortcut(nn.Module):
    """Option A of arXiv 1512.03385: no parameters; every second pixel, and channels of zeros on either side."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.pad = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """`[N, inputs, H, W]` to `[N, inputs + 2 * pad, H / 2, W / 2]`."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if inputs == outputs else PaddedShortcut(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, inputs, H, W]` to `[N, outputs, H / stride, W / stride]`."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet-(6n + 2) for 32x32 images, section 4.2 of arXiv 1512.03385: three stages of n blocks."""

    def __init__(self, blocks: int = 9, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, classes]` of images `[N, 3, 32, 32]`."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    rest = (BasicBlock(outputs, outputs, stride=1) for _ in range(blocks - 1))
    return nn.Sequential(BasicBlock(inputs, outputs, stride), *rest)


def resnet56(weights: Path | None = None) -> CifarResNet:
    """ResNet-56 (0.85 M parameters) in eval mode.

    Args:
        weights: a safetensors file; None leaves the weights random. The file may lack the step counters of
            BatchNorm (`num_batches_tracked`), nothing else.

    Raises:
        ValueError: if the file holds other keys than the model.
    """
    model = CifarResNet(blocks=9)
    if weights is not None:
        missing, foreign = model.load_state_dict(load_file(weights), strict=False)
        missing = [key for key in missing if not key.endswith(STEPS)]
        if missing or foreign:
            raise ValueError(f"{weights.name} is no CIFAR ResNet-56: it lacks {missing}, and holds {foreign}.")
    return model.eval()
