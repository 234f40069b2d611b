"""The edges of the proof: containers that only check, sizes kept in odd places, grouped queries, widths in a ratio."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpd.model import kept
from cpd.plan import Plan
from cpd.surgery.shrink import shrink
from helpers.sketches import MAP, Sketch, checked, random
from helpers.zoo import comb, conv, frozen, random_plan, sizes


def new_attributes(plan: Plan) -> dict[str, object]:
    """{path: new value} of the attributes that a plan sets."""
    return {f"{item.module}.{item.name}".lstrip("."): item.new for item in plan.attributes}


# ---------------------------------------------------------------- containers that check a width


def _checks_once(self: Sketch, x: Tensor) -> Tensor:
    assert x.shape[1] == self.channels, "wrong width"
    return self.op(x)


def _checks_twice(self: Sketch, x: Tensor) -> Tensor:
    channels = x.shape[1]
    assert channels == self.channels, "wrong width"
    assert channels == self.inputs, "wrong width"
    return self.op(x)


def _checks_at_once(self: Sketch, x: Tensor) -> Tensor:
    assert self.channels == x.shape[1] == self.inputs, "wrong width"
    return self.op(x)


def _checks_what_it_gives(self: Sketch, x: Tensor) -> Tensor:
    x = self.op(x)
    assert x.shape[1] == self.channels, "wrong width"
    return x


def _checks_a_multiple(self: Sketch, x: Tensor) -> Tensor:
    assert 2 * x.shape[1] == self.double, "wrong width"
    return self.op(x)


@pytest.mark.parametrize(
    ("check", "attributes", "expected"),
    [
        (_checks_once, {"channels": 8}, {"channels": 5}),
        (_checks_twice, {"channels": 8, "inputs": 8}, {"channels": 5, "inputs": 5}),
        (_checks_at_once, {"channels": 8, "inputs": 8}, {"channels": 5, "inputs": 5}),
        (_checks_what_it_gives, {"channels": 6}, {"channels": 4}),
        (_checks_a_multiple, {"double": 16}, {"double": 10}),
    ],
)
def test_a_container_that_checks_a_width_and_computes_nothing(check, attributes, expected) -> None:
    container = Sketch(check, op=conv(8, 6), **attributes)
    combed = checked(nn.Sequential(conv(3, 8), container, nn.ReLU(), conv(6, 4)), MAP, train=True)
    assert sizes(combed) == {"0": 8, "1.op": 6}
    plan = combed.plan({"0": range(5), "1.op": range(4)})
    assert new_attributes(plan) == {f"1.{name}": value for name, value in expected.items()}


def test_a_module_around_the_container_checks_what_it_gives() -> None:
    def forward(self: Sketch, x: Tensor) -> Tensor:
        x = self.body(x)
        assert x.shape[1] == self.width, "wrong width"
        return self.out(x)

    combed = checked(Sketch(forward, body=nn.Sequential(conv(3, 8), nn.ReLU()), out=conv(8, 4), width=8), MAP)
    assert sizes(combed) == {"body.0": 8}
    assert new_attributes(combed.plan({"body.0": range(5)})) == {"width": 5}


class Transformed(nn.Module):
    """`nn.Transformer` or its encoder, between layers; with positions of which half are rows and half columns."""

    def __init__(self, kind: str, d: int = 16) -> None:
        super().__init__()
        self.kind, self.proj, self.head = kind, nn.Linear(12, d), nn.Linear(d, 4)
        self.row, self.col = nn.Parameter(torch.randn(1, 5, d // 2)), nn.Parameter(torch.randn(1, 5, d // 2))
        if "full" in kind:
            self.query = nn.Parameter(torch.randn(1, 3, d))
            self.body = nn.Transformer(d, 2, 1, 1, 24, dropout=0.0, batch_first=True)
        else:
            self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(d, 2, 24, batch_first=True), 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        if "cat" in self.kind:
            x = x + torch.cat([self.row, self.col], -1)
        return self.head(self.body(x, self.query.expand(len(x), -1, -1)) if "full" in self.kind else self.body(x))


@pytest.mark.parametrize(("kind", "least"), [("encoder", 4), ("full", 9), ("encoder cat", 5), ("full cat", 10)])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_the_transformer_of_torch(kind: str, least: int) -> None:
    combed = checked(Transformed(kind), random(2, 5, 12))
    assert len(combed.open) >= least
    assert combed.open_share["parameters"] > 0.9
    plan = random_plan(combed, 0.5)
    if "full" in kind:
        assert new_attributes(plan)["body.d_model"] == len(plan.kept["proj.weight"][0]) < 16


# ---------------------------------------------------------------- integers in odd places


class Pair(NamedTuple):
    """A named tuple."""

    batch: str
    heads: int


@dataclass(frozen=True)
class Config:
    """A config that cannot be written to, which holds another object."""

    heads: int
    inner: SimpleNamespace


class Split(nn.Module):
    """Cuts a width into heads, whose number is found in what it keeps."""

    def __init__(self, sizes: object, find: Callable[[Any], int]) -> None:
        super().__init__()
        self.sizes, self.find = sizes, find

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        return x.reshape(b, n, self.find(self.sizes), c // self.find(self.sizes)).transpose(1, 2)


class Attention(nn.Module):
    """Attention whose number of heads is kept in an odd place, shared by three modules."""

    def __init__(self, sizes: object, find: Callable[[Any], int]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(12, 16) for _ in range(4))
        self.o, self.head = nn.Linear(16, 12), nn.Linear(12, 5)
        self.sq, self.sk, self.sv = (Split(sizes, find) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.sq(self.q(x)), self.sk(self.k(x)), self.sv(self.v(x))
        a = ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.head(x + self.o(a))


ODD = {
    "pairs": ((("h", 4),), lambda sizes: dict(sizes)["h"]),
    "a dict": ({"h": 4, "eps": 1e-5}, lambda sizes: sizes["h"]),
    "a dict by number": ({1: 8, 2: 4}, lambda sizes: sizes[2]),
    "nested": ([("b", {"sizes": [1, 4]})], lambda sizes: sizes[0][1]["sizes"][1]),
    "a named tuple": (Pair("b", 4), lambda sizes: sizes.heads),
    "a frozen dataclass": (Config(4, SimpleNamespace(depth=2)), lambda sizes: sizes.heads),
    "an object in it": (Config(2, SimpleNamespace(heads=4)), lambda sizes: sizes.inner.heads),
    "an object": (SimpleNamespace(num_heads=4, hidden=16), lambda sizes: sizes.num_heads),
}


@pytest.mark.parametrize("kind", ODD)
def test_integers_in_odd_places(kind: str) -> None:
    """They are followed as plain integers are, by copies of what holds them, which others may share."""
    sizes_of, find = ODD[kind]
    before = repr(sizes_of)
    combed = checked(Attention(sizes_of, find), random(2, 5, 12), train=True)
    assert sizes(combed) == {"q": 4, "q#2": 4, "v": 4}
    plan = Plan.from_dict(json.loads(json.dumps(combed.plan({"q": [0, 1, 3]}).to_dict())))
    assert {item.module for item in plan.attributes} == {"sq", "sk", "sv"}
    assert all((item.old, item.new) == (4, 3) for item in plan.attributes)
    other = Attention(sizes_of, find)  # a model of the user's that shares what holds the integer
    shrunk = shrink(combed.model, plan)
    assert repr(sizes_of) == before
    for module in (shrunk.sq, shrunk.sk, shrunk.sv):
        assert find(module.sizes) == 3
        assert type(module.sizes) is type(sizes_of)
    assert find(other.sq.sizes) == 4
    again = comb(shrunk, random(2, 5, 12))
    assert sizes(again) == {"q": 3, "q#2": 4, "v": 4}


def test_objects_that_do_more_than_hold_settings_are_left_alone() -> None:
    class Closing(SimpleNamespace):
        def __del__(self) -> None:
            pass

    module = nn.Identity()
    module.a, module.b, module.c = Closing(width=8), SimpleNamespace(width=8, layer=nn.ReLU()), SimpleNamespace(width=8)
    module.d, module.e = {"x.y": 8, "z": 8, None: 8}, [1] * 300
    assert dict(kept.integers(module)) == {"c.width": 8, "d.z": 8}
    with pytest.raises(AttributeError, match="keeps nothing under c"):
        kept.get(module, "c.height")


# ---------------------------------------------------------------- grouped queries


class GroupedQueries(nn.Module):
    """Attention whose keys are repeated for several query heads each, or given on as they are."""

    def __init__(self, heads: int, keys: int, head_dim: int = 4) -> None:
        super().__init__()
        self.head_dim, self.repeats = head_dim, heads // keys
        self.q, self.o = nn.Linear(12, heads * head_dim), nn.Linear(heads * head_dim, 12)
        self.k, self.v = nn.Linear(12, keys * head_dim), nn.Linear(12, keys * head_dim)
        self.head = nn.Linear(12, 5)

    def repeated(self, x: Tensor) -> Tensor:
        b, h, n, d = x.shape
        if self.repeats == 1:
            return x
        return x[:, :, None].expand(b, h, self.repeats, n, d).reshape(b, h * self.repeats, n, d)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, -1, self.head_dim).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, self.repeated(k), self.repeated(v))
        return self.head(self.o(y.transpose(1, 2).reshape(b, n, -1)))


@pytest.mark.parametrize(("heads", "keys"), [(6, 3), (4, 2), (8, 4)])
def test_keys_that_are_repeated_twice(heads: int, keys: int) -> None:
    """The two query heads of a key head stay, since a forward that repeats once does otherwise; key heads may go."""
    combed = checked(GroupedQueries(heads, keys), random(2, 5, 12))
    assert sizes(combed) == {"q": keys, "q#3": 4, "v": 4, "o": 12}
    assert "where fewer than 2 stay [reshape in the model, test_edges.py:" in frozen(combed)["q#2"]


def test_keys_that_are_repeated_four_times() -> None:
    combed = checked(GroupedQueries(12, 3), random(2, 5, 12))
    assert sizes(combed) == {"q": 3, "q#2": 4, "q#3": 4, "v": 4, "o": 12}
    assert {group.name: group.minimum for group in combed.open}["q#2"] == 2
