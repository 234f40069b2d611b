"""Proof: integers that the forward asks for, and the attributes and ties that explain them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cpd
from cpd.errors import PlanError
from cpd.plan import Plan
from cpd.proof.copies import Budget
from cpd.selection.limits import Limits
from cpd.selection.selector import Selector
from cpd.surgery.masked import masked_error
from cpd.surgery.shrink import shrink
from helpers.sketches import MAP, TOKENS, Sketch, checked, sketch
from helpers.zoo import conv, dense, frozen, group, random_plan, sizes


def new_attributes(plan: Plan) -> dict[str, object]:
    """{path: new value} of the attributes that a plan sets."""
    return {f"{item.module}.{item.name}".lstrip("."): item.new for item in plan.attributes}


# ---------------------------------------------------------------- attributes


class Heads(nn.Module):
    """Attention by hand, whose head width is computed from the width of its input."""

    def __init__(self, computed: str, head_dim: int = 2) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.num_heads, self.head_dim, self.computed = 4, head_dim, computed
        self.q, self.k, self.v = (nn.Linear(8, 4 * head_dim) for _ in range(3))
        self.proj, self.out = nn.Linear(4 * head_dim, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        b, n, c = x.shape
        width = c // self.num_heads if self.computed == "shape" else self.head_dim
        q, k, v = (layer(x).reshape(b, n, self.num_heads, width).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = (q * width**-0.5) @ k.transpose(-2, -1)
        y = (y.softmax(-1) @ v).transpose(1, 2).reshape(b, n, self.num_heads * width)
        return self.out(self.proj(y))


def test_a_width_computed_from_another_is_a_tie() -> None:
    combed = checked(Heads("shape"), TOKENS, train=True)
    assert sizes(combed) == {"a": 8, "q": 4, "q#2": 2, "v": 2, "proj": 8}
    assert all(
        any("a width is computed from another [reshape in the model, test_proof.py:" in tie for tie in item.ties)
        for item in combed.open
        if item.name != "proj"
    )
    for heads in (1, 2, 3, 4):
        for width in (1, 2):
            for inputs in range(1, 9):
                plan = combed.plan({"a": range(inputs), "q": range(heads), "q#2": range(width)})
                kept = {name: len(positions) for name, positions in plan.groups.items()}
                assert kept["a"] == kept["q"] * kept["q#2"]
                assert kept["v"] == kept["q#2"]
                assert new_attributes(plan).get("num_heads", 4) == kept["q"]
                assert kept["a"] >= inputs
                assert kept["q"] >= heads
                assert kept["q#2"] >= width


@pytest.mark.parametrize(
    "width",
    [
        *((width) for width in (2, 3, 4)),
        6,
        (8),
    ],
)
def test_a_width_kept_in_an_attribute_is_tied_to_others_that_it_names(width: int) -> None:
    """`head_dim` is the width of q and k, and that of v: two groups, of which one attribute can follow one."""
    combed = checked(Heads("attribute", width), TOKENS, train=True)
    assert sizes(combed) == {"a": 8, "q": 4, "q#2": width, "v": width, "proj": 8}
    assert [group(combed, name).ties != () for name in ("a", "q", "q#2", "v")] == [False, False, True, True]
    for keep in ({"q#2": [1]}, {"v": [1]}, {"q": [0, 3]}, {"q": [0], "q#2": [1], "v": [0]}):
        plan = combed.plan(keep)
        assert len(plan.groups["q#2"]) == len(plan.groups["v"]) == (1 if len(keep) == 3 else width)
        shrunk = shrink(copy.deepcopy(combed.model), plan)
        assert masked_error(combed.model, shrunk, combed, plan) <= 1e-9
    assert new_attributes(plan) == {"num_heads": 1, "head_dim": 1}


def split_in_two(function: Callable[[Sketch, Tensor], list], **attributes: object) -> Sketch:
    """A layer of 10 channels split into 3 and 7, each read by a layer of its own."""

    def forward(self: Sketch, x: Tensor) -> Tensor:
        first, second = function(self, self.a(x))
        return self.first(first) + self.second(second)

    return Sketch(forward, a=conv(3, 10), first=conv(3, 5), second=conv(7, 5), **attributes)


@pytest.mark.parametrize(
    ("split", "attributes", "expected"),
    [
        (
            lambda self, y: y.split([self.pdim, self.dim - self.pdim], 1),
            {"dim": 10, "pdim": 3},
            {"dim": 7, "pdim": 2},
        ),
        (
            lambda self, y: torch.split(y, (self.pdim, self.dim - self.pdim), dim=1),
            {"dim": 10, "pdim": 3},
            {"dim": 7, "pdim": 2},
        ),
        (lambda self, y: y.split(self.widths, 1), {"widths": [3, 7]}, {"widths": [2, 5]}),
        (lambda self, y: torch.split_with_sizes(y, self.widths, 1), {"widths": (3, 7)}, {"widths": [2, 5]}),
        (lambda self, y: (y[:, : self.first_dim], y[:, self.first_dim :]), {"first_dim": 3}, {"first_dim": 2}),
        (lambda self, y: (y[:, : -self.last_dim], y[:, -self.last_dim :]), {"last_dim": 7}, {"last_dim": 5}),
    ],
)
def test_sizes_of_pieces_follow_attributes(split: Callable, attributes: dict, expected: dict) -> None:
    combed = checked(split_in_two(split, **attributes), MAP, train=True)
    assert sizes(combed) == {"a": 3, "a#2": 7}
    plan = combed.plan({"a": [0, 2], "a#2": [0, 1, 2, 3, 6]})
    assert new_attributes(plan) == expected


def test_one_end_of_a_slice_in_digits_freezes_its_side_alone() -> None:
    combed = checked(split_in_two(lambda self, y: (y[:, : self.first_dim], y[:, -7:]), first_dim=3), MAP)
    assert sizes(combed) == {"a": 3}
    assert "the forward names the width 7" in frozen(combed)["a#2"]
    assert new_attributes(combed.plan({"a": [1]})) == {"first_dim": 1}


def test_a_product_of_an_attribute_and_a_number() -> None:
    def forward(self: Sketch, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        y = self.qkv(x).view(b, n, self.num_heads, self.head_dim * 3)
        q, k, v = (part.transpose(1, 2) for part in y.chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))

    model = Sketch(forward, qkv=nn.Linear(12, 48), out=nn.Linear(16, 5), num_heads=4, head_dim=4)
    combed = checked(model, TOKENS, train=True)
    found = sizes(combed)
    assert found["qkv"] == 4
    assert 4 in list(found.values())[1:]
    plan = random_plan(combed, 0.5)
    assert new_attributes(plan) == {"num_heads": 2, "head_dim": 2}


class Table(nn.Module):
    """Keeps a bias and the shape that its method gives it; its forward is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(8 * 8))
        self.shape = (1, 8, 1, 8)

    def get(self) -> Tensor:
        return self.table.view(self.shape)


def test_an_attribute_of_an_inner_module_read_through_its_method() -> None:
    model = Sketch(lambda self, x: self.out(self.a(x) + self.bias.get()), a=conv(3, 8), bias=Table(), out=conv(8, 5))
    combed = checked(model, MAP)
    assert sizes(combed) == {"a": 8}
    assert {str(member) for member in combed.open[0].members} >= {"a.weight dim 0", "bias.table dim 0"}
    plan = combed.plan({"a": [2, 3, 7]})
    assert new_attributes(plan)["bias.shape"] == [1, 3, 1, 8]
    assert plan.kept["bias.table"][0].tolist() == [*range(16, 32), *range(56, 64)]


def test_a_forward_that_skips_a_step_unless_exported() -> None:
    """timm resamples position embeddings of the right size in an export alone, by a call of its own to reshape."""

    def forward(net: Sketch, x: Tensor) -> Tensor:
        table = net.table.reshape(1, 5, -1).reshape(net.table.shape) if torch.compiler.is_exporting() else net.table
        x = (net.a(x) + table).reshape(len(x), 5, net.heads, net.width).transpose(1, 2)
        return net.out(x.transpose(1, 2).reshape(len(x), 5, -1))

    layers = {"a": nn.Linear(12, 8), "out": nn.Linear(8, 5)}
    model = Sketch(forward, **layers, table=nn.Parameter(torch.randn(5, 8)), heads=2, width=4)
    combed = checked(model, TOKENS)
    assert sorted(sizes(combed).values()) == [2, 4]


@pytest.mark.parametrize("how", ["assert", "torch", "raise"])
def test_a_forward_that_checks_its_width_against_an_attribute(how: str) -> None:
    def forward(self: Sketch, x: Tensor) -> Tensor:
        y = self.a(x)
        if how == "assert":
            assert y.shape[1] == self.embed_dim, "wrong width"
        elif how == "torch":
            torch._assert(y.shape[1] == self.embed_dim, "wrong width")
        elif y.shape[1] != self.embed_dim:
            raise ValueError(f"{y.shape[1]} channels, not {self.embed_dim}")
        return self.out(F.relu(y))

    model = Sketch(forward, a=conv(3, 8), out=conv(8, 5), embed_dim=8, other=8)
    combed = checked(model, MAP, train=True)
    assert sizes(combed) == {"a": 8}
    assert new_attributes(combed.plan({"a": [1, 2, 6]})) == {"embed_dim": 3}


def test_a_literal_is_frozen_with_its_file_and_line_and_the_rest_stays_open() -> None:
    def forward(self: Sketch, x: Tensor) -> Tensor:
        y = self.a(x)
        y = y.view(x.shape[0], 8, 64)
        return self.out(self.b(y.transpose(1, 2)))

    line = forward.__code__.co_firstlineno + 2
    combed = sketch(forward, a=conv(3, 8), b=nn.Linear(8, 6), out=nn.Linear(6, 5))
    assert sizes(combed) == {"b": 6}
    reason = frozen(combed)["a"]
    assert reason.startswith("the forward names the width 8, and no attribute or other width explains it")
    assert f"[view in the model, test_proof.py:{line}]" in reason


def test_an_attribute_that_has_a_width_by_coincidence_stays_as_it_is() -> None:
    """The patch size, the stride and the width of the embedding are all 4; so is the number of heads."""

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_size, self.embed_dim = 4, 4
            self.patch = nn.Conv2d(3, 4, 4, stride=4)
            self.out = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            b, _, h, w = x.shape
            y = self.patch(x).view(b, self.embed_dim, h // self.patch_size * (w // self.patch_size))
            return self.out(y.transpose(1, 2))

    combed = checked(Patches(), MAP, train=True)
    assert sizes(combed) == {"patch": 4}
    assert new_attributes(combed.plan({"patch": [0, 2]})) == {"embed_dim": 2}
    assert (combed.model.patch_size, combed.model.embed_dim) == (4, 4)


def test_a_shift_as_large_as_the_number_of_heads_stays_as_it_is() -> None:
    def forward(self: Sketch, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        y = self.a(x.roll(self.shift, 1)).view(b, n, self.num_heads, -1)
        return self.out(y.softmax(-1).flatten(2))

    combed = sketch(forward, TOKENS, a=nn.Linear(12, 6), out=nn.Linear(6, 5), shift=3, num_heads=3)
    assert sizes(combed) == {"a": 3, "a#2": 2}
    assert new_attributes(combed.plan({"a": [1]})) == {"num_heads": 1}


class AreaAttention(nn.Module):
    """Attention whose forward names one width of a head for queries, keys and values, and their sum in one view."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.all_head_dim = self.num_heads * self.head_dim
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(2 * b, n // 2, self.all_head_dim * 3)
        qkv = qkv.view(2 * b, n // 2, self.num_heads, self.head_dim * 3).permute(0, 2, 3, 1)
        q, k, v = qkv.split([self.head_dim, self.head_dim, self.head_dim], dim=2)
        scores = (q * self.head_dim**-0.5).transpose(-2, -1) @ k
        y = v @ scores.softmax(-1).transpose(-2, -1)
        return x + self.proj(y.permute(0, 3, 1, 2).reshape(b, n, self.all_head_dim))


def test_an_attribute_tried_in_vain_for_one_width_is_tried_for_the_others() -> None:
    """Whose numbers the root holds too: what it keeps of its layers is no width, though it is as large as one."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(AreaAttention(32, 4) for _ in range(8))
            self.save, self.steps = [4, 7], {"first": 2, "then": [4, 4], "more": [[4, 2, [2, 4]]]}
            self.out = nn.Linear(64, 5)

        def forward(self, x: Tensor) -> Tensor:
            kept: list[Tensor | None] = []
            for index, layer in enumerate(self.layers):
                x = layer(x)
                kept.append(x if index in self.save else None)
            return self.out(torch.cat([kept[4], x], -1))

    combed = checked(Root(), torch.randn(1, 8, 32, dtype=torch.double))
    assert len(combed.open) == 24
    narrow = new_attributes(combed.plan({f"layers.0.qkv#{number}": range(6) for number in (2, 3)}))
    assert narrow == {"layers.0.head_dim": 6, "layers.0.all_head_dim": 24}
    assert all(place.module for place in combed.attributes)


class Shared(nn.Module):
    """A child that two parents share, and that names its width."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 8
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fc(x)).view(x.shape[0], -1, self.width)


class Parent(nn.Module):
    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.inner, self.end = shared, nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.inner(x))


def test_a_module_shared_between_two_parents() -> None:
    shared = Shared()
    model = Sketch(
        lambda self, x: self.out(self.left(self.a(x)) + self.right(self.a(x))),
        a=nn.Linear(12, 8),
        left=Parent(shared),
        right=Parent(shared),
        out=nn.Linear(6, 5),
    )
    combed = checked(model, TOKENS, train=True)
    assert sizes(combed) == {"a": 8, "left.inner.fc": 8, "left.end": 6}
    plan = combed.plan({"a": [0, 1, 7], "left.inner.fc": [2, 3]})
    assert new_attributes(plan) == {"left.inner.width": 2}
    shrunk = shrink(copy.deepcopy(model), plan)
    assert shrunk.left.inner is shrunk.right.inner
    assert shrunk.right.inner.width == 2
    assert shrunk.right.inner.fc.weight.shape == (2, 3)


def standardised(width: int) -> nn.Module:
    """A 1x1 convolution whose weights are standardised by a batch norm, which refuses a single value a channel."""

    def forward(net: Sketch, x: Tensor) -> Tensor:
        x = net.a(x)
        weight = net.b.weight.flatten(1).unsqueeze(0)
        weight = F.batch_norm(weight, None, None, training=True, momentum=0.0).view_as(net.b.weight)
        return net.c(F.conv2d(x, weight, net.b.bias)).mean((2, 3))

    return Sketch(forward, a=conv(3, width), b=conv(width, 6), c=conv(6, 5))


def test_a_width_of_which_a_single_position_fails_has_a_minimum() -> None:
    net = dense(standardised(8))
    combed = cpd.comb(net, MAP.double())
    assert [(item.name, item.minimum) for item in combed.open] == [("a", 2), ("b", 1)]
    plan = combed.plan({"a": [3], "b": [1]})
    assert (plan.groups["a"], plan.groups["b"]) == ((0, 3), (1,))
    assert "a keeps 2 of 8 channels instead of 1: a narrower copy fails (Expected more than 1 value" in plan.adjusted[0]
    assert masked_error(net, shrink(copy.deepcopy(net), plan), combed, plan) <= 1e-9
    with pytest.raises(PlanError, match="a keeps 2 of 8 channels instead of 1"):
        combed.plan({"a": [3]}, strict=True)
    scores = {item.name: torch.rand(item.size) for item in combed.open}
    selector = Selector(combed, scores, Limits(1, 0.99))
    assert selector.least() == {group(combed, "a").axis: 2, group(combed, "b").axis: 1}


def test_a_minimum_of_the_whole_width_freezes_it() -> None:
    combed = cpd.comb(dense(standardised(2)), MAP.double())
    assert "a narrower copy fails (Expected more than 1 value" in str(group(combed, "a").frozen)
    assert group(combed, "b").frozen is None


def test_a_width_whose_ties_allow_no_smaller_one_is_frozen() -> None:
    def forward(net: Sketch, x: Tensor) -> Tensor:
        first, second = net.a(x).chunk(2, 1)
        return torch.cat((net.b(second), first + x), 1).mean((2, 3))

    combed = checked(Sketch(forward, a=conv(3, 6), b=conv(3, 5)), MAP)
    assert "coupled elementwise with a dimension that is fixed" in frozen(combed)["a"]
    assert frozen(combed)["a#2"] == "tied to other widths, and no smaller width satisfies all of them"


def test_a_slice_that_begins_where_its_dimension_ends_names_no_width() -> None:
    def forward(net: Sketch, x: Tensor) -> Tensor:
        y = net.a(x)
        width = y.shape[1]  # a rotary embedding of all channels leaves none beside
        return net.b(torch.cat([y[:, :width] * 2, y[:, width:]], 1)).mean((2, 3))

    combed = checked(Sketch(forward, a=conv(3, 6), b=conv(6, 5)), MAP)
    assert sizes(combed) == {"a": 6}


class Insists(nn.Module):
    """A residual block that refuses another width than the one it was written for."""

    def __init__(self, insists: bool = True) -> None:
        super().__init__()
        self.insists = insists
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).relu()
        assert not self.insists or y.shape[-1] == 24, "made for a width of 24"
        return x + self.down(y)


class Easy(Insists):
    def __init__(self) -> None:
        super().__init__(insists=False)


def insisting(blocks: int) -> nn.Sequential:
    """As many blocks that refuse another width as blocks that do not."""
    return nn.Sequential(*[Insists() if index % 2 else Easy() for index in range(2 * blocks)], nn.Linear(12, 5))


@pytest.mark.parametrize("bound", [{"proof_copies": 3}, {"proof_seconds": 1e-6}])
def test_what_is_not_proved_within_the_budget_is_frozen_and_the_rest_is_open(bound: dict[str, float]) -> None:
    combed = cpd.comb(dense(insisting(6)), torch.randn(2, 12, dtype=torch.double), **bound)
    assert [group.name for group in combed.open] == [f"{index}.up" for index in range(0, 12, 2)]
    assert all("raise proof_copies or proof_seconds" in frozen(combed)[f"{index}.up"] for index in range(1, 12, 2))


def test_what_fails_in_three_modules_of_a_class_is_frozen_in_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    budgets: list[Budget] = []
    monkeypatch.setattr("cpd.proof.proof.Budget", lambda *args: budgets.append(Budget(*args)) or budgets[-1])
    for blocks in (4, 12):
        combed = cpd.comb(dense(insisting(blocks)), torch.randn(2, 12, dtype=torch.double))
        assert len(combed.open) == blocks
        assert all("made for a width of 24" in frozen(combed)[f"{2 * index + 1}.up"] for index in range(blocks))
    assert budgets[1].made < 1.5 * budgets[0].made


@pytest.mark.parametrize("bound", [{"proof_copies": 0}, {"proof_seconds": 0}, {"proof_seconds": float("nan")}])
def test_a_budget_of_nothing_is_refused(bound: dict[str, float]) -> None:
    with pytest.raises(cpd.InputError, match=next(iter(bound))):
        cpd.comb(dense(insisting(1)), torch.randn(2, 12, dtype=torch.double), **bound)


# ---------------------------------------------------------------- torch.nn's attention


def attention(heads: int = 2, *, weights: bool = False, **options: object) -> Sketch:
    """Self-attention of width 8 between two linear layers."""

    def forward(self: Sketch, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.out(self.attn(y, y, y, need_weights=weights)[0])

    attn = nn.MultiheadAttention(8, heads, **options)
    return Sketch(forward, a=nn.Linear(12, 8), attn=attn, out=nn.Linear(8, 5))


class Residual(nn.Module):
    """Self-attention whose result is added to what it reads."""

    def __init__(self, width: int, heads: int, *, weights: bool) -> None:
        super().__init__()
        self.a, self.out, self.weights = nn.Linear(12, width), nn.Linear(width, 5), weights
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.out(x + self.attn(x, x, x, need_weights=self.weights)[0])


@pytest.mark.parametrize(
    ("width", "heads"),
    [
        (16, 4),
        (8, 4),
        (16, 2),
        (12, 3),
    ],
)
def test_attention_is_open_at_any_number_of_heads(width: int, heads: int) -> None:
    combed = checked(Residual(width, heads, weights=False), TOKENS)
    assert sorted(sizes(combed).values()) == sorted([heads, width // heads, width])


def test_the_scale_of_attention_follows_the_width_of_a_head() -> None:
    """With as many heads as a head is wide, head_dim ** -0.5 is also width ** -0.25: until they are told apart."""
    combed = checked(Residual(16, 4, weights=True), TOKENS)
    (scale,) = combed.scales
    assert (scale.dim, scale.power) == (group(combed, "attn.in_proj_weight#3").axis, -0.5)
    assert not combed.plan({"a": range(12), "attn.in_proj_weight#2": [0, 1, 2]}).rescales


def test_a_constant_made_a_tensor_follows_the_width() -> None:
    """RAFT divides by `torch.sqrt(torch.tensor(channels))`; the layer before makes up for it."""

    def forward(net: Sketch, x: Tensor) -> Tensor:
        x = net.a(x)
        return net.b((x / torch.tensor(x.shape[1], dtype=torch.double).sqrt()).relu())

    combed = sketch(forward, a=conv(3, 8), b=conv(8, 5))
    assert group(combed, "a").exact
    plan = combed.plan({"a": [0, 5]})
    assert [(item.tensor, item.factor) for item in plan.rescales] == [("a.weight", 0.5), ("a.bias", 0.5)]


@pytest.mark.parametrize("keep", [{"attn.out_proj": [0, 1, 2]}, {"a": [0, 1, 2, 3], "attn.in_proj_weight#2": [1]}])
def test_attention_may_read_and_give_different_widths(keep: dict) -> None:
    model = dense(attention(batch_first=True))
    combed = cpd.comb(model, TOKENS)
    assert sizes(combed) == {"a": 8, "attn.in_proj_weight#2": 2, "attn.in_proj_weight#3": 4, "attn.out_proj": 8}
    plan = combed.plan(keep)
    shrunk = shrink(copy.deepcopy(model), plan)
    assert shrunk.attn.embed_dim == shrunk.a.out_features == len(plan.groups["a"])
    assert masked_error(model, shrunk, combed, plan) <= 1e-9


@pytest.mark.parametrize(
    ("weights", "bias", "batch_first"),
    [(False, True, True), (True, True, False), (True, False, True), (False, False, False)],
)
def test_self_attention(weights: bool, bias: bool, batch_first: bool) -> None:
    model = attention(weights=weights, bias=bias, batch_first=batch_first)
    combed = checked(model, TOKENS, batched=batch_first)
    assert sizes(combed) == {"a": 8, "attn.in_proj_weight#2": 2, "attn.in_proj_weight#3": 4, "attn.out_proj": 8}
    for share in (0.25, 0.5):
        plan = random_plan(combed, share, at_least=1)
        shrunk = shrink(copy.deepcopy(model), plan)
        heads, width = (len(plan.groups[f"attn.in_proj_weight#{number}"]) for number in (2, 3))
        assert (shrunk.attn.num_heads, shrunk.attn.embed_dim) == (heads, heads * width)
        assert shrunk.a.out_features == heads * width < 8


@pytest.mark.parametrize("weights", [False, (True)])
def test_attention_is_exact(weights: bool) -> None:
    combed = cpd.comb(dense(attention(weights=weights)), TOKENS)
    assert len(combed.open) == 4
    assert all(item.exact for item in combed.open)


@pytest.mark.parametrize(("weights", "batch_first"), [(False, True), (True, False)])
def test_cross_attention_with_other_widths_of_keys_and_values(weights: bool, batch_first: bool) -> None:
    def forward(self: Sketch, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(y), self.v(y)
        return self.out(self.attn(q, k, v, need_weights=weights)[0])

    model = Sketch(
        forward,
        q=nn.Linear(12, 8),
        k=nn.Linear(12, 6),
        v=nn.Linear(12, 10),
        attn=nn.MultiheadAttention(8, 2, kdim=6, vdim=10, batch_first=batch_first),
        out=nn.Linear(8, 5),
    )
    combed = checked(model, TOKENS, TOKENS.flip(0) * 0.5, batched=batch_first)
    found = sizes(combed)
    assert (found["q"], found["k"], found["v"]) == (8, 6, 10)
    assert sorted(found.values()) == [
        2,
        4,
        4,
        6,
        8,
        8,
        10,
    ]  # heads, their widths in q and in v, and the widths read and given
    plan = combed.plan({"k": [0, 5], "v": [1, 2, 3]})
    attn = shrink(copy.deepcopy(model), plan).attn
    assert (attn.kdim, attn.vdim, attn.embed_dim, attn.num_heads) == (2, 3, 8, 2)


@pytest.mark.parametrize(("batch_first", "norm_first"), [(True, False), (False, True)])
@pytest.mark.parametrize(
    "heads",
    [2, 4],
)
def test_an_encoder_layer(heads: int, batch_first: bool, norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, heads, 10, batch_first=batch_first, norm_first=norm_first)
    model = Sketch(
        lambda self, x: self.out(self.layer(self.a(x))), a=nn.Linear(12, 8), layer=layer, out=nn.Linear(8, 5)
    )
    combed = checked(model, TOKENS, batched=batch_first)
    assert sorted(sizes(combed).values()) == [2, 4, 8, 10]
    assert {item.name: item.exact for item in combed.open if item.name in ("a", "layer.linear1")} == {
        "a": False,
        "layer.linear1": True,
    }
    plan = random_plan(combed, 0.5)
    narrow = shrink(copy.deepcopy(model), plan).layer
    assert narrow.self_attn.embed_dim == narrow.linear1.in_features == narrow.norm1.normalized_shape[0] < 8


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_decoder_layer(batch_first: bool) -> None:
    """The keys and values of the second attention are demanded to be as wide as its queries: one group with them."""
    layer = nn.TransformerDecoderLayer(8, 4, 10, batch_first=batch_first)
    model = Sketch(
        lambda self, x, y: self.out(self.layer(self.a(x), self.b(y))),
        a=nn.Linear(12, 8),
        b=nn.Linear(12, 8),
        layer=layer,
        out=nn.Linear(8, 5),
    )
    combed = checked(model, TOKENS, TOKENS.flip(0) * 0.5, batched=batch_first)
    assert sorted(sizes(combed).values()) == [2, 2, 4, 4, 8, 10]
    assert group(combed, "layer.linear1").size == 10
    assert {"a.weight dim 0", "b.weight dim 0"} <= {str(member) for member in group(combed, "a").members}


# ---------------------------------------------------------------- attention whose constant no rows make up for


def test_attention_whose_query_no_rows_explain_is_inexact() -> None:
    """Neither q nor k are rows of a layer: both pass through an op that is not linear."""

    def forward(self: Sketch, x: Tensor) -> Tensor:
        q, k, v = F.gelu(self.q(x)), F.gelu(self.k(x)), self.v(x)
        return self.out(F.scaled_dot_product_attention(q, k, v))

    combed = sketch(forward, TOKENS, q=nn.Linear(12, 8), k=nn.Linear(12, 8), v=nn.Linear(12, 6), out=nn.Linear(6, 5))
    assert {item.name: (item.size, item.exact) for item in combed.open} == {"q": (8, False), "v": (6, True)}
    assert "a constant of the forward depends on this width" in group(combed, "q").inexact
    plan = combed.plan({"q": [0, 1, 5]})
    assert not plan.rescales


def test_a_key_makes_up_for_the_constant_where_the_query_cannot() -> None:
    def forward(self: Sketch, x: Tensor) -> Tensor:
        q, k, v = F.gelu(self.q(x)), self.k(x), self.v(x)
        return self.out(F.scaled_dot_product_attention(q, k, v))

    combed = sketch(forward, TOKENS, q=nn.Linear(12, 8), k=nn.Linear(12, 8), v=nn.Linear(12, 6), out=nn.Linear(6, 5))
    assert {item.name: (item.size, item.exact) for item in combed.open} == {"q": (8, True), "v": (6, True)}
    plan = combed.plan({"q": [0, 1]})
    assert {item.tensor for item in plan.rescales} == {"k.weight", "k.bias"}
    assert all(item.factor == pytest.approx(0.5) for item in plan.rescales)
