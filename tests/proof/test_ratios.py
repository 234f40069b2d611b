"""Widths that are computed from others, in a ratio: `ratio * key_dim`, `C // 4`, `int(0.25 * C)`, `4 * dim`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cpd.proof.copies import Copies
from helpers.sketches import MAP, Sketch, checked, random
from helpers.zoo import comb, conv, dense, frozen, sizes

# ---------------------------------------------------------------- one width computed from another


def _quarter(self: Sketch, x: Tensor) -> Tensor:
    x = self.a(x)
    c = x.shape[1]
    part, rest = x.split([c // 4, c - c // 4], 1)
    return self.out(torch.cat([self.part(part), rest], 1))


def _quarter_of_an_attribute(self: Sketch, x: Tensor) -> Tensor:
    part, rest = self.a(x).split([self.dim // 4, self.dim - self.dim // 4], 1)
    return self.out(torch.cat([self.part(part), rest], 1))


def _quarter_in_floats(self: Sketch, x: Tensor) -> Tensor:
    x = self.a(x)
    end = int(x.shape[1] * 0.25)
    return self.out(torch.cat([self.part(x[:, :end]), x[:, end:]], 1))


@pytest.mark.parametrize("cut", [_quarter, _quarter_of_an_attribute, _quarter_in_floats])
def test_a_quarter_of_a_width(cut) -> None:
    combed = checked(Sketch(cut, a=conv(3, 16), part=conv(4, 4), out=conv(16, 5), dim=16), MAP, train=True)
    assert sizes(combed) == {"a": 4, "a#2": 12, "part": 4}
    for quarter in (1, 2, 3):
        plan = combed.plan({"a": range(quarter), "a#2": range(1)})
        assert (len(plan.groups["a"]), len(plan.groups["a#2"])) == (quarter, 3 * quarter)
        expected = [("dim", 16, 4 * quarter)] if cut is _quarter_of_an_attribute else []
        assert [(item.name, item.old, item.new) for item in plan.attributes] == expected


def _four_times(self: Sketch, x: Tensor) -> Tensor:
    x = self.a(x)
    b, c, h, w = x.shape
    return self.out(self.wide(x).reshape(b, 4 * c, h * w).unflatten(2, (h, w)))


def _four_times_an_attribute(self: Sketch, x: Tensor) -> Tensor:
    b, _, h, w = x.shape
    return self.out(self.wide(self.a(x)).reshape(b, 4 * self.dim, -1).unflatten(2, (h, w)))


def _checked(self: Sketch, x: Tensor) -> Tensor:
    x = self.a(x)
    y = self.wide(x)
    assert y.shape[1] == 4 * x.shape[1], "four times as wide"
    return self.out(y)


def _checked_by_an_attribute(self: Sketch, x: Tensor) -> Tensor:
    y = self.wide(self.a(x))
    assert y.shape[1] == 4 * self.dim, "four times as wide"
    return self.out(y)


@pytest.mark.parametrize("forward", [_four_times, _four_times_an_attribute, _checked, _checked_by_an_attribute])
def test_four_times_a_width(forward) -> None:
    combed = checked(Sketch(forward, a=conv(3, 6), wide=conv(6, 24), out=conv(24, 5), dim=6), MAP, train=True)
    assert sizes(combed) == {"a": 6, "wide": 24}
    plan = combed.plan({"a": range(2), "wide": range(9)})
    assert (len(plan.groups["a"]), len(plan.groups["wide"])) == (3, 12)
    assert bool(plan.attributes) == ("attribute" in forward.__name__)


def test_three_halves_of_a_width() -> None:
    def forward(self: Sketch, x: Tensor) -> Tensor:
        q, k, v = self.a(x).split([self.key_dim, self.key_dim, int(self.key_dim * 1.5)], 1)
        return self.out(torch.cat([q * k, v], 1))

    combed = checked(Sketch(forward, a=conv(3, 28), out=conv(20, 5), key_dim=8), MAP)
    assert sizes(combed) == {"a": 8, "a#2": 12}
    plan = combed.plan({"a": range(3), "a#2": range(1)})
    assert (len(plan.groups["a"]), len(plan.groups["a#2"])) == (4, 6)


def test_a_number_of_heads_computed_from_the_width_and_a_head_dim_in_digits() -> None:
    """The four channels of a head stay, since the forward says four; heads and the width they come from can go."""

    def forward(self: Sketch, x: Tensor) -> Tensor:
        x = self.a(x)
        b, c, h, w = x.shape
        q, k, v = (layer(x).reshape(b, c // 4, 4, h * w).transpose(-1, -2) for layer in (self.q, self.k, self.v))
        y = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.out(y.transpose(-1, -2).reshape(b, c, h, w))

    layers = {name: conv(16, 16) for name in ("q", "k", "v")}
    combed = checked(Sketch(forward, a=conv(3, 16), out=conv(16, 5), **layers), MAP)
    assert sizes(combed) == {"a": 16, "q": 4}
    assert "the forward names the width 4" in frozen(combed)["v"]
    assert len(combed.plan({"q": range(3)}).groups["a"]) == 16
    assert len(combed.plan({"q": range(3), "a": range(9)}).groups["a"]) == 12


# ---------------------------------------------------------------- attention with products of attributes


class Attention(nn.Module):
    """Attention of LeViT's kind: all widths are products of key_dim, ratio and heads, one of them kept as such."""

    def __init__(self, dim: int, key_dim: int, heads: int, ratio: int, tokens: int) -> None:
        super().__init__()
        self.heads, self.key_dim, self.ratio, self.scale = heads, key_dim, ratio, key_dim**-0.5
        self.width = ratio * key_dim * heads
        self.qkv, self.proj = nn.Linear(dim, (ratio + 2) * key_dim * heads), nn.Linear(self.width, dim)
        self.biases = nn.Parameter(torch.zeros(heads, tokens))
        self.register_buffer("index", torch.arange(tokens).repeat(tokens, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).view(b, n, self.heads, -1)
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.ratio * self.key_dim], dim=3)
        q, k, v = (part.permute(0, 2, 1, 3) for part in (q, k, v))
        a = (q @ k.transpose(-2, -1) * self.scale + self.biases[:, self.index]).softmax(-1)
        return x + self.proj((a @ v).transpose(1, 2).reshape(b, n, self.width))


def levit(depth: int) -> nn.Module:
    """Blocks of such attention between two layers."""
    return nn.Sequential(nn.Linear(12, 24), *(Attention(24, 6, 4, 2, 5) for _ in range(depth)), nn.Linear(24, 5))


def test_key_dim_heads_and_a_value_width_in_a_ratio_to_them() -> None:
    combed = checked(levit(2), random(2, 5, 12), train=True)
    assert combed.open_share["parameters"] > 0.9
    found = sizes(combed)
    assert (found["1.biases"], found["1.qkv"], found["1.qkv#2"]) == (4, 6, 12)
    plan = combed.plan({"1.biases": range(3), "1.qkv": range(4), "1.qkv#2": range(5)})
    assert {name: len(plan.groups[f"1.{name}"]) for name in ("biases", "qkv", "qkv#2")} == {
        "biases": 3, "qkv": 4, "qkv#2": 8,
    }  # fmt: skip
    new = {item.name: item.new for item in plan.attributes if item.module == "1"}
    assert new == {"heads": 3, "key_dim": 4, "width": 3 * 8}


def test_the_proof_makes_as_many_copies_for_many_blocks_as_for_one(monkeypatch) -> None:
    made = []
    narrow = Copies.narrow
    monkeypatch.setattr(Copies, "narrow", lambda *args, **kwargs: made.append(1) or narrow(*args, **kwargs))
    counts = []
    for depth in (1, 4):
        made.clear()
        comb(dense(levit(depth)), random(2, 5, 12))
        counts.append(len(made))
    assert counts[1] <= 2 * counts[0]
