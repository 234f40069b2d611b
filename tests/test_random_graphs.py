"""Random models: whatever the comb calls prunable must shrink to what masking gives.

`CPD_EXAMPLES=1000 pytest tests/test_random_graphs.py` looks further than the fast suite does.
"""

from __future__ import annotations

import copy
import math
import os

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import assert_shapes_as_predicted, comb, dense, random_plan, relative_error, zeroed

from cpd.oracle import masked_error
from cpd.surgeon import shrink

EXAMPLES = int(os.environ.get("CPD_EXAMPLES", "60"))
SIDE, BATCH = 4, 2
WIDTHS = [2, 3, 4, 6, 8, 12, 16]

# ---------------------------------------------------------------- layers: maps [N, C, 4, 4] to maps


class TokenNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ChannelsLastLinear(nn.Module):
    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = self.linear(x.reshape(b, c, h * w).transpose(1, 2))
        return y.transpose(1, 2).reshape(b, -1, h, w)


class Shuffle(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)


class Pieces(nn.Module):
    """Cut in equal pieces, one of them changed, joined again in another order."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = x.chunk(self.count, dim=1)
        return torch.cat([*rest, torch.relu(first)], dim=1)


class NamedSplit(nn.Module):
    """Cut at widths kept in an attribute, only one piece convolved."""

    def __init__(self, width: int, first: int) -> None:
        super().__init__()
        self.sizes = (first, width - first)
        self.conv = nn.Conv2d(first, first, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        head, tail = torch.split(x, self.sizes, dim=1)
        return torch.cat([self.conv(head), tail], dim=1)


class Gate(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(torch.relu(self.reduce(x.mean((2, 3))))).sigmoid()[:, :, None, None]


class Halves(nn.Module):
    """A gated linear unit."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(width, 2 * inner, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.wide(x).chunk(2, dim=1)
        return a * b.sigmoid()


class Gram(nn.Module):
    """Attention between channels, without weights of its own."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(2)
        return ((y @ y.transpose(1, 2)) * 0.1).softmax(-1).matmul(y).view_as(x)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, head_dim: int, kind: str) -> None:
        super().__init__()
        self.heads, self.kind = heads, kind
        self.qkv = nn.Linear(width, 3 * heads * head_dim)
        self.proj = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        b, n, _ = tokens.shape
        q, k, v = self.qkv(tokens).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.kind == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.kind == "before":
            y = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        else:
            y = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        y = self.proj(y.transpose(1, 2).reshape(b, n, -1))
        return x + y.transpose(1, 2).reshape(x.shape)


class Scale(nn.Module):
    """A parameter that no torch.nn module owns."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width, 1, 1))
        self.shift = nn.Parameter(torch.ones(1, width, SIDE, SIDE))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma + self.shift


class PadChannels(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))


class Functional(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *inputs: Tensor) -> Tensor:
        if self.name == "add":
            return inputs[0] + inputs[1]
        if self.name == "mul":
            return inputs[0] * inputs[1].tanh()
        if self.name == "concat":
            return torch.cat(inputs, dim=1)
        if self.name == "repeat":
            return inputs[0].repeat(1, 2, 1, 1)
        if self.name == "stack":
            return torch.stack(inputs, dim=2).flatten(1, 2)
        if self.name == "fold":
            return F.pixel_shuffle(F.pixel_unshuffle(inputs[0], 2), 2)
        return getattr(torch, self.name)(inputs[0])


class Net(nn.Module):
    """Applies `layers` in order, each to the tensors that `sources` names; every loose end goes to the head."""

    def __init__(self, layers: list[nn.Module], sources: list[tuple[int, ...]], widths: list[int], head: str) -> None:
        super().__init__()
        self.layers, self.sources = nn.ModuleList(layers), sources
        used = {index for group in sources for index in group}
        self.ends = [index for index in range(len(widths)) if index not in used]
        total = sum(widths[index] for index in self.ends)
        self.kind = head
        self.head = nn.Linear(total * SIDE * SIDE if head == "flatten" else total, 5)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for layer, sources in zip(self.layers, self.sources, strict=True):
            values.append(layer(*(values[index] for index in sources)))
        y = torch.cat([values[index] for index in self.ends], dim=1)
        return self.head(y.flatten(1) if self.kind == "flatten" else y.mean((2, 3)))


# ---------------------------------------------------------------- drawing


def divisors(number: int) -> list[int]:
    return [k for k in range(1, number + 1) if number % k == 0]


#: Kinds of layer with one input; those that are hard to comb more often.
KINDS = [
    "attention", "attention", "attention", "batch_norm", "conv", "conv3", "depthwise", "fold", "function", "function",
    "gate", "glu", "glu", "gram", "group_norm", "group_norm", "grouped", "grouped", "layer_norm", "linear", "pad",
    "pieces", "pieces", "prelu", "repeat", "scale", "shuffle", "shuffle", "split", "split", "transposed",
]  # fmt: skip


@st.composite
def unary(draw, width: int) -> tuple[nn.Module, int]:
    """A layer that takes `width` channels, and how many it gives."""
    out = draw(st.sampled_from(WIDTHS))
    kind = draw(st.sampled_from(KINDS))
    if kind in ("conv", "conv3"):
        return nn.Conv2d(width, out, 3 if kind == "conv3" else 1, padding="same"), out
    if kind == "grouped":
        groups = draw(st.sampled_from(divisors(width)))
        return nn.Conv2d(width, groups * (1 + out % 3), 1, groups=groups), groups * (1 + out % 3)
    if kind == "transposed":
        groups = draw(st.sampled_from(divisors(width)))
        return nn.ConvTranspose2d(width, groups * (1 + out % 3), 1, groups=groups), groups * (1 + out % 3)
    if kind == "depthwise":
        times = draw(st.sampled_from([1, 1, 2]))
        return nn.Conv2d(width, times * width, 3, padding=1, groups=width), times * width
    if kind == "linear":
        return ChannelsLastLinear(width, out), out
    if kind == "glu":
        return Halves(width, out), out
    if kind == "pad":
        before, after = draw(st.integers(0, 3)), draw(st.integers(0, 3))
        return PadChannels(before, after), width + before + after
    if kind == "repeat":
        return Functional("repeat"), 2 * width
    if kind == "attention":
        heads, head_dim = draw(st.sampled_from([1, 2, 3, 4])), draw(st.sampled_from([2, 3, 4, 8]))
        return Attention(width, heads, head_dim, draw(st.sampled_from(["fused", "before", "after"]))), width
    if kind == "split" and width > 1:
        return NamedSplit(width, draw(st.integers(1, width - 1))), width
    return _same_width(draw, kind, width), width


def _same_width(draw, kind: str, width: int) -> nn.Module:
    if kind == "batch_norm":
        return nn.BatchNorm2d(width)
    if kind == "layer_norm":
        return TokenNorm(width)
    if kind == "group_norm":
        return nn.GroupNorm(draw(st.sampled_from(divisors(width))), width)
    if kind == "shuffle":
        return Shuffle(draw(st.sampled_from(divisors(width))))
    if kind == "pieces":
        return Pieces(draw(st.sampled_from(divisors(width))))
    if kind == "gate":
        return Gate(width, draw(st.sampled_from(WIDTHS)))
    if kind == "gram":
        return Gram()
    if kind == "scale":
        return Scale(width)
    if kind == "fold":
        return Functional("fold")
    if kind == "prelu":
        return nn.PReLU(width)
    return Functional(draw(st.sampled_from(["relu", "sigmoid", "tanh", "exp"])))


@st.composite
def models(draw) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, width := draw(st.sampled_from(WIDTHS)), 3, padding=1)]
    sources: list[tuple[int, ...]] = [(0,)]
    widths = [3, width]
    for _ in range(draw(st.integers(2, 9))):
        left = draw(st.integers(max(1, len(widths) - 3), len(widths) - 1))
        right = draw(st.integers(1, len(widths) - 1))
        kind = draw(st.sampled_from(["unary"] * 4 + ["add", "mul", "concat", "stack"]))
        if kind == "unary" or (kind != "concat" and widths[left] != widths[right]) or widths[left] > 48:
            layer, out = draw(unary(widths[left]))
            layers, sources = [*layers, layer], [*sources, (left,)]
        else:
            out = widths[left] if kind in ("add", "mul") else widths[left] + widths[right]
            layers, sources = [*layers, Functional(kind)], [*sources, (left, right)]
        widths.append(out)
    return Net(layers, sources, widths, draw(st.sampled_from(["mean", "flatten"])))


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="CPD_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(models(), st.sampled_from([0.2, 0.3, 0.5]), st.integers(0, 99))
def test_random_models_shrink_to_what_masking_gives(model: nn.Module, share: float, seed: int) -> None:
    note(f"{model} {model.sources}")
    model = dense(model, seed)
    x = torch.randn(BATCH, 3, SIDE, SIDE, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
    combed = comb(model, x)
    assert not combed.unknown
    for exact in (False, True):
        plan = random_plan(combed, share, exact=exact, seed=seed, at_least=1)
        shrunk = shrink(copy.deepcopy(model), plan)
        if exact:
            with torch.no_grad():
                assert relative_error(shrunk(x), zeroed(model, plan)(x)) < 1e-9
        else:
            assert masked_error(model, shrunk, combed, plan) < 1e-9
            again = comb(shrunk, x)
            assert_shapes_as_predicted(combed, plan, again)
            assert again.cost({}) == combed.cost({g.axis: len(plan.groups[g.name]) for g in combed.groups})
