"""Small models of what once broke a comb, a kind of fault each: `python benchmarks/coverage.py --faults`.

State that a forward keeps, containers that check a width, weights that are computed, ops that had no rule, sizes kept
in odd places, values that a forward reads. `least` is the share of parameters that must be in open groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

CLASSES = 5


class Fault(NamedTuple):
    """A model, its inputs, and the share of parameters that must be open."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    least: float = 0.99


FAULTS: dict[str, Fault] = {}


def images(side: int = 16, channels: int = 3) -> Callable[[], tuple[Tensor, ...]]:
    """One random image."""
    return lambda: (torch.randn(1, channels, side, side),)


def rows(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    """Random rows of twelve numbers."""
    return lambda: (torch.randn(*shape, 12),)


def fault(
    name: str, inputs: Callable[[], tuple[Tensor, ...]], *arguments: object, least: float = 0.99
) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Enter what gives a model, called with `arguments`, into the table; a class may be entered several times."""

    def enter(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        FAULTS[name] = Fault(lambda: make(*arguments), inputs, least)
        return make

    return enter


def body() -> list[nn.Module]:
    """Two convolutions, to 32 channels and then to 48."""
    return [nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 48, 3, 2, 1), nn.ReLU()]


# ---------------------------------------------------------------------------------- state that a forward keeps


def mesh(f: Tensor) -> Tensor:
    """The places of a map, `[2, H, W]`."""
    at = (torch.arange(side).type_as(f) for side in f.shape[2:])
    return torch.stack(torch.meshgrid(*at, indexing="ij")) * 2


class Cached(nn.Module):
    """A convolution to two channels, with the places added; a method's name says how their table is kept."""

    grid = torch.empty(0)
    shape: tuple[int, ...] | None = None

    def __init__(self, how: str) -> None:
        super().__init__()
        self.body, self.out, self.how = nn.Sequential(*body()), nn.Conv2d(48, 2, 1), how
        self.none, self.by_shape, self.listed, self.calls = None, {}, [torch.empty(0)], 0

    def forward(self, x: Tensor) -> Tensor:
        f = self.body(x)
        return self.out(f) + getattr(self, self.how)(f)

    def in_a_class_attribute(self, f: Tensor) -> Tensor:
        if self.shape != f.shape:
            self.grid, self.shape = mesh(f), f.shape
        return self.grid

    def in_a_new_attribute(self, f: Tensor) -> Tensor:
        if not hasattr(self, "new"):
            self.new = mesh(f)
        return self.new

    def in_none(self, f: Tensor) -> Tensor:
        if self.none is None:
            self.none = mesh(f)
        return self.none

    def in_a_dict(self, f: Tensor) -> Tensor:
        key = tuple(f.shape[2:])
        if key not in self.by_shape:
            self.by_shape[key] = mesh(f)
        return self.by_shape[key]

    def in_a_list(self, f: Tensor) -> Tensor:
        if self.listed[0].shape[-2:] != f.shape[-2:]:
            self.listed[0] = mesh(f)
        return self.listed[0]

    def in_a_buffer(self, f: Tensor) -> Tensor:
        if "table" not in self._buffers:
            self.register_buffer("table", mesh(f), persistent=False)
        return self.table

    def beside_a_counter(self, f: Tensor) -> Tensor:
        self.calls += 1
        return mesh(f)


for _how in [name for name in vars(Cached) if name.startswith(("in_", "beside_"))]:
    fault(f"cache {_how.replace('_', ' ')}", images(), _how)(Cached)


@fault("cache that reads a value", images())
class FloatCache(nn.Module):
    """The key holds the number of channels, and building the table needs a value."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Sequential(*body()), nn.Conv2d(48, CLASSES, 1)
        self.shape, self.grid, self.stride = None, torch.empty(0), torch.tensor([8.0])

    def forward(self, x: Tensor) -> Tensor:
        f = self.body(x)
        if self.shape != f.shape:
            self.grid, self.shape = torch.full(f.shape[2:], float(self.stride[0]), dtype=f.dtype), f.shape
        return self.out(f) + self.grid


@fault("cache of position biases, kept in eval mode", images())
class BiasCache(nn.Module):
    """LeViT: the biases of the scores are gathered once a device, unless the model is trained."""

    def __init__(self, width: int = 48, heads: int = 4, places: int = 16) -> None:
        super().__init__()
        self.body, self.heads, self.scale, self.cache = nn.Sequential(*body()), heads, (width // heads) ** -0.5, {}
        self.qkv, self.proj, self.head = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Linear(width, CLASSES)
        self.biases = nn.Parameter(torch.zeros(heads, places))
        self.register_buffer("index", torch.randint(0, places, (places, places)), persistent=False)

    def position_biases(self, device: str) -> Tensor:
        """The biases of every pair of places."""
        if self.training:
            return self.biases[:, self.index]
        if device not in self.cache:
            self.cache[device] = self.biases[:, self.index]
        return self.cache[device]

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).flatten(2).transpose(1, 2)
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1) * self.scale + self.position_biases(str(x.device))).softmax(-1)
        return self.head((x + self.proj((scores @ v).transpose(1, 2).reshape(b, n, c))).mean(1))


@fault("table in a plain attribute", rows(1, 16))
class PlainTable(nn.Module):
    """Sinusoids of the positions, kept as a tensor that is no buffer."""

    def __init__(self, c: int = 48) -> None:
        super().__init__()
        self.embed, self.up, self.down, self.head = (
            nn.Linear(12, c), nn.Linear(c, 96), nn.Linear(96, c), nn.Linear(c, CLASSES)
        )  # fmt: skip
        angle = torch.arange(16)[:, None] / 100 ** (torch.arange(c) / c)
        self.table = torch.where(torch.arange(c) % 2 == 0, angle.sin(), angle.cos())[None]

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.table.detach().clone().to(x)
        return self.head((x + self.down(torch.relu(self.up(x)))).mean(1))


# ---------------------------------------------------------------------------------- weights that are computed


def deep(change: Callable[[nn.Module], nn.Module], which: tuple[int, ...]) -> nn.Module:
    """Three convolutions, some of them changed."""
    layers = [*body(), nn.Conv2d(48, 4, 1)]
    return nn.Sequential(*(change(layer) if index in which else layer for index, layer in enumerate(layers)))


def masked(layer: nn.Module) -> nn.Module:
    """A quarter of its outputs set to zero by a mask."""
    return prune.ln_structured(layer, "weight", amount=0.25, n=2, dim=0)


def trained(layer: nn.Module) -> nn.Module:
    """Spectral norm by hooks, after a training step: the weight that it keeps has a graph."""
    layer = old_spectral_norm(layer)
    layer.train()(torch.randn(2, layer.in_channels, 4, 4)).sum().backward()
    return layer


for _name, _change, _which in [
    ("masks of torch.nn.utils.prune", masked, (0,)),
    ("weight norm by hooks", old_weight_norm, (0, 2)),
    ("spectral norm by hooks, trained", trained, (2,)),
    ("weight norm", parametrizations.weight_norm, (0, 2, 4)),
    ("spectral norm", parametrizations.spectral_norm, (0, 2)),
]:
    fault(_name, images(), _change, _which)(deep)


@fault("orthogonal weight", rows(2), least=0.7)
def orthogonal() -> nn.Module:
    """A weight that is orthogonal by its construction: its own widths stay, the others do not."""
    square = parametrizations.orthogonal(nn.Linear(32, 32))
    return nn.Sequential(nn.Linear(12, 32), square, nn.ReLU(), nn.Linear(32, 96), nn.ReLU(), nn.Linear(96, CLASSES))


class Squared(nn.Module):
    """A parametrization of one's own."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.abs()


@fault("parametrization of one's own", rows(2))
def parametrized() -> nn.Module:
    """A layer whose weight is a function of its parameter."""
    layer = nn.Linear(32, 48)
    parametrize.register_parametrization(layer, "weight", Squared())
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), layer, nn.ReLU(), nn.Linear(48, CLASSES))


# ---------------------------------------------------------------------------------- containers that check


class Down(nn.Module):
    """Checks the width of what it hands on, and computes nothing itself."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.channels, self.op = c, nn.Conv2d(c, c, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.channels, "wrong width"
        return self.op(x)


@fault("container that checks a width", images())
def checking() -> nn.Module:
    """A downsampling block of diffusion U-Nets."""
    return nn.Sequential(*body(), Down(48), nn.ReLU(), nn.Conv2d(48, 64, 1), nn.ReLU(), nn.Conv2d(64, 4, 1))


@fault("nn.TransformerEncoder", rows(2, 6), True, False)
@fault("nn.Transformer", rows(2, 6), False, False)
@fault("nn.TransformerEncoder, positions joined", rows(2, 6), True, True)
@fault("nn.Transformer, positions joined", rows(2, 6), False, True)
class Transformers(nn.Module):
    """torch's own, with the positions of rows and columns joined to one table."""

    def __init__(self, encoder: bool, joined: bool, d: int = 32) -> None:
        super().__init__()
        self.joined, self.proj, self.head = joined, nn.Linear(12, d), nn.Linear(d, CLASSES)
        self.queries = None if encoder else nn.Parameter(torch.randn(1, 5, d))
        self.row, self.column = (nn.Parameter(torch.randn(1, 6, d // 2)) if joined else None for _ in range(2))
        layer = nn.TransformerEncoderLayer(d, 4, 64, batch_first=True)
        options = {"enable_nested_tensor": False}
        self.transformer = (
            nn.TransformerEncoder(layer, 1, **options) if encoder else nn.Transformer(d, 4, 1, 1, 64, batch_first=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        if self.joined:
            x = x + torch.cat([self.row, self.column], -1)
        if self.queries is None:
            return self.head(self.transformer(x))
        return self.head(self.transformer(x, self.queries.expand(x.shape[0], -1, -1)))


# ---------------------------------------------------------------------------------- ops that had no rule


@fault("deformable convolution", images(32), least=0.99)
class Deformable(nn.Module):
    """Its inputs and outputs can go; its offsets are coordinates, and stay."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.offset = nn.Sequential(*body()), nn.Conv2d(48, 27, 3, padding=1)
        self.conv, self.head = torchvision.ops.DeformConv2d(48, 40, 3, padding=1), nn.Conv2d(40, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        y, z, mask = self.offset(x).chunk(3, 1)
        return self.head(torch.relu(self.conv(x, torch.cat((y, z), 1), mask.sigmoid())))


#: Of two rows of the same widths, the second positive.
ALIASES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "multiply": torch.multiply,
    "divide": torch.divide,
    "true_divide": torch.true_divide,
    "subtract": torch.subtract,
    "maximum": torch.maximum,
    "hypot": torch.hypot,
    "atan2": torch.atan2,
    "lerp": lambda a, b: torch.lerp(a, b, 0.3),
    "addcmul": lambda a, b: torch.addcmul(a, a, b),
    "and": lambda a, b: torch.where((a > 0) & (b > 1.4), a, b),
    "or": lambda a, b: torch.where((a > 0) | (b > 1.4), a, b),
    "xor and not": lambda a, b: torch.where((a > 0) ^ ~(b > 1.4), a, b),
    "cast of a mask": lambda a, b: a * ((a >= -1) & (a < 1)).to(b.dtype),
}


class Alias(nn.Module):
    """Two rows of one width, an op, and a linear layer."""

    def __init__(self, op: str) -> None:
        super().__init__()
        self.op, self.a, self.b, self.c = op, nn.Linear(12, 64), nn.Linear(12, 64), nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(ALIASES[self.op](self.a(x), self.b(x).sigmoid() + 1))


for _op in ALIASES:
    fault(f"alias {_op}", rows(2), _op)(Alias)


@fault("Fourier transform over space", images(32))
class Fourier(nn.Module):
    """A global filter: a complex number a frequency and channel, kept as pairs of numbers."""

    def __init__(self, c: int = 32) -> None:
        super().__init__()
        self.stem, self.head, self.gate = (
            nn.Conv2d(3, c, 4, 4),
            nn.Linear(c, CLASSES),
            nn.Parameter(torch.randn(8, 5, c, 2)),
        )
        self.mlp = nn.Sequential(nn.Linear(c, 64), nn.GELU(), nn.Linear(64, c))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        f = torch.fft.rfft2(x, dim=(1, 2), norm="ortho") * torch.view_as_complex(self.gate)
        x = x + torch.fft.irfft2(f, s=(8, 8), dim=(1, 2), norm="ortho")
        return self.head(self.mlp(x).mean((1, 2)))


@fault("complex weight", images(16, 2))
class Spectral(nn.Module):
    """A spectral convolution: a complex matrix a frequency."""

    def __init__(self, c: int = 24) -> None:
        super().__init__()
        self.lift, self.skip, self.proj = nn.Conv2d(2, c, 1), nn.Conv2d(c, c, 1), nn.Conv2d(c, 1, 1)
        self.weight = nn.Parameter(torch.randn(c, c, 6, 6, dtype=torch.cfloat) / c)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        f = torch.fft.rfft2(x)
        out = torch.zeros_like(f)
        out[:, :, :6, :6] = torch.einsum("bixy,ioxy->boxy", f[:, :, :6, :6], self.weight.to(f.dtype))
        return self.proj(torch.relu(torch.fft.irfft2(out, s=x.shape[-2:]) + self.skip(x)))


@fault("nn.Bilinear and cosine_similarity", lambda: (torch.randn(2, 12), torch.randn(2, 12)))
class Bilinear(nn.Module):
    """Two towers of one network, compared in two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 40))
        self.bilinear, self.head = nn.Bilinear(40, 40, 24), nn.Linear(25, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.net(x), self.net(y)
        return self.head(torch.cat([self.bilinear(a, b), F.cosine_similarity(a, b, dim=1)[:, None]], 1))


@fault("tokens gathered by an expanded index", rows(1, 16))
class Gather(nn.Module):
    """The best tokens, picked by an index that is expanded over the channels."""

    def __init__(self, c: int = 48) -> None:
        super().__init__()
        self.embed, self.score, self.head = nn.Linear(12, c), nn.Linear(12, 1), nn.Linear(c, CLASSES)
        self.mlp = nn.Sequential(nn.Linear(c, 96), nn.GELU(), nn.Linear(96, c))

    def forward(self, x: Tensor) -> Tensor:
        best = self.score(x).squeeze(-1).topk(8, dim=1).indices
        x = self.embed(x)
        x = torch.gather(x, 1, best.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return self.head((x + self.mlp(x)).mean(1))


@fault("RoIAlign", lambda: (torch.randn(1, 3, 64, 64), torch.tensor([[0.0, 4, 4, 40, 50]])))
class Regions(nn.Module):
    """Regions resampled in space, and a linear layer over each."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc, self.head = nn.Sequential(*body()), nn.Linear(48 * 25, 64), nn.Linear(64, CLASSES)

    def forward(self, image: Tensor, boxes: Tensor) -> Tensor:
        found = torchvision.ops.roi_align(self.body(image), boxes, (5, 5), spatial_scale=0.25, sampling_ratio=2)
        return self.head(torch.relu(self.fc(found.flatten(1))))


@fault("repeat_interleave with output_size", rows(1, 6))
class Repeated(nn.Module):
    """Mamba-2: one row for several heads."""

    def __init__(self, heads: int = 8, groups: int = 2, dim: int = 16) -> None:
        super().__init__()
        self.heads, self.groups, self.head = heads, groups, nn.Linear(heads * dim, CLASSES)
        self.x, self.b = nn.Linear(12, heads * dim), nn.Linear(12, groups * dim)

    def forward(self, u: Tensor) -> Tensor:
        n, t, _ = u.shape
        x, b = self.x(u).view(n, t, self.heads, -1), self.b(u).view(n, t, self.groups, -1)
        b = b.repeat_interleave(self.heads // self.groups, dim=2, output_size=self.heads)
        return self.head((x * b.tanh()).flatten(2))


@fault("grouped transposed convolution", images())
def grouped_transposed() -> nn.Module:
    """Four groups, of which all but one may go."""
    return nn.Sequential(*body(), nn.ConvTranspose2d(48, 32, 2, 2, groups=4), nn.ReLU(), nn.Conv2d(32, 2, 1))


# ---------------------------------------------------------------------------------- sizes kept in odd places


class Heads(nn.Module):
    """Channels to heads; the number of heads is kept in pairs or in a dict, as layers of einops keep it."""

    def __init__(self, pairs: bool, **sizes: int) -> None:
        super().__init__()
        self.sizes = tuple(sizes.items()) if pairs else sizes

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        heads = dict(self.sizes)["h"]
        return x.reshape(b, n, heads, c // heads).transpose(1, 2)


@fault("sizes in pairs", rows(1, 6), True, least=0.97)
@fault("sizes in a dict", rows(1, 6), False, least=0.97)
class SizesInPairs(nn.Module):
    """Attention whose layers to heads know their number by such a table."""

    def __init__(self, pairs: bool, c: int = 64) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, c) for _ in range(3))
        self.to_q, self.to_k, self.to_v = (Heads(pairs, h=4) for _ in range(3))
        self.o, self.head = nn.Linear(c, 12), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_q(self.q(x)), self.to_k(self.k(x)), self.to_v(self.v(x))
        return self.head(x + self.o(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2)))


class Normed(nn.Module):
    """A linear layer and a batch norm over the tokens."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return self.bn(y.flatten(0, 1)).reshape_as(y)


class Products(nn.Module):
    """Attention whose widths are products of three attributes: key_dim, the ratio of values to keys, the heads."""

    def __init__(self, dim: int, key_dim: int, heads: int, ratio: int, places: int) -> None:
        super().__init__()
        self.heads, self.key_dim, self.ratio, self.scale = heads, key_dim, ratio, key_dim**-0.5
        self.width = ratio * key_dim * heads
        self.qkv, self.proj = Normed(dim, (ratio + 2) * key_dim * heads), Normed(self.width, dim)
        self.biases = nn.Parameter(torch.zeros(heads, places))
        self.register_buffer("index", torch.randint(0, places, (places, places)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        sizes = [self.key_dim, self.key_dim, self.ratio * self.key_dim]
        q, k, v = (t.transpose(1, 2) for t in self.qkv(x).view(b, n, self.heads, -1).split(sizes, dim=3))
        scores = (q @ k.transpose(-2, -1) * self.scale + self.biases[:, self.index]).softmax(-1)
        return self.proj(F.hardswish((scores @ v).transpose(1, 2).reshape(b, n, self.width)))


@fault("ties with a factor, one block", images(), 1)
@fault("ties with a factor, four blocks", images(), 4)
class LeViTLike(nn.Module):
    """Blocks of such attention and of a multilayer perceptron."""

    def __init__(self, depth: int, dim: int = 64) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, dim, 4, 4), nn.Linear(dim, CLASSES)
        self.attentions = nn.ModuleList(Products(dim, 16, 4, 2, 16) for _ in range(depth))
        self.ups = nn.ModuleList(Normed(dim, 2 * dim) for _ in range(depth))
        self.downs = nn.ModuleList(Normed(2 * dim, dim) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for attention, up, down in zip(self.attentions, self.ups, self.downs, strict=True):
            x = x + attention(x)
            x = x + down(F.hardswish(up(x)))
        return self.head(x.mean(1))


@fault("two query heads a key head", lambda: (torch.randn(2, 7, 24),), 6)
@fault("four query heads a key head", lambda: (torch.randn(2, 7, 24),), 12)
class GroupedQueries(nn.Module):
    """Keys and values of three heads, expanded to those of the queries."""

    def __init__(self, heads: int, kv: int = 3, dim: int = 96, head_dim: int = 16) -> None:
        super().__init__()
        self.heads, self.head_dim, self.repeats = heads, head_dim, heads // kv
        self.embed, self.q = nn.Linear(24, dim), nn.Linear(dim, heads * head_dim, bias=False)
        self.k, self.v = (nn.Linear(dim, kv * head_dim, bias=False) for _ in range(2))
        self.o, self.head = nn.Linear(heads * head_dim, dim, bias=False), nn.Linear(dim, CLASSES)

    def repeat(self, x: Tensor) -> Tensor:
        """Every head as often as queries share it."""
        b, h, n, d = x.shape
        return x[:, :, None].expand(b, h, self.repeats, n, d).reshape(b, h * self.repeats, n, d)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, -1, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, self.repeat(k), self.repeat(v)).transpose(1, 2).reshape(b, n, -1)
        return self.head(F.gelu(self.o(y)))


@fault("attribute of another method", images())
class OtherMethod(nn.Module):
    """C2f: the forward cuts in halves, another method at a width kept in an attribute."""

    def __init__(self, c: int = 16) -> None:
        super().__init__()
        self.c, self.body, self.wide = c, nn.Sequential(*body()), nn.Conv2d(48, 2 * c, 1)
        self.conv, self.head = nn.Conv2d(c, c, 1), nn.Conv2d(2 * c, 4, 1)

    def joined(self, x: Tensor, y: Tensor) -> Tensor:
        """The output of two halves."""
        return self.head(torch.cat([x, self.conv(y)], 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.joined(*self.wide(self.body(x)).chunk(2, 1))

    def forward_split(self, x: Tensor) -> Tensor:
        """What an exporter calls."""
        return self.joined(*self.wide(self.body(x)).split((self.c, self.c), 1))


# ---------------------------------------------------------------------------------- values that a forward reads


@fault("padding mask as wide as the longest row", lambda: (torch.randn(2, 10, 12), torch.tensor([10, 7])))
class Lengths(nn.Module):
    """The width of the mask is an item of the lengths."""

    def __init__(self, c: int = 32) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(12, c), nn.Linear(c, CLASSES)
        self.q, self.v, self.up, self.down = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, 64), nn.Linear(64, c)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        mask = torch.arange(int(lengths.max().item()))[None] >= lengths[:, None]
        x = self.embed(x)
        scores = (self.q(x) @ x.transpose(1, 2)).masked_fill(mask[:, None], -1e9).softmax(-1)
        x = x + scores @ self.v(x)
        return self.head((x + self.down(torch.relu(self.up(x)))).mean(1))


@fault("shape that depends on values", images(16, 1), least=0.9)
class Keypoints(nn.Module):
    """The places of a map that are above a value."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 32, 3, 1, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU())
        self.score = nn.Conv2d(32, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.sigmoid(self.score(self.body(x)))[0, 0]
        at = torch.nonzero(scores > 0.5)
        return scores[tuple(at.t())], at.flip(1)
