"""Coupling groups: golden ones of known models, those of small modules written out, and what a plan refuses."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import MappingProxyType

import networkx as nx
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import cpd
from cpd.coupling.comb import Comb
from cpd.errors import InputError, PlanError
from cpd.surgery.masked import masked_error
from cpd.surgery.shrink import shrink
from helpers.zoo import (
    comb,
    conv,
    dense,
    frozen,
    group,
    images,
    names_of,
    random_plan,
    relative_error,
    sizes,
    snapshot,
    zeroed,
)

MAP = torch.randn(2, 3, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 5, 12, dtype=torch.double, generator=torch.Generator().manual_seed(0))


class Sketch(nn.Module):
    """A module whose forward is a function of itself and its input."""

    def __init__(self, function: Callable[[Sketch, Tensor], Tensor], **attributes: object) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def sketch(function: Callable[[Sketch, Tensor], Tensor], x: Tensor = MAP, **attributes: object) -> Comb:
    """The comb of a sketch, after the oracles have confirmed what it calls prunable."""
    return checked(Sketch(function, **attributes), x)


def checked(model: nn.Module, x: Tensor) -> Comb:
    """The comb of a model, after masked has been found equal to shrunk at two depths."""
    model = dense(model)
    combed = comb(model, x)
    for share in (0.3, 0.5):
        plan = random_plan(combed, share)
        shrunk = shrink(copy.deepcopy(model), plan)
        assert masked_error(model, shrunk, combed, plan) < 1e-9
        plan = random_plan(combed, share, exact=True)
        shrunk = shrink(copy.deepcopy(model), plan)
        with torch.no_grad():
            assert relative_error(shrunk(x), zeroed(model, plan)(x)) < 1e-9
    return combed


# ---------------------------------------------------------------- golden groups

FIXED_INPUT, OUTPUT = "contracted with a fixed dimension (for example the image's input channels)", "the model's output"


def test_groups_of_resnet18() -> None:
    combed = comb(timm.create_model("resnet18").eval(), torch.zeros(1, 3, 64, 64))
    assert sizes(combed) == {
        "conv1": 64,
        "layer1.0.conv1": 64,
        "layer1.1.conv1": 64,
        "layer2.0.conv1": 128,
        "layer2.0.conv2": 128,
        "layer2.1.conv1": 128,
        "layer3.0.conv1": 256,
        "layer3.0.conv2": 256,
        "layer3.1.conv1": 256,
        "layer4.0.conv1": 512,
        "layer4.0.conv2": 512,
        "layer4.1.conv1": 512,
    }
    assert all(item.exact and not item.ties for item in combed.groups)
    reasons = frozen(combed)
    assert {name: reason.partition(" [")[0] for name, reason in reasons.items()} == {
        "conv1#2": FIXED_INPUT,
        "fc": OUTPUT,
    }
    assert "[linear in fc, resnet.py:" in reasons["fc"]
    assert [str(member) for member in group(combed, "layer4.0.conv2").members if "running" not in member.tensor] == [
        "layer4.0.conv2.weight dim 0",
        "layer4.0.bn2.weight dim 0",
        "layer4.0.bn2.bias dim 0",
        "layer4.0.downsample.0.weight dim 0",
        "layer4.0.downsample.1.weight dim 0",
        "layer4.0.downsample.1.bias dim 0",
        "layer4.1.conv1.weight dim 1",
        "layer4.1.conv2.weight dim 0",
        "layer4.1.bn2.weight dim 0",
        "layer4.1.bn2.bias dim 0",
        "fc.weight dim 1",
    ]
    contracted = [member.tensor for member in group(combed, "layer4.0.conv2").members if member.contracted]
    assert contracted == ["layer4.1.conv1.weight", "fc.weight"]


def test_groups_of_a_vision_transformer() -> None:
    combed = comb(timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32).eval(), torch.zeros(1, 3, 32, 32))
    assert sizes(combed) == {
        "patch_embed.proj": 192,
        "blocks.0.attn.qkv#2": 3,
        "blocks.0.attn.qkv#3": 64,
        "blocks.0.mlp.fc1": 768,
        "blocks.1.attn.qkv#2": 3,
        "blocks.1.attn.qkv#3": 64,
        "blocks.1.mlp.fc1": 768,
    }
    assert [item.name for item in combed.groups if not item.exact] == ["patch_embed.proj"]
    assert "layer_norm in blocks.0.norm1" in group(combed, "patch_embed.proj").inexact
    members = {str(member) for member in group(combed, "patch_embed.proj").members}
    assert {"cls_token dim 2", "pos_embed dim 2", "head.weight dim 1", "blocks.1.attn.qkv.weight dim 1"} <= members
    heads, width = (group(combed, f"blocks.0.attn.qkv#{number}") for number in (2, 3))
    assert heads.members == width.members
    assert [str(member) for member in heads.members] == [
        "blocks.0.attn.qkv.weight dim 0",
        "blocks.0.attn.qkv.bias dim 0",
        "blocks.0.attn.proj.weight dim 1",
    ]
    assert not combed.ties
    assert set(frozen(combed)) == {
        "pos_embed",
        "patch_embed.proj#2",
        "blocks.0.attn.qkv",
        "blocks.1.attn.qkv",
        "head",
    }


def test_groups_of_a_swin_transformer() -> None:
    model = torchvision.models.SwinTransformer(
        patch_size=[4, 4], embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4], num_classes=7
    )
    combed = comb(model.eval(), torch.zeros(1, 3, 32, 32))
    found = sizes(combed)
    assert found["features.0.0"] == 24
    assert found["features.2.reduction"] == 48
    assert found["features.1.1.mlp.0"] == 96
    assert found["features.3.0.attn.qkv"] == 4
    assert found["features.3.0.attn.qkv#3"] == 12
    assert "features.1.0.attn.relative_position_index" not in found
    merged = group(combed, "features.0.0").members  # patch merging carries the same channels four times
    assert [member.dim for member in merged if member.tensor == "features.2.reduction.weight"] == [1]
    for name in ("features.3.0.attn.qkv", "features.3.0.attn.qkv#3", "features.2.reduction"):
        assert any("reshape in features.3.0.attn, swin_transformer.py:" in tie for tie in group(combed, name).ties)
    assert "relative_position_bias_table dim 1" in str(group(combed, "features.3.0.attn.qkv").members[0])
    assert not group(combed, "features.0.0").exact


def test_groups_of_a_shuffled_network() -> None:
    model = torchvision.models.ShuffleNetV2([2, 1, 1], [8, 16, 24, 32, 40], num_classes=7)
    combed = comb(model.eval(), torch.zeros(1, 3, 64, 64))
    assert list(sizes(combed).items())[:5] == [
        ("conv1.0", 8),
        ("stage2.0.branch1.2", 4),
        ("stage2.0.branch1.2#2", 4),
        ("stage2.0.branch2.0", 8),
        ("stage2.1.branch2.0", 8),
    ]
    assert all(item.exact for item in combed.groups)
    tied = [item.name for item in combed.groups if item.ties]
    assert tied == ["stage2.0.branch1.2", "stage2.0.branch1.2#2"]
    assert set(frozen(combed)) == {"conv1.0#2", "fc"}


@pytest.mark.parametrize("make", [lambda: timm.create_model("resnet18"), lambda: nn.MultiheadAttention(8, 2)])
def test_comb_is_the_same_each_time_and_leaves_the_model_alone(make: Callable[[], nn.Module]) -> None:
    model = make().train()
    next(model.parameters()).requires_grad_(False)
    next(model.modules()).marker = [1, 2]
    next(reversed(list(model.modules()))).eval()
    next(reversed(list(model.parameters()))).grad = torch.ones_like(next(reversed(list(model.parameters()))))
    x = (torch.zeros(2, 3, 32, 32),) if hasattr(model, "conv1") else (torch.zeros(2, 4, 8),) * 3
    before = snapshot(model)
    first, second = comb(model, *x), comb(model, *x)
    assert snapshot(model) == before
    assert first.groups == second.groups


# ---------------------------------------------------------------- small modules: what is coupled with what


def test_concat_then_add_then_split() -> None:
    """The boundaries of one concatenation and of another split cut the axes where either lies."""

    def forward(self: Sketch, x: Tensor) -> Tensor:
        head, tail = torch.cat([self.a(x), self.b(x)], 1).split(self.widths, 1)
        return self.out(torch.cat([head + self.c(x), tail], 1))

    layers = {"a": conv(3, 4), "b": conv(3, 6), "c": conv(3, 6), "out": conv(10, 5)}
    combed = sketch(forward, widths=[6, 4], **layers)
    assert sizes(combed) == {"a": 4, "b": 2, "b#2": 4}
    assert {"b.weight dim 0", "c.weight dim 0", "out.weight dim 1"} <= set(map(str, group(combed, "b").members))
    attributes = {item.name: item.new for item in combed.plan({"a": [0], "b": [1], "b#2": [0, 3]}).attributes}
    assert attributes == {"widths": [2, 2]}


def test_a_literal_width_freezes_with_its_line() -> None:
    def forward(self: Sketch, x: Tensor) -> Tensor:
        return self.out(self.a(x).reshape(2, 8, 64).transpose(1, 2))

    line = forward.__code__.co_firstlineno + 1
    reason = frozen(sketch(forward, a=conv(3, 8), out=nn.Linear(8, 5)))["a"]
    assert reason.startswith("the forward names the width 8")
    assert f"[reshape in the model, test_comb.py:{line}]" in reason


def test_chunk_ties_its_pieces_in_number() -> None:
    def forward(self: Sketch, x: Tensor) -> Tensor:
        left, right = self.a(x).chunk(2, 1)
        return self.left(left) + self.right(right)

    model = dense(Sketch(forward, a=conv(3, 12), left=conv(6, 5), right=conv(6, 5)))
    combed = checked(model, MAP)
    assert sizes(combed) == {"a": 6, "a#2": 6}
    assert all("chunk demands equal pieces [chunk in the model, test_comb.py:" in item.ties[0] for item in combed.open)
    plan = combed.plan({"a": [0, 1], "a#2": [2, 3, 4, 5]})
    assert plan.groups["a#2"] == (2, 3, 4, 5)
    assert len(plan.groups["a"]) == 4
    assert {0, 1} <= set(plan.groups["a"])
    assert len(plan.adjusted) == 1
    assert plan.adjusted[0].startswith("a keeps 4 of 6 channels instead of 2: chunk demands equal pieces")
    with pytest.raises(PlanError, match=r"a keeps 4 of 6 channels instead of 2.*strict=False"):
        combed.plan({"a": [0, 1], "a#2": [2, 3, 4, 5]}, strict=True)
    assert combed.plan({"a": [0, 1], "a#2": [4, 5]}, strict=True).adjusted == ()


def test_chunks_that_are_multiplied_lose_the_same_positions() -> None:
    combed = sketch(lambda self, x: self.out(torch.mul(*self.a(x).chunk(2, 1))), a=conv(3, 12), out=conv(6, 5))
    assert sizes(combed) == {"a": 6}
    kept = combed.plan({"a": [1, 4]}).kept["a.weight"][0]
    assert kept.tolist() == [1, 4, 7, 10]


def test_group_convolution() -> None:
    combed = sketch(
        lambda self, x: self.out(self.g(self.a(x))), a=conv(3, 8), g=conv(8, 12, 3, groups=4), out=conv(12, 5)
    )
    assert sizes(combed) == {"a": 4, "a#2": 2, "g": 3}
    plan = combed.plan({"a": [0, 2, 3]})
    assert [(item.module, item.name, item.old, item.new) for item in plan.attributes] == [("g", "groups", 4, 3)]
    assert plan.kept["g.weight"][0].tolist() == [0, 1, 2, 6, 7, 8, 9, 10, 11]


def test_depthwise_convolution_with_a_multiplier() -> None:
    combed = sketch(
        lambda self, x: self.out(self.g(self.a(x))), a=conv(3, 8), g=conv(8, 16, 3, groups=8), out=conv(16, 5)
    )
    assert sizes(combed) == {"a": 8, "g": 2}


def test_pixel_shuffle_loses_whole_blocks() -> None:
    combed = sketch(lambda self, x: self.out(F.pixel_shuffle(self.a(x), 2)), a=conv(3, 16), out=conv(4, 5))
    assert sizes(combed) == {"a": 4}
    assert combed.plan({"a": [0, 3]}).kept["a.weight"][0].tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert "becomes space" in frozen(combed)["a#2"]


def test_tied_weights_are_one_tensor() -> None:
    first, last = nn.Linear(12, 8), nn.Linear(12, 8)
    last.weight = first.weight
    model = Sketch(
        lambda self, x: self.out(self.last(self.middle(self.first(x)))),
        first=first,
        middle=nn.Linear(8, 12),
        last=last,
        out=nn.Linear(8, 4),
    )
    combed = checked(model, TOKENS)
    assert sizes(combed) == {"first": 8}
    members = {str(member) for member in group(combed, "first").members}
    assert members == {
        "first.weight dim 0",
        "first.bias dim 0",
        "middle.weight dim 1",
        "last.weight dim 0",
        "last.bias dim 0",
        "out.weight dim 1",
    }
    assert "fixed" in frozen(combed)["middle"]  # its rows are the columns of `first`, which reads the input


def test_a_module_called_twice() -> None:
    combed = sketch(
        lambda self, x: self.out(self.m(F.relu(self.m(self.a(x))))),
        TOKENS,
        a=nn.Linear(12, 8),
        m=nn.Linear(8, 8),
        out=nn.Linear(8, 4),
    )
    assert sizes(combed) == {"a": 8}
    assert {"m.weight dim 0", "m.weight dim 1"} <= {str(member) for member in group(combed, "a").members}


def test_parameters_used_bare() -> None:
    combed = sketch(
        lambda self, x: self.out(torch.cat([self.token.expand(2, -1, -1), self.a(x) * self.gamma], 1)),
        TOKENS,
        a=nn.Linear(12, 8),
        out=nn.Linear(8, 4),
        gamma=nn.Parameter(torch.ones(8)),
        token=nn.Parameter(torch.ones(1, 1, 8)),
    )
    (found,) = combed.open
    assert {str(member) for member in found.members} == {
        "gamma dim 0",
        "token dim 2",
        "a.weight dim 0",
        "a.bias dim 0",
        "out.weight dim 1",
    }


@pytest.mark.parametrize(
    ("groups", "expected"),
    [(1, {"a": (12, False)}), (3, {"a": (3, True), "a#2": (4, False)}), (12, {"a": (12, True)})],
)
def test_group_norm_is_exact_in_its_groups_alone(groups: int, expected: dict) -> None:
    combed = sketch(
        lambda self, x: self.out(self.n(self.a(x))), a=conv(3, 12), n=nn.GroupNorm(groups, 12), out=conv(12, 5)
    )
    assert {item.name: (item.size, item.exact) for item in combed.open} == expected


@pytest.mark.parametrize("named", [True, False])
def test_padded_channels_follow_an_attribute_and_freeze_at_a_literal(named: bool) -> None:
    def by_attribute(self: Sketch, x: Tensor) -> Tensor:
        return self.out(F.pad(self.a(x), (0, 0, 0, 0, self.width, self.width)) + self.b(x))

    def by_literal(self: Sketch, x: Tensor) -> Tensor:
        return self.out(F.pad(self.a(x), (0, 0, 0, 0, 2, 2)) + self.b(x))

    combed = sketch(by_attribute if named else by_literal, a=conv(3, 4), b=conv(3, 8), out=conv(8, 5), width=2)
    assert sizes(combed) == ({"a": 4, "b": 2, "b#2": 2} if named else {"a": 4})
    plan = combed.plan({"b": [0], "b#2": [1]} if named else {"a": [0, 3]})
    assert plan.kept["b.weight"][0].tolist() == ([0, 2, 3, 4, 5, 7] if named else [0, 1, 2, 5, 6, 7])
    if not named:
        assert "the forward names the width 2" in frozen(combed)["b"]


class GroupedQueries(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.heads, self.key_heads, self.head_dim = how, 4, 2, 6
        self.q, self.k, self.v = nn.Linear(12, 24), nn.Linear(12, 12), nn.Linear(12, 12)
        self.out = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, self.head_dim).transpose(1, 2)
        k, v = (layer(x).view(b, n, self.key_heads, self.head_dim).transpose(1, 2) for layer in (self.k, self.v))
        times = self.heads // self.key_heads
        if self.how == "expand":
            k, v = (t[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2) for t in (k, v))
        elif self.how == "repeat":
            k, v = (t.repeat(1, times, 1, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.how == "native")
        return self.out(y.transpose(1, 2).reshape(b, n, -1))


@pytest.mark.parametrize("how", ["expand", "repeat", "native"])
def test_grouped_queries(how: str) -> None:
    combed = checked(GroupedQueries(how), TOKENS)
    found = sizes(combed)
    assert found["q"] == 2  # the key heads
    assert {"k.weight dim 0", "v.weight dim 0", "out.weight dim 1"} <= set(map(str, group(combed, "q").members))
    assert 6 in found.values()  # the width of a head


class Attention(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.heads = kind, 3
        self.qkv, self.out = nn.Linear(12, 72), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        fused = self.kind == "fused"
        y = F.scaled_dot_product_attention(q, k, v) if fused else self.logits(q, k).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, n, -1))

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        if self.kind == "before":
            return (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
        if self.kind == "after":
            return (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
        return torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.3


@pytest.mark.parametrize("kind", ["fused", "before", "after", "einsum"])
def test_attention_keeps_its_old_scale(kind: str) -> None:
    combed = checked(Attention(kind), TOKENS)
    assert sizes(combed) == {"qkv#2": 3, "qkv#3": 8}
    assert all(item.exact for item in combed.open)
    plan = combed.plan({"qkv#3": [0, 1]})
    assert {item.tensor for item in plan.rescales} == (set() if kind == "einsum" else {"qkv.weight", "qkv.bias"})
    assert all(item.factor == pytest.approx(0.5) for item in plan.rescales)  # sqrt(2 / 8)


def test_a_number_that_no_rows_make_up_for_follows_its_width() -> None:
    def forward(self: Sketch, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.out(y).exp() / y.shape[1]

    model = dense(Sketch(forward, a=conv(3, 8), out=conv(8, 5)))
    image = torch.randn(2, 3, 8, 8, dtype=torch.double)
    combed = comb(model, image)
    assert sizes(combed) == {"a": 8}
    assert "a constant of the forward depends on this width [div in" in str(group(combed, "a").inexact)
    plan = combed.plan({"a": [0, 2, 5]})
    assert masked_error(model, shrink(copy.deepcopy(model), plan), combed, plan) < 1e-9


def test_a_number_that_no_formula_explains_freezes_its_width() -> None:
    def forward(self: Sketch, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.out(y) * math.log(1 + y.shape[1])

    combed = sketch(forward, a=conv(3, 8), out=conv(8, 5))
    assert "depends on this width [mul in the model, test_comb.py:" in frozen(combed)["a"]


def test_features_that_a_buffer_alone_gives_are_frozen() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("features", torch.randn(9, 4))
            self.register_buffer("position", torch.randn(8, 1, 1))
            self.a, self.inner, self.out = conv(3, 8), nn.Linear(4, 6), nn.Linear(6, 8)
            self.last = conv(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            bias = self.out(self.inner(self.features)).mean(0)[:, None, None]
            return self.last(self.a(x) + self.position + bias)

    combed = comb(Table(), torch.randn(2, 3, 8, 8))
    assert sizes(combed) == {"a": 8, "inner": 6}  # a buffer along channels that a layer gives goes with them
    assert any("given by the buffer features alone" in reason for reason in frozen(combed).values())


def test_flatten_before_a_linear_layer() -> None:
    combed = sketch(lambda self, x: self.out(self.a(x).flatten(1)), a=conv(3, 4), out=nn.Linear(256, 5))
    assert sizes(combed) == {"a": 4}
    assert combed.plan({"a": [1]}).kept["out.weight"][1].tolist() == list(range(64, 128))


def test_squeeze_and_excite() -> None:
    def forward(self: Sketch, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.out(y * self.up(F.relu(self.down(y.mean((2, 3), keepdim=True)))).sigmoid())

    combed = sketch(forward, a=conv(3, 8), down=conv(8, 4), up=conv(4, 8), out=conv(8, 5))
    assert sizes(combed) == {"a": 8, "down": 4}
    assert all(item.exact for item in combed.open)


@pytest.mark.parametrize(
    ("mix", "exact"),
    [
        (lambda y: y.mean(1, keepdim=True), False),
        (lambda y: y.max(1, keepdim=True)[0], False),
        (lambda y: F.normalize(y, dim=1), True),  # a zero adds nothing to the norm
        (lambda y: y.softmax(1), False),
        (lambda y: torch.var_mean(y, 1, keepdim=True)[0], False),
        (lambda y: (y + 1).sum(1, keepdim=True), False),
        (lambda y: y.logsumexp((2, 3), keepdim=True).sum(1, keepdim=True), False),
        (lambda y: F.pad(y, (1, 1, 1, 1), value=2.0).sum((1, 2, 3), keepdim=True), False),
        (lambda y: y.masked_fill(y < 1, 3.0).sum(1, keepdim=True), False),
        (lambda y: y.masked_fill(y > 1, 3.0).sum(1, keepdim=True), True),  # a zero is not above 1
        (lambda y: torch.einsum("nchw,ncij->nhwij", y.exp(), y.exp()).mean((3, 4))[:, None], False),
        (lambda y: y.sum(1, keepdim=True), True),
        (lambda y: y.exp(), True),
        (lambda y: torch.maximum(y, 2 * y), True),
    ],
)
def test_mixing_over_channels_is_inexact_where_removing_is_not_zeroing(mix: Callable, exact: bool) -> None:
    combed = sketch(lambda self, x: self.out(self.a(x) + mix(self.a(x))), a=conv(3, 8), out=conv(8, 5))
    assert sizes(combed) == {"a": 8}
    assert combed.open[0].exact is exact
    assert (combed.open[0].inexact is None) is exact


def test_an_op_without_a_rule_freezes_and_is_named() -> None:
    combed = sketch(
        lambda self, x: self.out(self.b(torch.linalg.ldl_factor(self.a(x))[0])),
        a=conv(3, 8),
        b=conv(8, 6),
        out=conv(6, 5),
    )
    assert combed.unknown == ("aten.linalg_ldl_factor.default",)
    why = "no rule for aten.linalg_ldl_factor.default [linalg_ldl_factor in the model, test_comb.py:"
    assert why in frozen(combed)["a"]
    assert sizes(combed) == {"b": 6}  # what it does not touch stays open


def test_indices_of_channels_freeze_them() -> None:
    combed = sketch(
        lambda self, x: self.out(self.a(x)) + self.a(x).max(1, keepdim=True)[1], a=conv(3, 8), out=conv(8, 5)
    )
    assert "by their index" in frozen(combed)["a"]


def test_a_forward_that_asserts_its_width_is_frozen() -> None:
    def forward(self: Sketch, x: Tensor) -> Tensor:
        y = self.a(x)
        assert y.shape[1] == 8, "eight, please"
        return self.out(y)

    combed = sketch(forward, a=conv(3, 8), out=conv(8, 5))
    assert not combed.open
    assert "eight, please" in frozen(combed)["a"]


def test_a_model_without_anything_to_prune_says_why() -> None:
    combed = comb(nn.Linear(12, 4).double(), TOKENS)
    assert not combed.open
    assert {name: reason.partition(" [")[0] for name, reason in frozen(combed).items()} == {
        "weight": OUTPUT,
        "weight#2": FIXED_INPUT,
    }


# ---------------------------------------------------------------- plans, the graph, bad input


@pytest.fixture(scope="module")
def small() -> Comb:
    return sketch(lambda self, x: self.out(self.a(x)), a=conv(3, 8), out=conv(8, 5))


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"b": [0]}, r"There are no groups named \['b'\]"),
        ({"a": []}, "removes all channels of a: keep at least one of its 8"),
        ({"a": [0, 8]}, "integers from 0 to 7"),
        ({"a": [-1]}, "integers from 0 to 7"),
        ({"a": [0.5]}, "integers from 0 to 7"),
        ({"out": [0, 1]}, "out cannot be pruned: the model's output"),
    ],
)
def test_a_plan_refuses(small: Comb, keep: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        small.plan(keep)


def test_a_plan_takes_tensors_ranges_and_whole_frozen_groups(small: Comb) -> None:
    plan = small.plan({"a": torch.tensor([5, 2]), "out": range(5)})
    assert plan.groups["a"] == (2, 5)
    assert plan.groups["out"] == (0, 1, 2, 3, 4)
    assert set(plan.kept) == {"a.weight", "a.bias", "out.weight"}
    assert plan.kept["out.weight"][1].tolist() == [2, 5]
    assert plan.kept["out.weight"][1].dtype == torch.long
    assert plan.shapes["out.weight"] == (5, 8, 1, 1)


def test_a_plan_is_immutable(small: Comb) -> None:
    plan = small.plan({"a": [0]})
    for mapping in (plan.kept, plan.groups, plan.shapes, plan.kept["a.weight"]):
        assert isinstance(mapping, MappingProxyType)
    with pytest.raises(TypeError):
        plan.kept["a.weight"] = {}
    with pytest.raises(AttributeError):
        plan.kept = {}


def test_the_graph_can_be_queried(small: Comb) -> None:
    graph = small.graph
    assert isinstance(graph, nx.DiGraph)
    assert nx.is_directed_acyclic_graph(graph)
    assert all({"op", "module", "shape", "line", "groups"} <= set(graph.nodes[node]) for node in graph)
    (first, second) = (node for node in nx.topological_sort(graph) if graph.nodes[node]["op"] == "conv2d")
    assert nx.has_path(graph, "a.weight", second)
    assert graph.nodes[first]["module"] == "a"
    assert graph.nodes[first]["shape"] == (2, 8, 8, 8)
    assert graph.nodes[first]["line"].startswith("test_comb.py:")
    assert graph.nodes[first]["groups"] == ["a"]
    assert graph.nodes[second]["groups"] == ["out"]
    assert graph.nodes["out.weight"]["groups"] == ["out", "a"]


def test_bad_input_is_told_from_a_model_that_cannot_be_traced() -> None:
    with pytest.raises(InputError, match=r"^model must be a torch\.nn\.Module: .*; got dict"):
        comb({}, MAP)
    with pytest.raises(InputError, match=r"fails on the example inputs of shape \[\(2, 5, 12\)\]"):
        comb(nn.Linear(4, 4).double(), TOKENS)


def test_names_are_unique_and_members_complete() -> None:
    model = timm.create_model("convnext_atto", depths=(1, 1, 1, 1)).eval()
    combed = comb(model, images(64).float())
    names = names_of(combed.groups)
    assert len(set(names)) == len(names)
    covered = {member.tensor for item in combed.groups for member in item.members}
    assert covered == {
        name for name, parameter in model.named_parameters() if parameter.dim() and parameter.numel() > 1
    }


class _Borrowed(nn.Module):
    """A width that is fixed in the code on one side and computed from another layer's on the other."""

    def __init__(self):
        super().__init__()
        self.before = nn.Linear(6, 40)
        self.a = nn.Linear(40, 24)
        self.q = nn.Linear(24, 32)
        self.o = nn.Linear(32, 5)

    def forward(self, x):
        h = self.a(self.before(x).relu())
        y = self.q(h).view(x.shape[0], 4, 8).transpose(1, 2)
        return self.o(y.reshape(x.shape[0], h.shape[-1] // 3 * 4))


def test_a_width_that_a_frozen_one_is_computed_from_is_frozen_too():
    comb = cpd.comb(_Borrowed().eval(), torch.randn(2, 6))
    frozen = {group.name: group.frozen for group in comb.groups}
    assert "names the width" in frozen["a"]
    assert "names the width" in frozen["q"]


class Auxiliary(nn.Module):
    """A second classifier that runs in train mode alone, beside one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 6), nn.Linear(6, 5)
        self.aux = nn.Sequential(conv(8, 4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 5))
        self.never = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.a(x)
        y = self.head(self.b(x).mean((2, 3)))
        return (y, self.aux(x)) if self.training else y


@pytest.mark.parametrize("training", [False, True])
def test_layers_that_run_in_train_mode_alone_follow_what_they_read(training: bool) -> None:
    net = Auxiliary().train(training)
    statistics = net.aux[1].running_mean.clone()
    combed = cpd.comb(net, torch.randn(1, 3, 8, 8))
    assert net.training == training
    assert torch.equal(net.aux[1].running_mean, statistics)
    assert sizes(combed) == {"a": 8, "b": 6}
    assert frozen(combed)["aux.0"] == "used in train mode alone"
    assert "aux.0.weight" in [member.tensor for member in group(combed, "a").members]
    shrunk = shrink(net, combed.plan({"a": [1, 2, 6], "b": [0]})).train()
    main, auxiliary = shrunk(torch.randn(2, 3, 8, 8))
    assert (main.shape, auxiliary.shape) == ((2, 5), (2, 5))
    assert shrunk.never.weight.shape == (7, 7)


class Opaque(Auxiliary):
    """Branches on a value in train mode, which no export can follow."""

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.training and self.a(x).sum() > 1e9:
            return self.never(x)
        return super().forward(x)


def test_a_forward_that_cannot_be_traced_in_train_mode_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    combed = cpd.comb(Opaque(), torch.randn(1, 3, 8, 8))
    assert "layers that only run in train mode are not pruned" in caplog.text
    assert sizes(combed) == {"a": 8, "b": 6}
