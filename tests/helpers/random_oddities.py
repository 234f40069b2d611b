"""More kinds of layers of random models: state that a forward keeps, sizes in odd places, ops that are seldom met."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from helpers.random_models import MAP, TOKENS, Binary, Draw, Shape, divisor, kind, same_shapes, width

# ---------------------------------------------------------------- state


def places(x: Tensor) -> Tensor:
    """A number for every place of a map, `[H, W]`."""
    return torch.arange(x.shape[2] * x.shape[3]).type_as(x).view(x.shape[2:]) / 16


@kind(MAP, arguments=lambda draw, shape: (draw(["none", "new", "dict", "class attribute", "list"]),))
class Cached(nn.Module):
    """A table that the first forward makes, and that later ones find."""

    grid, shape = torch.empty(0), None

    def __init__(self, shape: Shape, how: str) -> None:
        super().__init__()
        self.how, self.table, self.tables, self.listed = how, None, {}, [torch.empty(0)]

    def kept(self, x: Tensor) -> Tensor:
        if self.how == "none":
            self.table = places(x) if self.table is None else self.table
            return self.table
        if self.how == "new":
            if not hasattr(self, "made"):
                self.made = places(x)
            return self.made
        if self.how == "dict":
            return self.tables.setdefault(tuple(x.shape[2:]), places(x))
        if self.how == "list":
            if self.listed[0].shape != x.shape[2:]:
                self.listed[0] = places(x)
            return self.listed[0]
        if self.shape != x.shape:
            self.grid, self.shape = places(x), x.shape
        return self.grid

    def forward(self, x: Tensor) -> Tensor:
        return x + self.kept(x)


@kind(TOKENS)
class PlainTable(nn.Module):
    """Positions in a tensor that is no buffer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        angle = torch.arange(shape[1])[:, None] / 10 ** (torch.arange(shape[2]) / shape[2])
        self.table = torch.where(torch.arange(shape[2]) % 2 == 0, angle.sin(), angle.cos())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table.to(x)


@kind(MAP)
class ReadsValue(nn.Module):
    """A stride that a forward reads out of a table, whose number says how the maps are scaled."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.strides = torch.tensor([2.0, 0.5])
        self.weight = nn.Parameter(torch.ones(shape[1], 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * float(self.strides[0]) + self.strides[1].item()


# ---------------------------------------------------------------- containers and sizes


@kind(MAP, arguments=lambda draw, shape: (*width(draw), draw([1, 2])))
class Checked(nn.Module):
    """Checks the width of what it hands on, and computes nothing itself; twice inside one another, if `depth` is 2."""

    def __init__(self, shape: Shape, out: int, depth: int) -> None:
        super().__init__()
        self.channels = shape[1]
        self.inner = nn.Conv2d(shape[1], out, 1) if depth == 1 else Checked(shape, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.channels
        return self.inner(x)


class ToHeads(nn.Module):
    """Channels to heads, whose number is kept in pairs or in a dict."""

    def __init__(self, pairs: bool, **sizes: int) -> None:
        super().__init__()
        self.sizes = tuple(sizes.items()) if pairs else sizes

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        heads = dict(self.sizes)["heads"]
        return x.reshape(b, n, heads, c // heads).transpose(1, 2)


@kind(TOKENS, arguments=lambda draw, shape: (draw([1, 2, 3]), draw([2, 3]), draw([True, False])))
class PairedSizes(nn.Module):
    """Attention that knows its number of heads by such a table."""

    def __init__(self, shape: Shape, heads: int, head_dim: int, pairs: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(shape[-1], heads * head_dim) for _ in range(3))
        self.to_q, self.to_k, self.to_v = (ToHeads(pairs, heads=heads) for _ in range(3))
        self.proj = nn.Linear(heads * head_dim, shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_q(self.q(x)), self.to_k(self.k(x)), self.to_v(self.v(x))
        y = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return x + self.proj(y.transpose(1, 2).flatten(2))


@kind(TOKENS, arguments=lambda draw, shape: (draw([1, 2, 3]), draw([2, 3]), draw([1, 2, 3])))
class Products(nn.Module):
    """LeViT: cut at key_dim, and at a ratio times key_dim; the width of the result is a product of three attributes."""

    def __init__(self, shape: Shape, heads: int, key_dim: int, ratio: int) -> None:
        super().__init__()
        self.heads, self.key_dim, self.ratio, self.scale = heads, key_dim, ratio, key_dim**-0.5
        self.width = ratio * key_dim * heads
        self.qkv, self.proj = nn.Linear(shape[-1], (ratio + 2) * key_dim * heads), nn.Linear(self.width, shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        sizes = [self.key_dim, self.key_dim, self.ratio * self.key_dim]
        q, k, v = (y.transpose(1, 2) for y in self.qkv(x).view(b, n, self.heads, -1).split(sizes, dim=3))
        y = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
        return x + self.proj(F.hardswish(y.transpose(1, 2).reshape(b, n, self.width)))


@kind(TOKENS, arguments=lambda draw, shape: (draw([2, 3]), draw([1, 2]), draw([2, 3])))
class Repeated(nn.Module):
    """Mamba-2: one row of gates for several heads, repeated to a number that is named."""

    def __init__(self, shape: Shape, times: int, groups: int, dim: int) -> None:
        super().__init__()
        self.heads, self.groups = times * groups, groups
        self.x, self.gate = nn.Linear(shape[-1], times * groups * dim), nn.Linear(shape[-1], groups * dim)

    def forward(self, u: Tensor) -> Tensor:
        b, n, _ = u.shape
        x, gate = self.x(u).view(b, n, self.heads, -1), self.gate(u).view(b, n, self.groups, -1)
        gate = gate.repeat_interleave(self.heads // self.groups, dim=2, output_size=self.heads)
        return (x * gate.tanh()).flatten(2)


# ---------------------------------------------------------------- ops


@kind(MAP)
class FourierSpace(nn.Module):
    """A global filter over space: a complex number a frequency and channel."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(*shape[1:3], shape[3] // 2 + 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        f = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(self.gate)
        return x + torch.fft.irfft2(f, s=x.shape[2:], norm="ortho")


@kind(MAP, arguments=width)
class SpectralConv(nn.Module):
    """A complex matrix for the lowest frequencies, nothing of the others."""

    def __init__(self, shape: Shape, out: int) -> None:
        super().__init__()
        self.out, self.weight = out, nn.Parameter(torch.ones(shape[1], out, 2))

    def forward(self, x: Tensor) -> Tensor:
        f = torch.fft.rfft2(x)
        low = torch.einsum("bixy,io->boxy", f[:, :, :1, :1], torch.view_as_complex(self.weight))
        return torch.fft.irfft2(F.pad(low, (0, f.shape[3] - 1, 0, f.shape[2] - 1)), s=x.shape[2:])


@kind(TOKENS, arguments=lambda draw, shape: (draw(["real", "complex"]),))
class FourierTokens(nn.Module):
    """FNet: the real part of a transform along the tokens, or a filter of the frequencies."""

    def __init__(self, shape: Shape, how: str) -> None:
        super().__init__()
        self.how, self.norm = how, nn.LayerNorm(shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "real":
            return self.norm(x + torch.fft.fft(x, dim=1).real)
        f = torch.fft.rfft(x, dim=1)
        return self.norm(x + torch.fft.irfft(f * f.abs().sigmoid(), n=x.shape[1], dim=1))


@kind(TOKENS, arguments=width)
class Bilinear(nn.Module):
    def __init__(self, shape: Shape, out: int) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(shape[-1], shape[-1], out)

    def forward(self, x: Tensor) -> Tensor:
        return self.bilinear(x, x.tanh())


@kind(TOKENS, arguments=lambda draw, shape: (draw(range(1, shape[1] + 1)),))
class BestTokens(nn.Module):
    """The best tokens, gathered by an index that is expanded over the channels."""

    def __init__(self, shape: Shape, count: int) -> None:
        super().__init__()
        self.count, self.score = count, nn.Linear(shape[-1], 1)

    def forward(self, x: Tensor) -> Tensor:
        best = self.score(x).squeeze(-1).topk(self.count, dim=1).indices
        return torch.gather(x, 1, best.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


@kind(MAP)
class Regions(nn.Module):
    """One region an image, resampled to the size of the map."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        boxes = [[i, 0.3, 0.2, shape[3] - 0.4, shape[2] - 0.1] for i in range(shape[0])]
        self.register_buffer("boxes", torch.tensor(boxes))

    def forward(self, x: Tensor) -> Tensor:
        return torchvision.ops.roi_align(x, self.boxes, x.shape[2:], sampling_ratio=2)


@kind(MAP, arguments=lambda draw, shape: (*divisor(draw, shape), *width(draw)))
class Deformable(nn.Module):
    """A deformable convolution; the offsets are coordinates."""

    def __init__(self, shape: Shape, groups: int, out: int) -> None:
        super().__init__()
        self.offsets = nn.Conv2d(shape[1], 27, 1)
        self.conv = torchvision.ops.DeformConv2d(shape[1], groups * out, 3, padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        y, z, mask = self.offsets(x).chunk(3, 1)
        return self.conv(x, torch.cat((y, z), 1).tanh(), mask.sigmoid())


@kind(MAP, arguments=width)
class WeightNormed(nn.Module):
    def __init__(self, shape: Shape, out: int) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(shape[1], out, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


# ---------------------------------------------------------------- two values to one

#: Ops by their other names, and masks; the second value is positive.
ALIASES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "multiply": torch.multiply,
    "divide": torch.divide,
    "subtract": torch.subtract,
    "true divide": torch.true_divide,
    "and": lambda x, y: torch.where((x > 0) & (y > 1.4), x, y),
    "or": lambda x, y: x * ((x > 0) | (y > 1.4)).to(x.dtype),
    "not": lambda x, y: x.masked_fill(~(y > 1.4), 0.5),
    "hypot": torch.hypot,
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
}


def alias(draw: Draw, left: Shape, right: Shape) -> tuple | None:
    return None if same_shapes(draw, left, right) is None else (draw(list(ALIASES)),)


@kind(MAP, MAP, arguments=alias)
class Alias(nn.Module):
    def __init__(self, left: Shape, right: Shape, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return ALIASES[self.name](x, y.sigmoid() + 1)


@kind(TOKENS, TOKENS, arguments=same_shapes)
class Cosine(Binary):
    """Tokens weighed by how alike two values are."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * F.cosine_similarity(x, y, dim=-1)[..., None]
