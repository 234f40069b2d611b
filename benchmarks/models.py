"""What benchmarks and tests share: weights at which errors show, random plans, and the CIFAR-10 network of He et al."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cpd.coupling.branches import may_follow
from cpd.coupling.comb import Comb
from cpd.model.inputs import Call, plain_attention
from cpd.model.tensors import named_tensors
from cpd.plan import Plan

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


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights at which a wrong shrink shows: nothing near zero, nothing alike, signals of order one.

    Norm weights in [0.5, 1.5], biases and running means 0.3 N, variances in [0.5, 1.5], matrices N(0, 1/fan_in).
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.double)

    with torch.no_grad():
        for path, tensor in named_tensors(model).items():
            name = path.rpartition(".")[2]
            if not tensor.is_floating_point():
                continue
            if name in ("bias", "running_mean", "in_proj_bias"):
                tensor.copy_(normal(tensor) * 0.3)
            elif name == "running_var" or (tensor.dim() == 1 and isinstance(tensor, nn.Parameter)):
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.double) + 0.5)
            elif isinstance(tensor, nn.Parameter) and tensor.dim() > 1:
                tensor.copy_(normal(tensor) / max(1, tensor[0].numel()) ** 0.5)
    return model


def random_plan(combed: Comb, share: float = 0.3, *, exact: bool = False, seed: int = 0, at_least: int = 0) -> Plan:
    """Remove a random `share`, and at least so many, of every open group (of the exact ones alone, if `exact`)."""
    rng = random.Random(seed)
    keep = {}
    for group in combed.open:
        kept = sorted(rng.sample(range(group.size), group.size - max(at_least, int(share * group.size))))
        if group.exact or not exact:
            keep[group.name] = kept
    return combed.plan(keep)


def random_branches(combed: Comb, share: float = 0.3, *, seed: int = 0, at_least: int = 1) -> list[str]:
    """A random `share`, and at least so many, of the branches that can be removed; one operand of each sum stays."""
    rng, chosen = random.Random(seed), list[str]()
    can_go = [branch for branch in combed.branches if branch.frozen is None]
    for branch in rng.sample(can_go, min(len(can_go), max(at_least, round(share * len(can_go))))):
        if may_follow(branch, chosen):
            chosen.append(branch.name)
    return chosen


def counted_macs(model: nn.Module, call: Call) -> int:
    """Multiply-accumulates by torch's own counter, which knows matrix products, convolutions and attention."""
    with torch.no_grad(), plain_attention(), FlopCounterMode(display=False) as counter:
        call.on(model)
    return counter.get_total_flops() // 2


#: What may go -> the options of compress.
PARTS: dict[str, dict[str, object]] = {"both": {}, "widths": {"branches": False}, "branches": {"max_ratio": 1e-6}}
