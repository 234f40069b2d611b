"""Op rules of whole families: Fourier transforms, indices, distances, computed weights, torchvision's ops."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.ops import DeformConv2d, ps_roi_align, roi_align, roi_pool

from cpd.surgery.shrink import shrink
from helpers.sketches import MAP, TOKENS, Sketch, between, checked, sketch
from helpers.zoo import conv, frozen, group, sizes

# ---------------------------------------------------------------- Fourier transforms and complex numbers


@pytest.mark.parametrize(
    "transform",
    [
        lambda y: torch.fft.irfft2(torch.fft.rfft2(y) * 2, s=y.shape[-2:]),
        lambda y: torch.fft.ifft(torch.fft.fft(y, dim=2), dim=2).real,
        lambda y: torch.fft.rfftn(y, dim=(2, 3)).abs(),
        lambda y: torch.fft.fftn(y, s=(8, 8)).imag,
        lambda y: torch.fft.fftshift(torch.fft.fft2(y), dim=(-2, -1)).angle(),
        lambda y: torch.fft.ifftshift(torch.fft.hfft(y), dim=-1),
        lambda y: torch.view_as_real(torch.fft.rfft(y)).sum(-1),
        lambda y: torch.polar(y.abs(), y).conj().real + torch.complex(y, y).imag,
        lambda y: torch.stft(
            y.flatten(0, 1).flatten(1), 8, window=torch.hann_window(8, dtype=y.dtype), return_complex=True
        ).abs().unflatten(0, (y.shape[0], -1)),
        lambda y: torch.istft(
            torch.stft(y.flatten(0, 1).flatten(1), 8, window=torch.ones(8, dtype=y.dtype), return_complex=True),
            8, window=torch.ones(8, dtype=y.dtype),
        ).view(y.shape[0], -1, 8, 8),
    ],
)  # fmt: skip
def test_fourier_transforms_over_space_leave_channels_open(transform: Callable[[Tensor], Tensor]) -> None:
    combed = between(transform)
    assert sizes(combed) == {"a": 8}
    assert not combed.unknown


def test_a_fourier_transform_over_channels_freezes_them() -> None:
    combed = between(lambda y: torch.fft.fft(y, dim=1).real)
    assert sizes(combed) == {}
    assert "a Fourier transform over it [fft_fft in the model, sketches.py:" in frozen(combed)["a"]


class GlobalFilter(nn.Module):
    """A gate on the frequencies of each channel, kept as pairs of numbers."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.stem, self.out = conv(3, channels), nn.Linear(channels, 5)
        self.gate = nn.Parameter(torch.randn(8, 5, channels, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        y = torch.fft.rfft2(x, dim=(1, 2), norm="ortho") * torch.view_as_complex(self.gate)
        return self.out(x + torch.fft.irfft2(y, s=(8, 8), dim=(1, 2), norm="ortho")).mean((1, 2))


def test_a_gate_on_frequencies_follows_its_channels() -> None:
    combed = checked(GlobalFilter(), MAP, train=True)
    assert sizes(combed) == {"stem": 8}
    assert "gate dim 2" in map(str, group(combed, "stem").members)
    assert combed.open[0].exact
    assert "the two parts of a complex number" in frozen(combed)["gate#3"]


class SpectralConvolution(nn.Module):
    """A complex weight [in, out, modes], whose product is written into the low frequencies of zeros."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.lift, self.mid, self.out = conv(3, channels), conv(6, 7), conv(7, 5)
        self.weight = nn.Parameter(torch.randn(channels, 6, 4, 4, dtype=torch.cdouble))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(self.lift(x))
        out = spectrum.new_zeros(x.shape[0], self.weight.shape[1], *spectrum.shape[2:])
        out[:, :, :4, :4] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, :4, :4], self.weight)
        return self.out(F.relu(self.mid(torch.fft.irfft2(out, s=x.shape[-2:]))))


def test_a_complex_weight_is_sliced_in_both_its_channels() -> None:
    model = SpectralConvolution()
    combed = checked(model, MAP)
    assert sizes(combed) == {"weight": 6, "lift": 8, "mid": 7}
    assert all(item.exact for item in combed.open)
    shrunk = shrink(copy.deepcopy(model), combed.plan({"lift": [0, 3, 5], "weight": [1, 2]}))
    assert shrunk.weight.shape == (3, 2, 4, 4)
    assert shrunk.weight.dtype == torch.cdouble
    assert torch.equal(shrunk.weight, model.weight[[0, 3, 5]][:, [1, 2]])


# ---------------------------------------------------------------- indices


def _written(y: Tensor) -> Tensor:
    y = y.clone()
    y[:, torch.tensor([0, 2])] = y[:, 1:3]
    return y


@pytest.mark.parametrize(
    "pick",
    [
        lambda y: y.index_add(1, torch.tensor([0, 2]), y[:, :2]),
        lambda y: y.index_copy(1, torch.tensor([0, 2]), y[:, :2]),
        lambda y: y.index_fill(1, torch.tensor([0, 2]), 0.0),
        lambda y: _written(y),
        lambda y: torch.select_scatter(y, y[:, 1], 1, 3),
        lambda y: torch.slice_scatter(y, y[:, :2], 1, 3, 5),
        lambda y: y.topk(2, dim=1)[0],
        lambda y: y.sort(dim=1)[0],
        lambda y: y.cummax(1)[0],
        lambda y: y.kthvalue(2, 1)[0],
        lambda y: y.median(1, keepdim=True)[0],
        lambda y: y.diff(dim=1),
        lambda y: torch.bucketize(y, torch.tensor([0.0, 0.5, 1.0], dtype=y.dtype)).to(y.dtype),
        lambda y: torch.linalg.cross(y[:, :3], y[:, 2:5], dim=1),
    ],
)
def test_positions_of_one_dimension_are_told_apart_and_the_channels_stay_open(pick: Callable) -> None:
    combed = sketch(lambda self, x: self.out(pick(self.a(x))), TOKENS, a=nn.Linear(12, 8), out=nn.Linear(8, 5))
    assert not combed.unknown
    assert sizes(combed) == {"a": 8}


class Gathered(nn.Module):
    """Tokens picked by a score, for all channels alike."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.score, self.out = nn.Linear(12, 8), nn.Linear(12, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        best = self.score(x).squeeze(-1).topk(3, dim=1).indices.unsqueeze(-1)
        x = self.embed(x)
        return self.out(torch.gather(x, 1, best.expand(-1, -1, x.shape[-1])) + torch.take_along_dim(x, best, 1))


def test_tokens_gathered_by_an_expanded_index_leave_channels_open() -> None:
    combed = checked(Gathered(), TOKENS)
    assert sizes(combed) == {"embed": 8}
    assert combed.open[0].exact


def test_tokens_scattered_by_an_expanded_index_leave_channels_open() -> None:
    class Scattered(Gathered):
        def forward(self, x: Tensor) -> Tensor:
            best = self.score(x).squeeze(-1).topk(3, dim=1).indices.unsqueeze(-1)
            x = self.embed(x)
            index = best.expand(-1, -1, x.shape[-1])
            return self.out(torch.zeros_like(x).scatter(1, index, x[:, :3]).scatter_add(1, index, x[:, 1:4]))

    combed = checked(Scattered(), TOKENS)
    assert sizes(combed) == {"embed": 8}


def test_what_is_picked_along_channels_freezes_them() -> None:
    for pick in (
        lambda y: y.gather(-1, torch.zeros(2, 5, 8, dtype=torch.long)),
        lambda y: y.scatter(-1, torch.zeros(2, 5, 8, dtype=torch.long), 1.0),
        lambda y: y.index_copy(-1, torch.tensor([0, 2]), y[..., :2]),
        lambda y: torch.select_scatter(y, y[..., 1], -1, 3),
        lambda y: y.masked_scatter(y > 0, y * 2),
    ):
        model = Sketch(lambda self, x, pick=pick: self.out(pick(self.a(x))), a=nn.Linear(12, 8), out=nn.Linear(8, 5))
        combed = checked(model, TOKENS, batched=False)
        assert sizes(combed) == {}
        assert "picked" in frozen(combed)["a"]


def test_a_number_written_under_a_mask_works_element_by_element() -> None:
    def forward(self: Sketch, x: Tensor) -> Tensor:
        y = self.a(x).clone()
        y[y < 0.1] = 0
        return self.out(y)

    assert sizes(sketch(forward, TOKENS, a=nn.Linear(12, 8), out=nn.Linear(8, 5))) == {"a": 8}


def test_an_expanded_number_is_no_zero() -> None:
    """What is expanded along channels stays at a removed one; a sum over it is inexact."""

    def forward(self: Sketch, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.out(y) + (y + self.b(x).expand(-1, -1, y.shape[-1])).sum(-1, keepdim=True)

    combed = sketch(forward, TOKENS, a=nn.Linear(12, 8), b=nn.Linear(12, 1), out=nn.Linear(8, 5))
    assert sizes(combed) == {"a": 8}
    assert not combed.open[0].exact


# ---------------------------------------------------------------- products and distances


def test_bilinear_sums_over_both_inputs() -> None:
    model = Sketch(
        lambda self, x: self.out(self.mix(self.a(x), self.b(x))),
        a=nn.Linear(12, 8), b=nn.Linear(12, 6), mix=nn.Bilinear(8, 6, 7), out=nn.Linear(7, 5),
    )  # fmt: skip
    combed = checked(model, TOKENS, train=True)
    assert sizes(combed) == {"a": 8, "b": 6, "mix": 7}
    assert all(item.exact for item in combed.open)
    assert combed.cost({}).macs == 10 * (12 * 8 + 12 * 6 + 8 * 6 * 7 + 7 * 5)
    shrunk = shrink(copy.deepcopy(model), combed.plan({"a": [0], "b": [1, 2], "mix": [3]}))
    assert (shrunk.mix.in1_features, shrunk.mix.in2_features, shrunk.mix.out_features) == (1, 2, 1)


@pytest.mark.parametrize(
    ("compare", "exact"),
    [
        (lambda a, b: F.cosine_similarity(a, b, dim=-1)[..., None], True),
        (lambda a, b: F.pairwise_distance(a, b, keepdim=True), False),  # it adds a small number to each difference
        (lambda a, b: torch.cdist(a, b), True),
        (lambda a, b: torch.linalg.vecdot(a, b)[..., None], True),
        (lambda a, b: torch.inner(a, b).flatten(2), True),
        (lambda a, b: torch.tensordot(a, b, dims=([2], [2])).flatten(2), True),
        (lambda a, b: torch.linalg.matmul(a, b.mT), True),
        (lambda a, b: torch.linalg.norm(a - b, dim=-1, keepdim=True), True),
        (lambda a, b: F.cosine_similarity(a.exp(), b, dim=-1)[..., None], False),
        (lambda a, b: (a - b).count_nonzero(-1)[..., None].to(a.dtype), True),
        (lambda a, b: (a - b).nanmean(-1, keepdim=True), False),
    ],
)
def test_distances_sum_over_the_channels(compare: Callable, exact: bool) -> None:
    model = Sketch(
        lambda self, x: compare(self.a(x), self.b(x)).sum((1, 2), keepdim=True) + self.c(x),
        a=nn.Linear(12, 8), b=nn.Linear(12, 8), c=nn.Linear(12, 5),
    )  # fmt: skip
    combed = checked(model, TOKENS, batched=False)
    assert sizes(combed) == {"a": 8}
    assert combed.open[0].exact is exact


# ---------------------------------------------------------------- recurrent cells


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_of_recurrent_layers(kind: type[nn.Module]) -> None:
    def forward(self: Sketch, x: Tensor) -> Tensor:
        state = self.first(x[:, 0])
        state = (state, state) if kind is nn.LSTMCell else state
        for step in self.a(x).unbind(1):
            state = self.cell(step, state)
        return self.out(state[0] if kind is nn.LSTMCell else state)

    model = Sketch(forward, a=nn.Linear(12, 8), first=nn.Linear(12, 6), cell=kind(8, 6), out=nn.Linear(6, 5))
    combed = checked(model, TOKENS, train=True)
    assert sizes(combed) == {"a": 8, "first": 6}
    assert all(item.exact for item in combed.open)
    shrunk = shrink(copy.deepcopy(model), combed.plan({"a": [0, 1], "first": [0, 1, 2]}))
    assert (shrunk.cell.input_size, shrunk.cell.hidden_size) == (2, 3)


# ---------------------------------------------------------------- layout


@pytest.mark.parametrize(
    ("join", "outputs"),
    [
        (lambda y: torch.hstack([y, y.relu()]), 16),
        (lambda y: torch.column_stack([y, y.relu()]), 16),
        (lambda y: torch.dstack([y, y.relu()]), 8),
        (lambda y: torch.vstack([y, y.relu()])[: y.shape[0]], 8),
        (lambda y: torch.cat(torch.broadcast_tensors(y, y[:, :, :1]), 1), 16),
        (lambda y: y.mean(2, keepdim=True).broadcast_to(y.shape), 8),
        (lambda y: torch.rot90(y, 1, (2, 3)), 8),
        (lambda y: y.swapaxes(1, 2).swapdims(1, 2), 8),
        (lambda y: torch.native_channel_shuffle(y, 2), 8),
        (lambda y: torch.cat(torch.unsafe_chunk(y, 2, 1), 1), 8),
        (lambda y: torch.cat([part.relu() for part in torch.dsplit(y, 2)], 2), 8),
        (lambda y: torch.permute_copy(y, (0, 1, 3, 2)), 8),
        (lambda y: torch.tril(y) + torch.triu(y, 1), 8),
        (lambda y: torch.diagonal(y, dim1=2, dim2=3)[..., None], 8),
        (lambda y: torch.atleast_3d(torch.fliplr(y.transpose(1, 2)).transpose(1, 2).flatten(2))[..., None], 8),
        (lambda y: F.pad(y[:, :, None], (1, 1, 1, 1, 0, 0), "reflect")[:, :, 0], 8),
    ],
)  # fmt: skip
def test_layouts(join: Callable[[Tensor], Tensor], outputs: int) -> None:
    combed = between(join, outputs)
    assert sizes(combed)
    assert not combed.unknown


class Repeated(nn.Module):
    """Keys of few groups repeated for several heads, their number given beside."""

    def __init__(self, heads: int = 8, groups: int = 4, dim: int = 6) -> None:
        super().__init__()
        self.heads, self.groups, self.times = heads, groups, heads // groups
        self.x, self.b, self.out = nn.Linear(12, heads * dim), nn.Linear(12, groups * dim), nn.Linear(heads * dim, 5)

    def forward(self, u: Tensor) -> Tensor:
        x = self.x(u).unflatten(-1, (self.heads, -1))
        b = self.b(u).unflatten(-1, (self.groups, -1)).repeat_interleave(self.times, dim=2, output_size=self.heads)
        return self.out((x * b.tanh()).flatten(2))


def test_the_size_of_repeated_channels_follows() -> None:
    model = Repeated()
    combed = checked(model, TOKENS)
    assert sorted(sizes(combed).values()) == [4, 6]
    heads = next(name for name, size in sizes(combed).items() if size == 4)
    shrunk = shrink(copy.deepcopy(model), combed.plan({heads: [0, 3]}))
    assert (shrunk.heads, shrunk.groups, shrunk.times) == (4, 2, 2)


# ---------------------------------------------------------------- computed weights


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_weights_by_direction_and_length(kind: type[nn.Module]) -> None:
    norm = parametrizations.weight_norm
    model = nn.Sequential(
        norm(kind(3, 8, 3, padding=1)), nn.ReLU(), norm(kind(8, 6, 3, padding=1)), nn.ReLU(), norm(conv(6, 5))
    )
    combed = checked(model, MAP, train=True)
    assert sorted(sizes(combed).values()) == [6, 8]
    exact = [item.exact for item in combed.open]  # of a transposed one the slices lie along what is read
    assert exact == ([False, False] if kind is nn.Conv2d else [False, True])
    assert "divided by the norm of what is removed" in combed.open[0].inexact
    first, second = sizes(combed)
    shrunk = shrink(copy.deepcopy(model), combed.plan({first: [0, 2, 3], second: [1, 4]}))
    assert (shrunk[2].in_channels, shrunk[2].out_channels) == (3, 2)
    members = {str(member) for item in combed.open for member in item.members if member.contracted}
    assert f"2.parametrizations.weight.original1 dim {int(kind is nn.Conv2d)}" in members


def test_the_input_side_of_a_weight_by_direction_and_length_is_exact() -> None:
    model = nn.Sequential(conv(3, 8), nn.ReLU(), parametrizations.weight_norm(conv(8, 5)))
    combed = checked(model, MAP)
    assert sizes(combed) == {"0": 8}
    assert combed.open[0].exact  # a zero adds nothing to the norm


def test_weights_divided_by_their_largest_singular_value() -> None:
    norm = parametrizations.spectral_norm
    model = nn.Sequential(
        norm(conv(3, 8, 3)), nn.LeakyReLU(0.2), norm(conv(8, 6, 3)), nn.Flatten(), norm(nn.Linear(384, 5))
    )  # fmt: skip
    combed = checked(model, MAP)
    assert sorted(sizes(combed).values()) == [6, 8]
    assert all(item.exact for item in combed.open)
    first, second = sizes(combed)
    shrunk = shrink(copy.deepcopy(model), combed.plan({first: [0, 2, 3], second: [1, 4]}))
    assert shrunk[2].parametrizations.weight[0]._v.shape == (27,)
    shrunk.train()(MAP).sum().backward()  # one more step of the power iteration


@pytest.mark.parametrize("kind", ["matrix_exp", "cayley", "householder"])
def test_an_orthogonal_weight_is_taken_as_a_whole_but_for_the_rows_of_its_base(kind: str) -> None:
    """The weight is a fixed base times an orthogonal matrix: an output that goes is a row of the base."""
    orthogonal = parametrizations.orthogonal
    model = nn.Sequential(nn.Linear(12, 8), orthogonal(nn.Linear(8, 8), orthogonal_map=kind), nn.Linear(8, 5))
    combed = checked(model, TOKENS)
    assert sizes(combed) == {"1.bias": 8}
    assert not combed.unknown
    assert combed.plan({"1.bias": [0, 3]}).kept["1.parametrizations.weight.0.base"][0].tolist() == [0, 3]
    model = nn.Sequential(
        nn.Linear(12, 8), orthogonal(nn.Linear(8, 8), orthogonal_map=kind, use_trivialization=False), nn.Linear(8, 5)
    )
    combed = checked(model, TOKENS)
    assert sizes(combed) == {}
    assert not combed.unknown


# ---------------------------------------------------------------- torchvision


BOXES = torch.tensor([[0.0, 1, 1, 6, 7], [0, 2, 0, 5, 5], [1, 0, 0, 7, 7]], dtype=torch.double)


@pytest.mark.parametrize("read", [roi_align, roi_pool])
def test_regions_leave_channels_open(read: Callable) -> None:
    model = Sketch(
        lambda self, x, boxes: self.out(read(self.a(x), boxes, output_size=(3, 3)).flatten(1)),
        a=conv(3, 8), out=nn.Linear(72, 5),
    )  # fmt: skip
    combed = checked(model, MAP, BOXES, batched=False)
    assert sizes(combed) == {"a": 8}
    assert combed.open[0].exact


def test_channels_of_each_place_of_a_region_go_together() -> None:
    model = Sketch(
        lambda self, x, boxes: self.out(ps_roi_align(self.a(x), boxes, 2).flatten(1)),
        a=conv(3, 16), out=nn.Linear(16, 5),
    )  # fmt: skip
    combed = checked(model, MAP, BOXES, batched=False)
    assert sizes(combed) == {"a": 4}
    assert "channels of each place of a region" in str(frozen(combed))
    assert combed.plan({"a": [1]}).kept["a.weight"][0].tolist() == [4, 5, 6, 7]


class Deformable(nn.Module):
    """A convolution that reads at offsets, with or without a mask."""

    def __init__(self, inputs: int, outputs: int, groups: int = 1, offset_groups: int = 1, mask: bool = True) -> None:
        super().__init__()
        self.mask, self.count = mask, 9 * offset_groups
        self.offset = nn.Conv2d(inputs, 27 * offset_groups, 3, padding=1)
        self.conv = DeformConv2d(inputs, outputs, 3, padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        offsets = self.offset(x)
        mask = offsets[:, 2 * self.count :].sigmoid() if self.mask else None
        return self.conv(x, offsets[:, : 2 * self.count], mask)


@pytest.mark.parametrize("mask", [True, False])
def test_deformable_convolutions(mask: bool) -> None:
    model = nn.Sequential(conv(3, 8), nn.ReLU(), Deformable(8, 6, mask=mask), nn.ReLU(), conv(6, 5))
    combed = checked(model, MAP)
    assert sizes(combed)["2.conv"] == 6
    assert sizes(combed)["0"] == 8
    assert combed.open[0].exact
    assert "offsets of a deformable convolution" in str(frozen(combed))
    assert combed.cost({}).macs == 128 * (3 * 8 + 8 * 27 * 9 + 8 * 6 * 9 + 6 * 5)
    shrunk = shrink(copy.deepcopy(model), combed.plan({"0": [0, 1], "2.conv": [2, 3, 4]}))
    assert shrunk[2].conv.weight.shape == (3, 2, 3, 3)


def test_groups_of_a_deformable_convolution() -> None:
    model = nn.Sequential(conv(3, 8), nn.ReLU(), Deformable(8, 8, groups=4, offset_groups=2), nn.ReLU(), conv(8, 5))
    combed = checked(model, MAP)
    assert "groups of offsets" in str(frozen(combed))
    assert combed.open_share["parameters"] > 0.5
    assert not combed.unknown


# ---------------------------------------------------------------- weights of bounded norm


class BoundedNorm(nn.Module):
    """A convolution whose rows are scaled down to a norm of at most one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 6), conv(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.renorm(self.b.weight, p=2, dim=0, maxnorm=1.0)
        return self.c(F.conv2d(self.a(x), weight, self.b.bias, padding=1))


def test_rows_of_bounded_norm_leave_both_sides_open_and_exact() -> None:
    combed = checked(BoundedNorm(), MAP)
    assert sizes(combed) == {"a": 8, "b": 6}
    assert all(found.exact for found in combed.open)


def test_what_is_divided_by_its_norm_stays_zero_where_it_is_removed() -> None:
    def forward(net: Sketch, x: Tensor) -> Tensor:
        query, key = (F.normalize(layer(x), dim=-1) for layer in (net.query, net.key))
        return net.out(x.transpose(1, 2) @ (query @ key.transpose(1, 2)))

    query, key, out = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(TOKENS.shape[1], 5)
    combed = checked(Sketch(forward, query=query, key=key, out=out), TOKENS)
    assert sizes(combed) == {"query": 8}
    assert combed.open[0].exact
