"""Random models: lists of steps, each a kind of layer, its arguments, and the earlier values that it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH, SIDE, CLASSES = 2, 4, 5
WIDTHS = [2, 3, 4, 5, 6, 8]
#: No value grows wider than this: concatenations and products of values are then cut down by a linear layer.
WIDEST = 24
STEPS = 6

# ---------------------------------------------------------------- kinds of layers

#: Picks one of several options, the first of them the simplest.
Draw = Callable[[Sequence], Any]
Shape = tuple[int, ...]


class Kind(NamedTuple):
    """A kind of layer: its class, the ranks of its inputs, and how its arguments are drawn.

    The class takes the shapes of the inputs, then the arguments. `arguments` gives None where nothing fits the shapes.
    """

    layer: Callable[..., nn.Module]
    ranks: tuple[int, ...]
    arguments: Callable[..., tuple | None]


KINDS: dict[str, Kind] = {}
MAP, TOKENS = 4, 3


def kind(*ranks: int, arguments: Callable[..., tuple | None] = lambda draw, *shapes: ()) -> Callable:
    """Enter a layer's class into the table of kinds."""

    def enter(layer: Any) -> Any:
        KINDS[layer.__name__] = Kind(layer, ranks, arguments)
        return layer

    return enter


def width(draw: Draw, *shapes: Shape) -> tuple[int]:
    return (draw(WIDTHS),)


def divisors(number: int) -> list[int]:
    return [k for k in range(1, number + 1) if number % k == 0]


def channels(shape: Shape) -> int:
    return shape[1] if len(shape) == MAP else shape[-1]


def divisor(draw: Draw, shape: Shape, *others: Shape) -> tuple[int]:
    return (draw(divisors(channels(shape))),)


def larger_divisor(draw: Draw, shape: Shape, *others: Shape) -> tuple[int] | None:
    found = divisors(channels(shape))[1:]
    return (draw(found),) if found else None


def groups_and_width(draw: Draw, shape: Shape) -> tuple[int, int]:
    return (*divisor(draw, shape), draw([1, 2, 3]))


def place_inside(draw: Draw, shape: Shape) -> tuple[int] | None:
    return (draw(range(1, channels(shape))),) if channels(shape) > 1 else None


def heads_and_dim(draw: Draw, *shapes: Shape) -> tuple[int, int]:
    return draw([1, 2, 3, 4]), draw([2, 3, 4])


def if_even_side(draw: Draw, shape: Shape) -> tuple | None:
    return () if shape[2] % 2 == 0 else None


def if_square(draw: Draw, shape: Shape) -> tuple | None:
    return () if math.isqrt(shape[1]) ** 2 == shape[1] else None


# ---------------------------------------------------------------- maps [B, C, H, W] to maps


@kind(MAP, arguments=lambda draw, shape: (*width(draw), draw([1, 3])))
class Conv(nn.Conv2d):
    def __init__(self, shape: Shape, out: int, kernel: int) -> None:
        super().__init__(shape[1], out, kernel, padding=kernel // 2)


@kind(MAP, arguments=lambda draw, shape: width(draw) if shape[2] > 2 else None)
class Strided(nn.Conv2d):
    def __init__(self, shape: Shape, out: int) -> None:
        super().__init__(shape[1], out, 3, stride=2, padding=1, bias=False)


@kind(MAP, arguments=lambda draw, shape: (draw([1, 1, 2]),))
class Depthwise(nn.Conv2d):
    def __init__(self, shape: Shape, times: int) -> None:
        super().__init__(shape[1], times * shape[1], 3, padding=1, groups=shape[1])


@kind(MAP, arguments=groups_and_width)
class Grouped(nn.Conv2d):
    def __init__(self, shape: Shape, groups: int, each: int) -> None:
        super().__init__(shape[1], groups * each, 1, groups=groups)


@kind(MAP, arguments=groups_and_width)
class Transposed(nn.ConvTranspose2d):
    def __init__(self, shape: Shape, groups: int, each: int) -> None:
        up = 2 if shape[2] < SIDE else 1
        super().__init__(shape[1], groups * each, up, stride=up, groups=groups)


@kind(MAP)
class BatchNorm(nn.BatchNorm2d):
    def __init__(self, shape: Shape) -> None:
        super().__init__(shape[1])


@kind(MAP, arguments=divisor)
class GroupNorm(nn.GroupNorm):
    def __init__(self, shape: Shape, groups: int) -> None:
        super().__init__(groups, shape[1])


@kind(MAP, arguments=lambda draw, shape: () if shape[2] > 1 else None)
class InstanceNorm(nn.InstanceNorm2d):
    def __init__(self, shape: Shape) -> None:
        super().__init__(shape[1], affine=True)


@kind(MAP)
class PReLU(nn.PReLU):
    def __init__(self, shape: Shape) -> None:
        super().__init__(shape[1])


@kind(MAP)
class LayerNorm2d(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@kind(MAP)
class HandNorm(nn.Module):
    """A root mean square over the channels, without an op of its own."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6) * self.weight[:, None, None]


@kind(MAP, arguments=width)
class StandardisedConv(nn.Conv2d):
    """Weights standardised by a batch norm, as in timm's NFNets."""

    def __init__(self, shape: Shape, out: int) -> None:
        super().__init__(shape[1], out, 3, padding=1)
        self.gain = nn.Parameter(torch.ones(out, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, weight=self.gain.view(-1), training=True, momentum=0.0)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, padding=1)


@kind(MAP, arguments=width)
class ChannelsLastLinear(nn.Module):
    def __init__(self, shape: Shape, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(shape[1], out)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = self.linear(x.reshape(b, c, h * w).transpose(1, 2))
        return y.transpose(1, 2).reshape(b, -1, h, w)


@kind(MAP, arguments=width)
class EinsumLinear(nn.Module):
    def __init__(self, shape: Shape, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(out, shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bchw,oc->bohw", x, self.weight)


@kind(MAP, arguments=divisor)
class Shuffle(nn.Module):
    def __init__(self, shape: Shape, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)


@kind(MAP, arguments=divisor)
class ChannelShuffle(nn.ChannelShuffle):
    def __init__(self, shape: Shape, groups: int) -> None:
        super().__init__(groups)


@kind(MAP, arguments=lambda draw, shape: (draw(range(1, min(4, shape[1]) + 1)),))
class Pieces(nn.Module):
    """Cut in pieces, the last of them the rest, one of them changed, joined again in another order."""

    def __init__(self, shape: Shape, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = x.chunk(self.count, dim=1)
        return torch.cat([*rest, torch.relu(first)], dim=1)


@kind(MAP, arguments=larger_divisor)
class Cascade(nn.Module):
    """Res2Net: equal pieces, each convolved after the one before is added."""

    def __init__(self, shape: Shape, count: int) -> None:
        super().__init__()
        self.width = shape[1] // count
        self.convs = nn.ModuleList(nn.Conv2d(self.width, self.width, 1) for _ in range(count - 1))

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = torch.split(x, self.width, 1)
        out = [first]
        for conv, piece in zip(self.convs, rest, strict=True):
            out.append(conv(piece + out[-1]))
        return torch.cat(out, 1)


@kind(MAP, arguments=place_inside)
class NamedSplit(nn.Module):
    """Cut at widths kept in an attribute, only one piece convolved."""

    def __init__(self, shape: Shape, first: int) -> None:
        super().__init__()
        self.sizes = [first, shape[1] - first]
        self.conv = nn.Conv2d(first, first, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        head, tail = torch.split(x, self.sizes, dim=1)
        return torch.cat([self.conv(head), tail], dim=1)


@kind(MAP, arguments=place_inside)
class Sliced(nn.Module):
    """A slice up to a width kept in an attribute is convolved, the rest stays (FasterNet)."""

    def __init__(self, shape: Shape, first: int) -> None:
        super().__init__()
        self.first = first
        self.conv = nn.Conv2d(first, first, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.conv(x[:, : self.first]), x[:, self.first :]), 1)


@kind(MAP, arguments=lambda draw, shape: () if shape[1] % 2 == 0 else None)
class HalfSliced(nn.Module):
    """Two halves cut at a width that is computed from the whole."""

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        return x[:, :half] * x[:, half:].sigmoid()

    def __init__(self, shape: Shape) -> None:
        super().__init__()


@kind(MAP, arguments=lambda draw, shape: (draw(range(shape[1])),))
class Narrowed(nn.Module):
    def __init__(self, shape: Shape, start: int) -> None:
        super().__init__()
        self.start = start

    def forward(self, x: Tensor) -> Tensor:
        return x.narrow(1, self.start, x.shape[1] - self.start)


@kind(MAP, arguments=width)
class PostActivation(nn.Module):
    """A residual block whose sum goes through an activation, in place."""

    def __init__(self, shape: Shape, inner: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(shape[1], inner, 3, padding=1), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, shape[1], 1, bias=False), nn.BatchNorm2d(shape[1])
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        out += x
        return self.act(out)


@kind(MAP, arguments=width)
class Projected(nn.Module):
    """Two paths to one sum, one of them short."""

    def __init__(self, shape: Shape, outputs: int) -> None:
        super().__init__()
        self.long = nn.Sequential(nn.Conv2d(shape[1], outputs, 1), nn.SiLU(), nn.Conv2d(outputs, outputs, 3, padding=1))
        self.short = nn.Conv2d(shape[1], outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.long(x) + self.short(x))


@kind(MAP, arguments=width)
class GatedResidual(nn.Module):
    """A branch that ends in a gate, and a layer scale of the block."""

    def __init__(self, shape: Shape, inner: int) -> None:
        super().__init__()
        self.norm, self.first = nn.BatchNorm2d(shape[1]), nn.Conv2d(shape[1], inner, 3, padding=1)
        self.gate, self.last = nn.Conv2d(inner, inner, 1), nn.Conv2d(inner, shape[1], 1)
        self.gamma = nn.Parameter(torch.ones(shape[1], 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(self.norm(x)))
        y = self.last(y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid())
        return x + self.gamma * y


@kind(MAP, arguments=width)
class Arms(nn.Module):
    """A branch of two arms that are concatenated, inside a residual block."""

    def __init__(self, shape: Shape, inner: int) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(shape[1], inner, 1), nn.Conv2d(shape[1], inner, 3, padding=1)
        self.join = nn.Conv2d(2 * inner, shape[1], 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.join(torch.cat([self.left(x), F.gelu(self.right(x))], 1)), x)


@kind(MAP, arguments=width)
class Densely(nn.Module):
    """Layers that read all that was there before, concatenated anew for each."""

    def __init__(self, shape: Shape, growth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(shape[1] + i * growth, growth, 1) for i in range(2))

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for layer in self.layers:
            found.append(F.gelu(layer(torch.cat(found, 1))))
        return torch.cat(found, 1)


@kind(MAP, arguments=width)
class SqueezeExcite(nn.Module):
    def __init__(self, shape: Shape, inner: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(shape[1], inner, 1), nn.Conv2d(inner, shape[1], 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(F.silu(self.reduce(F.adaptive_avg_pool2d(x, 1)))).sigmoid()


@kind(MAP, arguments=width)
class Gate(nn.Module):
    def __init__(self, shape: Shape, inner: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Linear(shape[1], inner), nn.Linear(inner, shape[1])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(torch.relu(self.reduce(x.mean((2, 3))))).sigmoid()[:, :, None, None]


@kind(MAP)
class NeighbourGate(nn.Module):
    """Efficient channel attention: a convolution along the channels."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.mean((2, 3)).view(x.shape[0], 1, -1)).sigmoid()
        return x * y.view(x.shape[0], -1, 1, 1)


@kind(MAP)
class SpaceGate(nn.Module):
    """CBAM: mean and maximum over the channels weigh the places."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), 1)
        return x * self.conv(both).sigmoid()


@kind(MAP, arguments=width)
class Halves(nn.Module):
    """A gated linear unit by hand."""

    def __init__(self, shape: Shape, inner: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(shape[1], 2 * inner, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.wide(x).chunk(2, dim=1)
        return a * b.sigmoid()


@kind(MAP, arguments=width)
class Glu(nn.Module):
    def __init__(self, shape: Shape, inner: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(shape[1], 2 * inner, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(self.wide(x), dim=1)


@kind(MAP, arguments=width)
class Selective(nn.Module):
    """Two branches stacked and weighed by a softmax between them (SKNet)."""

    def __init__(self, shape: Shape, out: int) -> None:
        super().__init__()
        self.out = out
        self.branches = nn.ModuleList([nn.Conv2d(shape[1], out, 1), nn.Conv2d(shape[1], out, 3, padding=1)])
        self.weigh = nn.Linear(out, 2 * out)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([branch(x) for branch in self.branches], dim=1)
        weights = self.weigh(both.sum(1).mean((2, 3))).view(-1, 2, self.out, 1, 1).softmax(1)
        return (both * weights).sum(1)


@kind(MAP)
class Gram(nn.Module):
    """Attention between channels, without weights of its own."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(2)
        return ((y @ y.transpose(1, 2)) * 0.1).softmax(-1).matmul(y).view_as(x)


@kind(MAP, arguments=divisor)
class CrossCovariance(nn.Module):
    """XCiT: attention between the channels of a head, by normalised queries and keys."""

    def __init__(self, shape: Shape, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Conv2d(shape[1], 3 * shape[1], 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(x).reshape(b, 3, self.num_heads, c // self.num_heads, h * w).unbind(1)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return ((q @ k.transpose(-2, -1) * self.temperature).softmax(-1) @ v).reshape(b, c, h, w)


@kind(MAP)
class Scale(nn.Module):
    """Parameters that no torch.nn module owns."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(shape[1], 1, 1))
        self.position = nn.Parameter(torch.ones(1, *shape[1:]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma + self.position


@kind(MAP, arguments=lambda draw, shape: (draw(range(4)), draw(range(4))))
class PadChannels(nn.Module):
    def __init__(self, shape: Shape, before: int, after: int) -> None:
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))


@kind(MAP, arguments=lambda draw, shape: (*width(draw), draw([1, 2])))
class PixelShuffle(nn.Module):
    def __init__(self, shape: Shape, out: int, factor: int) -> None:
        super().__init__()
        factor = factor if shape[2] < SIDE else 1
        self.conv, self.shuffle = nn.Conv2d(shape[1], out * factor**2, 1), nn.PixelShuffle(factor)

    def forward(self, x: Tensor) -> Tensor:
        return self.shuffle(self.conv(x))


@kind(MAP, arguments=if_even_side)
class PixelUnshuffle(nn.Module):
    """To a quarter of the space and back, with a layer between."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4 * shape[1])

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.norm(F.pixel_unshuffle(x, 2)), 2)


@kind(MAP, arguments=lambda draw, shape: (*width(draw), draw([False, True])))
class Twice(nn.Module):
    """One convolution called twice, with or without a shortcut."""

    def __init__(self, shape: Shape, inner: int, shortcut: bool) -> None:
        super().__init__()
        self.first, self.conv, self.shortcut = nn.Conv2d(shape[1], inner, 1), nn.Conv2d(inner, inner, 1), shortcut

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.conv(torch.relu(self.conv(x)))
        return x + y if self.shortcut else y


@kind(MAP, arguments=width)
class Tied(nn.Module):
    """Two convolutions with one weight, each with its own bias."""

    def __init__(self, shape: Shape, out: int) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(shape[1], out, 1), nn.Conv2d(shape[1], out, 1)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.left(x), self.right(x.relu())), 1)


@kind(MAP, arguments=divisor)
class Involution(nn.Module):
    """Kernels that are computed from the input, applied to its windows."""

    def __init__(self, shape: Shape, groups: int) -> None:
        super().__init__()
        self.groups, self.group_channels = groups, shape[1] // groups
        self.kernels = nn.Conv2d(shape[1], 9 * groups, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        weight = self.kernels(x).view(b, self.groups, 9, h, w).unsqueeze(2)
        windows = F.unfold(x, 3, padding=1).view(b, self.groups, self.group_channels, 9, h, w)
        return (weight * windows).sum(3).view(b, c, h, w)


@kind(MAP, arguments=if_even_side)
class FoldedWindows(nn.Module):
    """A linear layer over windows that are then put back in space."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.linear = nn.Linear(4 * shape[1], 4 * shape[1])

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(F.unfold(x, 2, stride=2).transpose(1, 2)).transpose(1, 2)
        return F.fold(y, x.shape[2:], 2, stride=2)


@kind(MAP, arguments=if_even_side)
class Windows(nn.Module):
    """Swin: attention inside of windows of 2 x 2 places, one head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(shape[1]), nn.Linear(shape[1], shape[1])

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = x.permute(0, 2, 3, 1).view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        y = self.norm(y)
        y = self.proj((y @ y.transpose(1, 2) * 0.1).softmax(-1) @ y)
        y = y.view(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return x + y.permute(0, 3, 1, 2)


@kind(MAP, arguments=width)
class ConvNeXtBlock(nn.Module):
    def __init__(self, shape: Shape, inner: int) -> None:
        super().__init__()
        c = shape[1]
        self.depthwise, self.norm = nn.Conv2d(c, c, 3, padding=1, groups=c), nn.LayerNorm(c)
        self.fc1, self.fc2 = nn.Linear(c, inner), nn.Linear(inner, c)
        self.gamma = nn.Parameter(torch.ones(c))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.fc2(F.gelu(self.fc1(y)))).permute(0, 3, 1, 2)


@kind(MAP, arguments=width)
class InvertedResidual(nn.Module):
    def __init__(self, shape: Shape, inner: int) -> None:
        super().__init__()
        c = shape[1]
        self.body = nn.Sequential(
            nn.Conv2d(c, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6(),
            nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False), nn.BatchNorm2d(inner), nn.ReLU6(),
            nn.Conv2d(inner, c, 1, bias=False), nn.BatchNorm2d(c),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


#: Maps to maps without weights.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "plus one": lambda x: x.tanh() + 1,
    "max pool": lambda x: F.max_pool2d(x, 3, 1, 1),
    "average pool": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "interpolate": lambda x: F.interpolate(x, size=(SIDE, SIDE), mode="bilinear"),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "repeat interleave": lambda x: x.repeat_interleave(2, dim=1),
    "double": lambda x: torch.cat([x, x.relu()], 1),
    "stack": lambda x: torch.stack([x, x.relu()], 2).flatten(1, 2),
    "transposed space": lambda x: x.transpose(2, 3),
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(1, 3),
    "softmax": lambda x: x.softmax(1),
    "spatial softmax": lambda x: x.flatten(2).softmax(-1).view(x.shape),
    "l2": lambda x: F.normalize(x, dim=1),
    "centred": lambda x: x - x.mean(1, keepdim=True),
    "unflatten": lambda x: x.unflatten(1, (-1, 1)).squeeze(2),
    "cumsum": lambda x: x.cumsum(1),
    "without first": lambda x: x[:, 1:] if x.shape[1] > 1 else x,
    "maxout": lambda x: x.view(x.shape[0], x.shape[1] // 2, 2, *x.shape[2:]).amax(2) if x.shape[1] % 2 == 0 else x,
    "masked": lambda x: x.masked_fill(x < 0, 0.5),
}


@kind(MAP, arguments=lambda draw, shape: (draw(list(FUNCTIONS)),))
class Function(nn.Module):
    def __init__(self, shape: Shape, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return FUNCTIONS[self.name](x)


# ---------------------------------------------------------------- between maps and tokens [B, N, C]


@kind(MAP)
class Flattened(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


@kind(MAP, arguments=lambda draw, shape: width(draw) if shape[2] % 2 == 0 else None)
class Patches(nn.Module):
    """Patches of 2 x 2 places, with a class token and a positional embedding."""

    def __init__(self, shape: Shape, out: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(shape[1], out, 2, stride=2)
        self.cls_token = nn.Parameter(torch.ones(1, 1, out))
        self.pos_embed = nn.Parameter(torch.ones(1, 1 + (shape[2] // 2) ** 2, out))

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x).flatten(2).transpose(1, 2)
        return torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed


@kind(MAP, arguments=if_even_side)
class Merged(nn.Module):
    """Swin's patch merging: four places beside each other in the channels, then a linear layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * shape[1]), nn.Linear(4 * shape[1], 2 * shape[1], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = x.permute(0, 2, 3, 1)
        y = torch.cat([y[:, 0::2, 0::2], y[:, 1::2, 0::2], y[:, 0::2, 1::2], y[:, 1::2, 1::2]], -1)
        return self.reduction(self.norm(y)).flatten(1, 2)


@kind(TOKENS, arguments=if_square)
class Mapped(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        side = math.isqrt(n)
        return x.transpose(1, 2).reshape(b, c, side, side)


# ---------------------------------------------------------------- tokens to tokens


@kind(TOKENS, arguments=width)
class Linear(nn.Linear):
    def __init__(self, shape: Shape, out: int) -> None:
        super().__init__(shape[-1], out)


@kind(TOKENS)
class LayerNorm(nn.LayerNorm):
    def __init__(self, shape: Shape) -> None:
        super().__init__(shape[-1])


@kind(TOKENS)
class RMSNorm(nn.RMSNorm):
    def __init__(self, shape: Shape) -> None:
        super().__init__(shape[-1])


@kind(TOKENS)
class LayerScale(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(shape[-1]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


@kind(TOKENS)
class ClassToken(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.ones(1, 1, shape[-1]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)


@kind(TOKENS, arguments=lambda draw, shape: () if shape[1] > 2 else None)
class WithoutFirst(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 1:] + x[:, :1]


@kind(TOKENS, arguments=width)
class Mlp(nn.Module):
    def __init__(self, shape: Shape, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape[-1])
        self.fc1, self.fc2 = nn.Linear(shape[-1], inner), nn.Linear(inner, shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


@kind(TOKENS, arguments=width)
class SwiGlu(nn.Module):
    def __init__(self, shape: Shape, inner: int) -> None:
        super().__init__()
        self.inner = inner
        self.fc1, self.fc2 = nn.Linear(shape[-1], 2 * inner), nn.Linear(inner, shape[-1], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, y = self.fc1(x).split([self.inner, self.inner], dim=-1)
        return self.fc2(F.silu(gate) * y)


@kind(TOKENS, arguments=width)
class TokenMixing(nn.Module):
    """MLP-Mixer: linear layers along the tokens."""

    def __init__(self, shape: Shape, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(shape[1], inner), nn.Linear(inner, shape[1])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.relu(self.fc1(x.transpose(1, 2)))).transpose(1, 2)


@kind(TOKENS, arguments=width)
class Autoencoder(nn.Module):
    """One weight there and, transposed, back."""

    def __init__(self, shape: Shape, inner: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(inner, shape[-1]))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, self.weight)), self.weight.t())


@kind(TOKENS, arguments=lambda draw, shape: (*width(draw), draw([1, 2]), draw([False, True])))
class Gru(nn.Module):
    def __init__(self, shape: Shape, hidden: int, layers: int, both: bool) -> None:
        super().__init__()
        self.rnn = nn.GRU(shape[-1], hidden, layers, batch_first=True, bidirectional=both)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


@kind(TOKENS, arguments=lambda draw, shape: (*width(draw), draw([1, 2]), draw([False, True])))
class Lstm(nn.Module):
    """The last state is added to every step."""

    def __init__(self, shape: Shape, hidden: int, layers: int, both: bool) -> None:
        super().__init__()
        self.rnn = nn.LSTM(shape[-1], hidden, layers, batch_first=True, bidirectional=both)

    def forward(self, x: Tensor) -> Tensor:
        y, (last, _) = self.rnn(x)
        return y + last.transpose(0, 1).flatten(1)[:, None, : y.shape[-1]]


SCALES = ["sdpa", "sdpa scale", "attribute", "before", "after", "none"]


def attend(q: Tensor, k: Tensor, v: Tensor, kind: str, scale: float) -> Tensor:
    """Attention with the scale that `kind` says."""
    if kind == "sdpa":
        return F.scaled_dot_product_attention(q, k, v)
    if kind == "sdpa scale":
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    if kind == "attribute":
        return ((q * scale) @ k.transpose(-2, -1)).softmax(-1) @ v
    if kind == "before":
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
    if kind == "after":
        return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1) @ v
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k)
    scores = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("bhnm,bhmd->bhnd", scores / scores.sum(-1, keepdim=True), v)


def attention(draw: Draw, *shapes: Shape) -> tuple[int, int, str]:
    return (*heads_and_dim(draw), draw(SCALES))


@kind(TOKENS, arguments=lambda draw, shape: (*attention(draw), draw(["unbind", "chunk", "last"])))
class Attention(nn.Module):
    """Fused qkv, taken apart in three ways; the forward names heads and head_dim by attributes."""

    def __init__(self, shape: Shape, heads: int, head_dim: int, kind: str, taken: str) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.kind, self.taken = heads, head_dim, kind, taken
        self.scale = head_dim**-0.5
        self.qkv = nn.Linear(shape[-1], 3 * heads * head_dim)
        self.proj = nn.Linear(heads * head_dim, shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        if self.taken == "unbind":
            q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.taken == "chunk":
            q, k, v = (y.reshape(b, n, self.num_heads, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        else:
            qkv = self.qkv(x).reshape(b, n, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
            q, k, v = qkv[0], qkv[1], qkv[2]
        y = attend(q, k, v, self.kind, self.scale).transpose(1, 2)
        return x + self.proj(y.reshape(b, n, self.num_heads * self.head_dim))


@kind(TOKENS, arguments=lambda draw, shape: (*divisor(draw, shape), draw(SCALES), draw([False, True])))
class ViTAttention(nn.Module):
    """timm's: heads and head_dim computed from the width, optional norms of q and k."""

    def __init__(self, shape: Shape, heads: int, kind: str, norm: bool) -> None:
        super().__init__()
        c = shape[-1]
        self.num_heads, self.kind, self.scale = heads, kind, (c // heads) ** -0.5
        self.norm, self.qkv, self.proj = nn.LayerNorm(c), nn.Linear(c, 3 * c), nn.Linear(c, c)
        self.q_norm, self.k_norm = (nn.LayerNorm(c // heads) if norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = attend(self.q_norm(q), self.k_norm(k), v, self.kind, self.scale)
        return x + self.proj(y.transpose(1, 2).reshape(b, n, c))


@kind(TOKENS, arguments=lambda draw, shape: (*attention(draw), draw([False, True])))
class SeparateAttention(nn.Module):
    """Separate q, k and v, with a bias on the scores; with one head of keys and values for all, if `shared`."""

    def __init__(self, shape: Shape, heads: int, head_dim: int, kind: str, shared: bool) -> None:
        super().__init__()
        self.heads, self.scale, self.kind, self.shared = heads, head_dim**-0.5, kind, shared
        c, inner, keys = shape[-1], heads * head_dim, head_dim if shared else heads * head_dim
        self.q, self.k, self.v = nn.Linear(c, inner), nn.Linear(c, keys, bias=False), nn.Linear(c, keys)
        self.proj = nn.Linear(inner, c)
        self.bias = nn.Parameter(torch.ones(heads, shape[1], shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, -1).transpose(1, 2)
        heads = 1 if self.shared else self.heads
        k, v = (y.view(b, n, heads, -1).transpose(1, 2) for y in (self.k(x), self.v(x)))
        if self.kind == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        elif self.kind == "attribute":
            y = (q @ k.transpose(-2, -1) * self.scale + self.bias).softmax(-1) @ v
        elif self.shared:
            y = attend(q, k.expand(b, self.heads, n, -1), v.expand(b, self.heads, n, -1), self.kind, self.scale)
        else:
            y = attend(q, k, v, self.kind, self.scale)
        return self.proj(y.transpose(1, 2).flatten(2))


@kind(TOKENS, arguments=divisor)
class Multihead(nn.Module):
    def __init__(self, shape: Shape, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(shape[-1], heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


@kind(TOKENS, arguments=heads_and_dim)
class LinearAttention(nn.Module):
    """No scores: keys normalised over the tokens, keys times values first."""

    def __init__(self, shape: Shape, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.qkv, self.proj = nn.Linear(shape[-1], 3 * heads * head_dim), nn.Linear(heads * head_dim, shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).view(b, n, 3 * self.heads, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split(self.heads, dim=1)
        context = k.softmax(-2).transpose(-2, -1) @ v
        y = q.relu() @ context / (1 + q.relu().sum(-1, keepdim=True))
        return self.proj(y.transpose(1, 2).reshape(b, n, -1))


@kind(TOKENS, arguments=lambda draw, shape: (draw([1, 2]), draw([2, 4])))
class GroupedQueries(nn.Module):
    """Two query heads share one key head."""

    def __init__(self, shape: Shape, heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q = nn.Linear(shape[-1], 2 * heads * head_dim)
        self.k, self.v = nn.Linear(shape[-1], heads * head_dim), nn.Linear(shape[-1], heads * head_dim)
        self.proj = nn.Linear(2 * heads * head_dim, shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (y.view(b, n, -1, self.head_dim).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))


# ---------------------------------------------------------------- two values to one


class Binary(nn.Module):
    def __init__(self, *shapes: Shape) -> None:
        super().__init__()


def same_shapes(draw: Draw, left: Shape, right: Shape) -> tuple | None:
    return () if left == right else None


def same_space(draw: Draw, left: Shape, right: Shape) -> tuple | None:
    return () if left[2:] == right[2:] else None


def same_channels(draw: Draw, left: Shape, right: Shape) -> tuple | None:
    return () if channels(left) == channels(right) else None


@kind(MAP, MAP, arguments=same_shapes)
class Add(Binary):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


@kind(MAP, MAP, arguments=same_shapes)
class Multiply(Binary):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y.tanh()


@kind(MAP, MAP, arguments=same_shapes)
class Maximum(Binary):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.maximum(x, torch.where(x > 0, y, x))


@kind(MAP, MAP, arguments=same_space)
class Concatenated(Binary):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat((x, y), 1)


@kind(MAP, MAP, arguments=same_shapes)
class Interleaved(Binary):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.stack((x, y), dim=2).flatten(1, 2)


@kind(MAP, MAP, arguments=same_channels)
class Gated(Binary):
    """One value weighs the channels of another."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y.mean((2, 3), keepdim=True).sigmoid()


@kind(MAP, MAP, arguments=same_space)
class Outer(Binary):
    """Bilinear pooling: every channel times every channel."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x.unsqueeze(2) * y.tanh().unsqueeze(1)).flatten(1, 2)


@kind(MAP, MAP, arguments=same_space)
class ChannelAttention(Binary):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        scores = torch.einsum("bchw,bdhw->bcd", x, y) / 16
        return torch.bmm(scores.softmax(-1), y.flatten(2)).view(x.shape)


@kind(TOKENS, TOKENS, arguments=same_shapes)
class AddTokens(Binary):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.add(y, alpha=0.5)


@kind(TOKENS, TOKENS, arguments=lambda draw, left, right: () if left[1] == right[1] else None)
class ConcatenatedTokens(Binary):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat((x, y), -1)


@kind(TOKENS, TOKENS, arguments=same_channels)
class Joined(Binary):
    """Tokens of two values one after the other."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat((x, y), 1)


@kind(TOKENS, TOKENS, arguments=attention)
class CrossAttention(nn.Module):
    def __init__(self, left: Shape, right: Shape, heads: int, head_dim: int, kind: str) -> None:
        super().__init__()
        self.num_heads, self.kind, self.scale = heads, kind, head_dim**-0.5
        inner = heads * head_dim
        self.q, self.kv = nn.Linear(left[-1], inner), nn.Linear(right[-1], 2 * inner)
        self.proj = nn.Linear(inner, left[-1])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(y).view(b, y.shape[1], 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return x + self.proj(attend(q, k, v, self.kind, self.scale).transpose(1, 2).reshape(b, n, -1))


# ---------------------------------------------------------------- models


class Step(NamedTuple):
    """A kind of layer, its arguments, and which values it takes: 0 is the input, n the result of step n."""

    kind: str
    arguments: tuple
    sources: tuple[int, ...]

    def layer(self, values: list[Tensor]) -> nn.Module:
        return KINDS[self.kind].layer(*(tuple(values[index].shape) for index in self.sources), *self.arguments)


class Net(nn.Module):
    """Applies `steps` in order; every value that no step takes goes to the head."""

    def __init__(self, steps: list[Step], head: str = "mean") -> None:
        super().__init__()
        self.steps, self.head_kind, self.layers = steps, head, nn.ModuleList()
        values = [blank()]
        for step in steps:
            self.layers.append(step.layer(values).eval())
            values.append(run(self.layers[-1], step, values))
        used = {index for step in steps for index in step.sources}
        self.ends = [index for index in range(len(values)) if index not in used]
        self.head = nn.Linear(self.pooled(values).shape[1], CLASSES)

    def pooled(self, values: list[Tensor]) -> Tensor:
        if self.head_kind == "flatten":
            return torch.cat([values[index].flatten(1) for index in self.ends], 1)
        if self.head_kind == "first":  # the class token, or a global maximum
            picked = [values[index] for index in self.ends]
            return torch.cat(
                [y[:, 0] if y.dim() == TOKENS else y.reshape(*y.shape[:2], -1).amax(-1) for y in picked], 1
            )
        return torch.cat(
            [values[i].mean(1) if values[i].dim() == TOKENS else values[i].mean((2, 3)) for i in self.ends], 1
        )

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for layer, step in zip(self.layers, self.steps, strict=True):
            values.append(layer(*(values[index] for index in step.sources)))
        return self.head(self.pooled(values))


def blank() -> Tensor:
    return torch.zeros(BATCH, 3, SIDE, SIDE)


def run(layer: nn.Module, step: Step, values: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return layer(*(values[index] for index in step.sources))


def steps_of_a_model(draw: Draw, kind: str) -> list[Step] | None:
    """A convolution, some layers, one layer of `kind`, and some more; None where that does not fit its input."""
    model = Steps(draw)
    model.add(Step("Conv", (draw(WIDTHS), 3), (0,)))
    for _ in range(draw(range(STEPS // 2))):
        model.add(model.anything())
    if KINDS[kind].ranks[0] == TOKENS and model.rank != TOKENS:
        model.add(Step("Flattened", (), (len(model.steps),)))
    if KINDS[kind].ranks[0] == MAP and model.rank != MAP:
        return None
    step = model.of_kind(kind)
    if step is None:  # it may fit an even width, or what lies beside it
        model.add(model.plain(len(model.steps), draw([4, 6])))
        step = model.of_kind(kind)
    if step is None:
        return None
    model.add(step)
    for _ in range(draw(range(1 + STEPS // 2))):
        model.add(model.anything())
    return model.steps


class Steps:
    """A model that grows."""

    def __init__(self, draw: Draw) -> None:
        self.draw, self.steps, self.values = draw, list[Step](), [blank()]

    @property
    def rank(self) -> int:
        return self.values[-1].dim()

    def add(self, step: Step) -> None:
        self.steps.append(step)
        self.values.append(run(step.layer(self.values).eval(), step, self.values))

    def plain(self, source: int, out: int) -> Step:
        return (
            Step("Conv", (out, 1), (source,)) if self.values[source].dim() == MAP else Step("Linear", (out,), (source,))
        )

    def anything(self) -> Step:
        """A layer for the last value, or for an earlier one; a plain one where what is drawn does not fit."""
        last = len(self.steps)
        source = self.draw([last, last, last, *range(1, last)])
        shape = tuple(self.values[source].shape)
        if channels(shape) > WIDEST:
            return self.plain(source, *width(self.draw))
        ranks = (len(shape), len(shape)) if self.draw([False, False, False, True]) else (len(shape),)
        name = self.draw([name for name, item in KINDS.items() if item.ranks == ranks])
        return self.of_kind(name, source) or self.plain(source, *width(self.draw))

    def of_kind(self, name: str, source: int | None = None) -> Step | None:
        """A layer of this kind, if its input and what it draws beside it fit."""
        sources = [len(self.steps) if source is None else source]
        ranks = KINDS[name].ranks
        if len(ranks) == 2:
            sources.append(self.draw([i for i in range(1, len(self.values)) if self.values[i].dim() == ranks[1]]))
        shapes = [tuple(self.values[index].shape) for index in sources]
        arguments = KINDS[name].arguments(self.draw, *shapes)
        return None if arguments is None else Step(name, tuple(arguments), tuple(sources))
