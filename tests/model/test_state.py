"""What a forward keeps: combed as if the model had never run, put back after each run, emptied when widths change."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import cpd
from cpd.coupling.comb import Comb
from cpd.model.inputs import Call
from cpd.model.state import cold, forget, preserved
from cpd.model.tensors import copy_of
from cpd.plan import Cache, Plan
from cpd.surgery.masked import masked_error
from helpers.zoo import dense


def table_of(x: Tensor) -> Tensor:
    """A number for each place of a map [B, C, H, W]."""
    height, width = x.shape[2:]
    return torch.arange(height * width).type_as(x).view(height, width) * 2


class Head(nn.Module):
    """Two convolutions; what the first forward makes is added to their result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def table(self, x: Tensor) -> Any:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.conv(x)) + self.table(x)


class KeptByShape(Head):
    grid, shape = torch.empty(0), None

    def table(self, x: Tensor) -> Tensor:
        if self.shape != x.shape:  # the channels among its sizes
            self.grid, self.shape = table_of(x), x.shape
        return self.grid


class KeptByValue(Head):
    def __init__(self) -> None:
        super().__init__()
        self.stride, self.grid, self.other, self.shape = torch.tensor([2.0, 4.0]), torch.empty(0), torch.empty(0), None

    def table(self, x: Tensor) -> Tensor:
        if self.shape != x.shape[2:]:
            self.grid, self.other = table_of(x) * float(self.stride[0]), table_of(x) + 1
            self.shape = x.shape[2:]
        return self.grid + self.other


class KeptByFlag(Head):
    def __init__(self) -> None:
        super().__init__()
        self.ready = False

    def table(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.grid, self.ready = table_of(x), True
        return self.grid


class KeptByLength(Head):
    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def table(self, x: Tensor) -> Tensor:
        if x.shape[2] > self.length:
            self.length, self.grid = x.shape[2], table_of(x)
        return self.grid


class KeptInNewAttribute(Head):
    def table(self, x: Tensor) -> Tensor:
        if not hasattr(self, "mesh"):
            self.mesh = table_of(x)
        return self.mesh


class KeptInNone(Head):
    def __init__(self) -> None:
        super().__init__()
        self.grid: Tensor | None = None

    def table(self, x: Tensor) -> Tensor:
        if self.grid is None:
            self.grid = table_of(x)
        return self.grid


class KeptInDict(Head):
    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[Any, Tensor] = {}

    def table(self, x: Tensor) -> Tensor:
        if x.device not in self.cache:
            self.cache[x.device] = table_of(x)
        return self.cache[x.device]


class KeptInList(Head):
    def __init__(self) -> None:
        super().__init__()
        self.grids = [torch.empty(0)]

    def table(self, x: Tensor) -> Tensor:
        if self.grids[0].shape[-2:] != x.shape[-2:]:
            self.grids[0] = table_of(x)
        return self.grids[0]


class KeptByClass(Head):
    cache: dict[str, Tensor] = {}  # noqa: RUF012

    def table(self, x: Tensor) -> Tensor:
        if "table" not in self.cache:
            self.cache["table"] = table_of(x)
        return self.cache["table"]


@functools.lru_cache
def remembered(height: int, width: int) -> Tensor:
    """A table that a function remembers."""
    return torch.arange(height * width).view(height, width)


class KeptByFunction(Head):
    def table(self, x: Tensor) -> Tensor:
        return remembered(*x.shape[2:])


class KeptInBuffer(Head):
    def table(self, x: Tensor) -> Tensor:
        if "grid" not in self._buffers:
            self.register_buffer("grid", table_of(x), persistent=False)
        return self.grid


class KeptOfParameter(Head):
    """In eval mode, twice a parameter is computed once a device."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.cache = nn.Parameter(torch.randn(8)), dict[Any, Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        if self.training or x.device not in self.cache:
            self.cache = {x.device: self.bias * 2}
        return self.out(self.conv(x) * self.cache[x.device][:, None, None])


class KeptOfWidth(Head):
    """A table of the channels that the first forward makes: of fewer channels it would be another."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.places is None:
            self.places = torch.arange(x.shape[1]).type_as(x)[:, None, None]
        return self.out(self.conv(x) + self.places)


class KeepsLast(Head):
    """Keeps its last input, as a hook would."""

    def table(self, x: Tensor) -> int:
        self.last = x
        return 0


class KeptByHooks(Head):
    """Watches its first layer by a hook that the first forward registers, and notes that it has."""

    def table(self, x: Tensor) -> Tensor:
        if not getattr(self, "watching", False):
            self.conv.register_forward_hook(lambda module, args, output: self.seen().append(output))
            self.watching = True
        self.seen().clear()
        self.conv(x)
        return torch.stack(self.seen()).sum(0).mean(1, keepdim=True)

    def seen(self) -> list[Tensor]:
        return SEEN


SEEN: list[Tensor] = []
HEADS = [
    KeptByShape, KeptByValue, KeptByFlag, KeptByLength, KeptInNewAttribute, KeptInNone, KeptInDict, KeptInList,
    KeptByClass, KeptByFunction, KeptInBuffer, KeptOfParameter, KeptOfWidth, KeepsLast,
    KeptByHooks,
]  # fmt: skip
X = torch.randn(1, 3, 4, 4, dtype=torch.double)


def net(head: type[Head]) -> nn.Sequential:
    KeptByClass.cache.clear()
    remembered.cache_clear()
    return dense(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 1), nn.ReLU(), head()))


def run(model: nn.Module, how: str) -> None:
    if how == "train":
        model.train()(X)
        model.eval()
    elif how != "cold":
        with torch.set_grad_enabled(how == "grad"):
            model(X)


def attributes(model: nn.Module) -> dict[tuple[str, ...], int]:
    """Every attribute of every module, and every item of the dicts and lists among them, by identity."""
    found: dict[tuple[str, ...], int] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            found[path, name] = id(value)
            items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
            found.update({(path, name, str(key)): id(item) for key, item in items})
    return found


def groups(comb: Comb) -> list[tuple]:
    return [(g.name, g.size, g.minimum, g.frozen is None, g.exact, g.members) for g in comb.groups]


@pytest.mark.parametrize("how", ["no_grad", "grad", "train"])
@pytest.mark.parametrize("head", HEADS)
def test_a_model_that_has_run_is_combed_as_if_it_had_not(head: type[Head], how: str) -> None:
    new = groups(cpd.comb(net(head), X))
    model = net(head)
    run(model, how)
    before = attributes(model)
    assert groups(cpd.comb(model, X)) == new
    assert attributes(model) == before
    assert type(model(X)) is Tensor


@pytest.mark.parametrize("head", HEADS)
def test_all_but_a_table_of_the_channels_is_open(head: type[Head]) -> None:
    combed = cpd.comb(net(head), X)
    assert [group.size for group in combed.open] == ([6] if head is KeptOfWidth else [6, 8, 8])


@pytest.mark.parametrize("how", ["cold", "grad"])
@pytest.mark.parametrize("head", HEADS)
def test_what_was_kept_at_the_old_widths_is_not_used_at_the_new(head: type[Head], how: str) -> None:
    model = net(head)
    run(model, how)
    combed = cpd.comb(model, X)
    plan = combed.plan({group.name: range(group.size // 2) for group in combed.open})
    narrow = copy_of(model)
    narrow(X)  # whatever it keeps, it keeps now
    cpd.shrink(narrow, plan)
    assert masked_error(model, narrow, combed, plan) <= 1e-9
    assert Plan.from_dict(plan.to_dict()).caches == plan.caches


@pytest.mark.parametrize("head", [KeptByShape, KeptInNone, KeptInDict, KeptInList, KeptInBuffer, KeptOfParameter])
def test_export_and_compress_leave_what_a_model_keeps(head: type[Head]) -> None:
    model = net(head).float()
    model(X.float())
    before = attributes(model)
    cpd.export_onnx(model, X.float())
    assert attributes(model) == before
    cpd.compress(model, target_params=0.8, example_inputs=X.float(), round_to=1, progress=False)
    assert attributes(model) == before


LEVELS = [torch.tensor([2.0]).double()]


class Level(Head):
    """Reads a tensor that its file keeps in a list."""

    def table(self, x: Tensor) -> Tensor:
        return LEVELS[0]


def test_a_table_of_constants_in_a_file_is_no_cache() -> None:
    level = LEVELS[0]
    combed = cpd.comb(net(Level), X)
    assert [group.size for group in combed.open] == [6, 8, 8]
    assert LEVELS[0] is level


class KeptBesideSettings(KeptByShape):
    """Has settings of the kind of its key, which only other methods read."""

    def __init__(self) -> None:
        super().__init__()
        self.resolution, self.strides = (4, 4), (8, 16)


def test_settings_that_are_no_key_stay() -> None:
    model = net(KeptBesideSettings)
    model(X)
    combed = cpd.comb(model, X)
    cpd.shrink(model, combed.plan({"0": range(3)}))
    assert (model[-1].resolution, model[-1].strides) == ((4, 4), (8, 16))


class Scaled(Head):
    """Reads a tensor, and settings that could be a key."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shape, self.count = torch.tensor([2.0]).double(), (1, 2), 3

    def table(self, x: Tensor) -> Tensor:
        return self.scale


def test_what_a_forward_needs_is_no_cache() -> None:
    model = net(Scaled)
    copied, emptied = cold(model, Call((X,), {}))
    assert emptied == []
    assert torch.equal(copied(X), model(X))


def test_a_recurrent_layer_keeps_its_list_of_weights() -> None:
    _, emptied = cold(nn.LSTM(4, 6, batch_first=True), Call((torch.randn(1, 3, 4),), {}))
    assert emptied == []


def test_an_exception_leaves_the_model_as_it_was() -> None:
    model = net(KeptInNone)

    def fails() -> None:
        with preserved(model):
            model(X)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert model[-1].grid is None


# ---------------------------------------------------------------- buffers that a forward writes


class Averages(nn.Module):
    """Keeps a mean of its channels in a buffer, assigned or written in place, and reads it or not."""

    def __init__(self, assigned: bool, read: bool) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.assigned, self.read = assigned, read
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.assigned:
            self.mean = self.mean * 0.9 + x.mean((0, 2, 3))
        else:
            self.mean.mul_(0.9).add_(x.mean((0, 2, 3)))
        return self.out(x * self.mean[:, None, None] if self.read else x)


@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("assigned", [False, True])
def test_a_buffer_that_a_forward_writes_narrows_with_what_it_is_written_of(assigned: bool, read: bool) -> None:
    model = dense(Averages(assigned, read))
    before = model.mean.clone()
    combed = cpd.comb(model, X)
    assert torch.equal(model.mean, before)
    assert [group.size for group in combed.open] == [8]
    narrow = cpd.shrink(copy_of(model), combed.plan({"conv": range(5)}))
    assert narrow.mean.shape == (5,)
    assert narrow(X).shape == (1, 4, 4, 4)


# ---------------------------------------------------------------- copies


def masked() -> nn.Sequential:
    model = net(KeptInNone)
    prune.ln_structured(model[0], "weight", amount=0.25, n=2, dim=0)
    return model


def normed() -> nn.Sequential:
    model = net(KeptInNone)
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model[0])
    return model


def spectral() -> nn.Sequential:
    model = net(KeptInNone)
    nn.utils.spectral_norm(model[2])
    model.train()(X).sum().backward()
    return model.eval()


@pytest.mark.parametrize("how", ["cold", "no_grad", "grad"])
@pytest.mark.parametrize("make", [masked, normed, spectral])
def test_weights_that_hooks_compute(make: Callable[[], nn.Sequential], how: str) -> None:
    model = make()
    run(model, how)
    combed = cpd.comb(model, X)
    assert [group.size for group in combed.open] == [6, 8, 8]
    plan = combed.plan({group.name: range(group.size // 2) for group in combed.open})
    narrow = cpd.shrink(copy_of(model), plan)
    assert narrow[0].out_channels == narrow[0].weight.shape[0] == 3
    assert masked_error(model, narrow, combed, plan) <= 1e-9
    narrow.train()(X).sum().backward()


# ---------------------------------------------------------------- tensors that are plain attributes


class Tabled(nn.Module):
    """Adds a table that is a plain attribute, no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down, self.head = (nn.Linear(*sizes) for sizes in ((5, 8), (8, 12), (12, 8), (8, 3)))
        self.places = torch.randn(1, 6, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.places.detach().clone().to(x)
        return self.head((x + self.down(torch.relu(self.up(x)))).mean(1))


def test_a_table_in_a_plain_attribute_narrows_as_a_buffer_does() -> None:
    model, x = dense(Tabled()), torch.randn(1, 6, 5, dtype=torch.double)
    combed = cpd.comb(model, x)
    assert [group.size for group in combed.open] == [8, 12]
    plan = combed.plan({"embed": range(5), "up": range(7)})
    narrow = cpd.shrink(copy_of(model), plan)
    assert narrow.places.shape == (1, 6, 5)
    assert model.places.shape == (1, 6, 8)
    assert masked_error(model, narrow, combed, plan) <= 1e-9


class KeepsByClass(nn.Module):
    """A cache whose first value is an attribute of the class, as ultralytics' heads keep their anchors."""

    anchors = torch.empty(0)


def test_a_cache_that_its_class_begins_is_emptied_to_that() -> None:
    model = KeepsByClass()
    model.anchors = torch.arange(4.0)
    forget(model, [Cache("", "anchors", "value", None)])
    assert "anchors" not in vars(model)
    assert model.anchors.numel() == 0
