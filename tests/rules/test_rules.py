"""Op rules, one small module each: which groups an op leaves open, and that shrinking them is sound."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpd.surgery.shrink import shrink
from helpers.sketches import MAP, TOKENS, Sketch, between, checked, random, sketch
from helpers.zoo import conv, frozen, group, sizes

# ---------------------------------------------------------------- recurrent layers

KINDS = {"lstm": (nn.LSTM, 4), "gru": (nn.GRU, 3), "rnn": (nn.RNN, 1)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("layers", "bidirectional", "batch_first"), [(1, False, True), (2, False, False), (1, True, False), (2, True, True)]
)
def test_recurrent_layers(kind: str, layers: int, bidirectional: bool, batch_first: bool) -> None:
    make, gates = KINDS[kind]
    model = Sketch(
        lambda self, x: self.out(self.rnn(self.a(x))[0]),
        a=nn.Linear(12, 8),
        rnn=make(8, 6, layers, bidirectional=bidirectional, batch_first=batch_first),
        out=nn.Linear(12 if bidirectional else 6, 4),
    )
    combed = checked(model, TOKENS, batched=batch_first, train=True)
    hidden = "rnn.weight_ih_l0" if gates == 1 else "rnn.weight_ih_l0#2"
    assert sizes(combed) == {"a": 8, hidden: 6}
    assert all(item.exact for item in combed.open)
    if gates > 1:
        assert "gates of a recurrent layer" in frozen(combed)["rnn.weight_ih_l0"]
    shrunk = shrink(copy.deepcopy(model), combed.plan({"a": [0, 3, 5], hidden: [1, 2, 4, 5]}))
    assert (shrunk.rnn.input_size, shrunk.rnn.hidden_size) == (3, 4)
    assert shrunk.rnn.weight_ih_l0.shape == (4 * gates, 3)
    assert all(getattr(shrunk.rnn, f"weight_hh_l{layer}").shape == (4 * gates, 4) for layer in range(layers))
    if layers == 2:
        assert shrunk.rnn.weight_ih_l1.shape == (4 * gates, 8 if bidirectional else 4)
    if bidirectional:
        assert combed.plan({hidden: [1, 2]}).kept["out.weight"][1].tolist() == [1, 2, 7, 8]


@pytest.mark.parametrize("layers", [1, 2])
def test_a_projected_lstm_has_hidden_units_and_a_projection(layers: int) -> None:
    model = Sketch(
        lambda self, x: self.out(self.rnn(self.a(x))[0]),
        a=nn.Linear(12, 8),
        rnn=nn.LSTM(8, 6, layers, proj_size=4, batch_first=True),
        out=nn.Linear(4, 5),
    )
    combed = checked(model, TOKENS, train=True)
    assert sizes(combed) == {"a": 8, "rnn.weight_ih_l0#2": 6, "rnn.weight_hr_l0": 4}
    shrunk = shrink(copy.deepcopy(model), combed.plan({"rnn.weight_ih_l0#2": [0, 1, 4], "rnn.weight_hr_l0": [1, 3]}))
    assert (shrunk.rnn.hidden_size, shrunk.rnn.proj_size, shrunk.out.in_features) == (3, 2, 2)
    assert shrunk.rnn.weight_hr_l0.shape == (2, 3)


def test_states_of_a_recurrent_layer_are_as_wide_as_its_units() -> None:
    def forward(self: Sketch, x: Tensor) -> Tensor:
        first = self.h(x.mean(1))[None], self.c(x.mean(1))[None]
        y, (h, c) = self.rnn(x, first)
        return self.out(y) + self.last(torch.cat([h[-1], c[0]], -1))[:, None]

    combed = checked(
        Sketch(
            forward,
            h=nn.Linear(12, 6),
            c=nn.Linear(12, 6),
            rnn=nn.LSTM(12, 6, batch_first=True),
            out=nn.Linear(6, 5),
            last=nn.Linear(12, 5),
        ),
        TOKENS,
        train=True,
    )
    assert sizes(combed) == {"h": 6}
    members = {str(member) for member in group(combed, "h").members}
    assert {"h.weight dim 0", "c.weight dim 0", "rnn.weight_hh_l0 dim 1", "last.weight dim 1"} <= members
    assert combed.plan({"h": [2]}).kept["last.weight"][1].tolist() == [2, 8]
    shrunk = shrink(copy.deepcopy(combed.model), combed.plan({"h": [0, 2]}))
    assert (shrunk.rnn.hidden_size, shrunk.rnn.input_size) == (2, 12)


def test_a_recurrent_layer_whose_state_is_the_input_is_frozen() -> None:
    model = Sketch(
        lambda self, x, h: self.out(self.rnn(self.a(x), h)[0]),
        a=nn.Linear(12, 8),
        rnn=nn.GRU(8, 6, batch_first=True),
        out=nn.Linear(6, 5),
    )
    combed = checked(model, TOKENS, random(1, 2, 6), batched=False)
    assert sizes(combed) == {"a": 8}
    assert "a state of fixed width" in frozen(combed)["rnn.weight_ih_l0#2"]


# ---------------------------------------------------------------- windows


def test_unfold_carries_each_channel_once_a_kernel_position() -> None:
    combed = sketch(
        lambda self, x: self.out(F.unfold(self.a(x), 3, padding=1).transpose(1, 2)), a=conv(3, 4), out=nn.Linear(36, 5)
    )
    assert sizes(combed) == {"a": 4}
    assert combed.plan({"a": [1]}).kept["out.weight"][1].tolist() == list(range(9, 18))


def test_fold_takes_whole_windows() -> None:
    combed = sketch(
        lambda self, x: self.out(F.fold(self.a(x).flatten(2), (16, 16), 2, stride=2)), a=conv(3, 16), out=conv(4, 5)
    )
    assert sizes(combed) == {"a": 4}
    assert combed.plan({"a": [0, 3]}).kept["a.weight"][0].tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert "becomes space" in frozen(combed)["a#2"]


def test_fold_of_unfold() -> None:
    combed = between(lambda y: F.fold(F.unfold(y, 3, padding=1), (8, 8), 3, padding=1))
    assert sizes(combed) == {"a": 8}


def test_windows_along_space_leave_channels_open_and_windows_over_channels_do_not() -> None:
    assert sizes(between(lambda y: y.unfold(2, 4, 2).sum(-1))) == {"a": 8}
    combed = between(lambda y: y.unfold(1, 4, 4).sum(-1), outputs=2)
    assert sizes(combed) == {}
    assert "cut into windows [unfold in the model, sketches.py:" in frozen(combed)["a"]


# ---------------------------------------------------------------- repeated, gated, shuffled channels


@pytest.mark.parametrize("gate", [lambda y: F.glu(y, dim=1), lambda y: F.glu(y, dim=-3), nn.GLU(1)])
def test_glu_loses_the_same_positions_of_both_halves(gate: Callable[[Tensor], Tensor]) -> None:
    combed = between(gate, outputs=4)
    assert sizes(combed) == {"a": 4}
    assert combed.open[0].exact
    assert combed.plan({"a": [0, 2]}).kept["a.weight"][0].tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize(
    ("repeat", "kept"),
    [
        (lambda y: y.repeat_interleave(3, dim=1), [6, 7, 8, 15, 16, 17]),
        (lambda y: torch.repeat_interleave(y, 3, -3), [6, 7, 8, 15, 16, 17]),
        (lambda y: y.repeat(1, 3, 1, 1), [2, 5, 10, 13, 18, 21]),
        (lambda y: y.tile(1, 3, 1, 1), [2, 5, 10, 13, 18, 21]),
        (lambda y: torch.tile(y, (3, 1, 1)), [2, 5, 10, 13, 18, 21]),
    ],
)
def test_repeated_channels_go_together(repeat: Callable[[Tensor], Tensor], kept: list[int]) -> None:
    combed = between(repeat, outputs=24)
    assert sizes(combed) == {"a": 8}
    assert combed.plan({"a": [2, 5]}).kept["out.weight"][1].tolist() == kept


def test_channels_repeated_as_a_tensor_says_are_frozen() -> None:
    times = torch.tensor([1, 2, 1, 2, 1, 1, 1, 1])
    combed = between(lambda y: y.repeat_interleave(times, dim=1, output_size=10), outputs=10)
    assert sizes(combed) == {}
    assert "repeated as a tensor says" in frozen(combed)["a"]


def test_channel_shuffle_keeps_its_groups() -> None:
    combed = between(nn.ChannelShuffle(2))
    assert sizes(combed) == {"a#2": 4}
    assert "groups of a channel shuffle" in frozen(combed)["a"]
    plan = combed.plan({"a#2": [0, 3]})
    assert plan.kept["a.weight"][0].tolist() == [0, 3, 4, 7]
    assert plan.kept["out.weight"][1].tolist() == [0, 1, 6, 7]


# ---------------------------------------------------------------- order and indices


@pytest.mark.parametrize(
    ("over_space", "over_channels"),
    [
        (lambda y: y.cumsum(2), lambda y: y.cumsum(1)),
        (lambda y: y.cumsum(-1), lambda y: y.cumsum(-3)),
        (lambda y: y.index_select(2, torch.tensor([0, 5, 3])), lambda y: y.index_select(1, torch.arange(8).flip(0))),
        (
            lambda y: y.argmax(2, keepdim=True).double(),
            lambda y: y.argmax(1, keepdim=True).expand(-1, 8, -1, -1).double(),
        ),
    ],
)
def test_order_over_space_leaves_channels_open(over_space: Callable, over_channels: Callable) -> None:
    assert sizes(between(over_space)) == {"a": 8}
    combed = sketch(
        lambda self, x: self.out(over_channels(self.a(x))).mean((1, 2, 3), keepdim=True) + self.b(x),
        a=conv(3, 8),
        out=conv(8, 5),
        b=conv(3, 5),
    )
    assert "a" not in sizes(combed)
    assert "by their" in frozen(combed)["a"]
    assert not combed.unknown


def test_an_index_that_is_a_buffer_is_frozen_and_no_channels_with_it() -> None:
    model = Sketch(lambda self, x: self.out(self.a(x).index_select(2, self.places)), a=conv(3, 8), out=conv(8, 5))
    model.register_buffer("places", torch.tensor([0, 5, 3]))
    combed = checked(model, MAP)
    assert sizes(combed) == {"a": 8}


def test_topk_freezes_what_it_picks_from() -> None:
    combed = sketch(
        lambda self, x: self.out(self.a(x).topk(3, dim=1)[0]) + self.end(self.b(x)),
        a=conv(3, 8),
        out=conv(3, 5),
        b=conv(3, 6),
        end=conv(6, 5),
    )
    assert sizes(combed) == {"b": 6}
    assert "single channels are picked, ordered or written to [topk in the model" in frozen(combed)["a"]


def test_grid_sample_reads_space_and_leaves_channels_open() -> None:
    class Warp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out = conv(3, 8), conv(8, 5)
            self.register_buffer("grid", random(1, 5, 6, 2).tanh())

        def forward(self, x: Tensor) -> Tensor:
            grid = self.grid.expand(x.shape[0], -1, -1, -1)
            return self.out(F.grid_sample(self.a(x), grid, align_corners=False))

    combed = checked(Warp(), MAP)
    assert sizes(combed) == {"a": 8}
    assert "space that is resampled" in frozen(combed)["grid"]


# ---------------------------------------------------------------- created tensors


@pytest.mark.parametrize(
    "create",
    [
        lambda self, y: torch.zeros(y.shape[0], self.width, 1, 1, dtype=torch.double),
        lambda self, y: torch.ones((y.shape[0], self.width, 8, 8), dtype=torch.double),
        lambda self, y: y.new_zeros(1, self.width, 1, 1),
        lambda self, y: y.new_full((self.width, 1, 1), 0.5),
        lambda self, y: torch.full(size=(self.width, 1, 1), fill_value=2.0, dtype=torch.double),
    ],
)
def test_a_created_tensor_follows_an_attribute(create: Callable) -> None:
    def forward(self: Sketch, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.out(y + create(self, y))

    model = Sketch(forward, a=conv(3, 8), out=conv(8, 5), width=8)
    combed = checked(model, MAP, train=True)
    assert sizes(combed) == {"a": 8}
    assert shrink(copy.deepcopy(model), combed.plan({"a": [0, 3, 4]})).width == 3


def test_a_created_tensor_of_a_literal_width_freezes() -> None:
    combed = sketch(
        lambda self, x: self.out(self.a(x) + torch.zeros(8, 1, 1, dtype=torch.double)), a=conv(3, 8), out=conv(8, 5)
    )
    assert sizes(combed) == {}
    assert "the forward names the width 8" in frozen(combed)["a"]
    assert "[zeros in the model, sketches.py:" in frozen(combed)["a"]


# ---------------------------------------------------------------- unequal pieces


def unequal(width: int, cut: Callable[[Sketch, Tensor], tuple[Tensor, ...]], **attributes: int) -> Sketch:
    """A layer cut into pieces, each read by a layer of its own."""
    pieces = cut(Sketch(cut, **attributes), torch.zeros(1, width))
    readers = {f"b{index}": conv(piece.shape[1], 5) for index, piece in enumerate(pieces)}

    def forward(self: Sketch, x: Tensor) -> Tensor:
        return sum(getattr(self, f"b{index}")(piece) for index, piece in enumerate(cut(self, self.a(x))))

    return Sketch(forward, a=conv(3, width), **readers, **attributes)


@pytest.mark.parametrize(("width", "chunks"), [(10, 3), (11, 3), (11, 4), (7, 2)])
def test_unequal_chunks_stay_as_chunk_would_cut_them(width: int, chunks: int) -> None:
    """For every number of positions that a plan may ask for in each piece, `torch.chunk` gives what the plan gives."""
    model = unequal(width, lambda self, y: y.chunk(chunks, 1))
    combed = checked(model, MAP, train=True)
    pieces = [piece.numel() for piece in torch.arange(width).chunk(chunks)]
    assert list(sizes(combed).values()) == pieces
    assert pieces[0] != pieces[-1]
    narrowed = set()
    for asked in itertools.product(*(range(1, size + 1) for size in pieces)):
        plan = combed.plan({item.name: range(kept) for item, kept in zip(combed.open, asked, strict=True)})
        given = [len(plan.groups[item.name]) for item in combed.open]
        assert given == [piece.numel() for piece in torch.arange(sum(given)).chunk(chunks)]
        assert all(more >= less for more, less in zip(given, asked, strict=True))
        narrowed.add(given[0] - given[-1])
    assert narrowed == set(range(min(chunks, pieces[0])))


def test_chunk_that_gives_fewer_pieces_than_asked_for_freezes() -> None:
    combed = checked(unequal(9, lambda self, y: y.chunk(4, 1)), MAP)
    assert sizes(combed) == {}
    assert "chunk gives fewer pieces than asked for" in frozen(combed)["a"]


def test_split_by_one_size_leaves_a_rest() -> None:
    model = unequal(10, lambda self, y: y.split(self.size, 1), size=4)
    combed = checked(model, MAP)
    assert list(sizes(combed).values()) == [4, 4, 2]
    for asked in itertools.product(range(1, 5), range(1, 5), range(1, 3)):
        plan = combed.plan({item.name: range(kept) for item, kept in zip(combed.open, asked, strict=True)})
        given = [len(plan.groups[item.name]) for item in combed.open]
        assert given[0] == given[1] >= given[2]
        new = {item.name: item.new for item in plan.attributes}.get("size", 4)
        assert given == [piece.numel() for piece in torch.arange(sum(given)).split(new)]


# ---------------------------------------------------------------- channels as space


@pytest.mark.parametrize("options", [{}, {"padding": "same"}, {"padding": "valid"}])
def test_a_kernel_of_one_position_leaves_its_space_open(options: dict) -> None:
    combed = sketch(
        lambda self, x: self.out(self.mix(self.a(x))),
        TOKENS,
        a=nn.Linear(12, 8),
        mix=nn.Conv1d(5, 6, 1, **options),
        out=nn.Linear(8, 4),
    )
    assert sizes(combed) == {"a": 8}
    assert combed.open[0].exact


@pytest.mark.parametrize("options", [{"kernel_size": 3, "padding": 1}, {"kernel_size": 1, "stride": 2}])
def test_other_kernels_freeze_their_space_for_a_visible_reason(options: dict) -> None:
    mix = nn.Conv1d(5, 6, **options)
    combed = sketch(
        lambda self, x: self.out(self.mix(self.a(x))),
        TOKENS,
        a=nn.Linear(12, 8),
        mix=mix,
        out=nn.Linear(8 // mix.stride[0], 4),
    )
    assert sizes(combed) == {}
    assert "the space of a convolution [conv1d in mix, sketches.py:" in frozen(combed)["a"]


# ---------------------------------------------------------------- norms


class Standardised(nn.Conv2d):
    """A convolution whose weight is normalised by its own statistics, as timm's `StdConv2d`."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0, eps=1e-6
        )
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


def test_standardised_weights_are_inexact_in_what_they_read() -> None:
    model = Sketch(
        lambda self, x: self.out(self.b(F.relu(self.a(x)))),
        a=conv(3, 8),
        b=Standardised(8, 6, 3, padding=1),
        out=conv(6, 5),
    )
    combed = checked(model, MAP, train=True)
    assert {item.name: (item.size, item.exact) for item in combed.open} == {"a": (8, False), "b": (6, True)}
    assert "[batch_norm in b, test_rules.py:" in group(combed, "a").inexact
    assert shrink(copy.deepcopy(model), combed.plan({"b": [0, 1]})).b.out_channels == 2


@pytest.mark.parametrize(
    "norm",
    [
        lambda y: torch.linalg.vector_norm(y, dim=1, keepdim=True),
        lambda y: y.norm(dim=1, keepdim=True),
        lambda y: y.norm(p=1, dim=1, keepdim=True),
        lambda y: torch.linalg.vector_norm(y, ord=float("inf"), dim=1, keepdim=True),
        lambda y: torch.linalg.vector_norm(y, dim=(1, 2, 3), keepdim=True),
    ],
)
def test_a_norm_over_channels_is_exact(norm: Callable[[Tensor], Tensor]) -> None:
    combed = between(lambda y: y / norm(y))
    assert sizes(combed) == {"a": 8}
    assert combed.open[0].exact


@pytest.mark.parametrize("order", [-float("inf"), -1])
def test_a_norm_that_a_zero_makes_zero_is_inexact(order: float) -> None:
    """With a negative order the norm is the least of the channels, or zero where one of them is."""
    combed = between(lambda y: y + torch.linalg.vector_norm(y, ord=order, dim=1, keepdim=True))
    assert sizes(combed) == {"a": 8}
    assert not combed.open[0].exact


def test_a_clipped_zero_may_be_no_zero() -> None:
    combed = between(lambda y: y + F.hardtanh(y, 0.5, 2.0).sum(1, keepdim=True))
    assert not combed.open[0].exact


# ---------------------------------------------------------------- regions and unknown ops


@pytest.mark.parametrize("region", [torch.no_grad, lambda: torch.autocast("cpu", enabled=False)])
def test_regions_are_seen_through(region: Callable) -> None:
    def forward(self: Sketch, x: Tensor) -> Tensor:
        y = self.a(x)
        with region():
            y = F.relu(self.b(y)) + y.mean(1, keepdim=True)
        return self.out(y)

    model = Sketch(forward, a=conv(3, 8), b=conv(8, 6), out=conv(6, 5))
    combed = checked(model, MAP)
    assert {item.name: (item.size, item.exact) for item in combed.open} == {"a": (8, False), "b": (6, True)}
    assert not combed.unknown


@torch.library.custom_op("cpd_test_rules::twist", mutates_args=())
def twist(x: Tensor) -> Tensor:
    """An op that cpd has never heard of."""
    return x.flip(1) * 2


@twist.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_unknown_op_freezes_what_it_touches_and_is_listed() -> None:
    combed = sketch(lambda self, x: self.out(self.b(twist(self.a(x)))), a=conv(3, 8), b=conv(8, 6), out=conv(6, 5))
    assert combed.unknown == ("cpd_test_rules.twist.default",)
    assert "no rule for cpd_test_rules.twist.default [twist in the model, sketches.py:" in frozen(combed)["a"]
    assert sizes(combed) == {"b": 6}


def test_tensor_split_at_places_in_digits_leaves_the_last_piece_open() -> None:
    def forward(self: Sketch, x: Tensor) -> Tensor:
        a, _, c = self.a(x).tensor_split((3, 5), dim=1)
        return self.out(torch.cat([c, a.relu()], 1))

    combed = sketch(forward, a=conv(3, 8), out=conv(6, 5))
    assert sizes(combed) == {"a#3": 3}
    assert "the forward names the width 3" in frozen(combed)["a"]


def test_tensor_split_into_a_number_of_pieces_is_frozen() -> None:
    def forward(self: Sketch, x: Tensor) -> Tensor:
        a, _, c = self.a(x).tensor_split(3, dim=1)
        return self.out(torch.cat([c, a.relu()], 1))

    combed = sketch(forward, a=conv(3, 8), out=conv(5, 5))
    assert "need not be equal" in frozen(combed)["a"]


def test_a_slice_set_to_zero() -> None:
    def forward(self: Sketch, x: Tensor) -> Tensor:
        y = self.a(x).clone()
        y[:, 2:4].zero_()
        return self.out(y)

    assert sizes(sketch(forward, a=conv(3, 8), out=conv(8, 5))) == {"a#3": 4}
