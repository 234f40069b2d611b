"""Models whose sizes and numbers depend on values: they are combed as one graph, with the example's values."""

from __future__ import annotations

import copy
import logging
import signal
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cpd
from cpd.coupling.comb import Comb
from cpd.errors import TraceError
from cpd.model.inputs import Call
from cpd.surgery.masked import masked_error
from cpd.surgery.shrink import shrink
from cpd.trace.values import answering, asked
from helpers.sketches import MAP, Sketch, checked, sketch
from helpers.zoo import conv, dense, frozen, random_plan, sizes


def values_checked(model: nn.Module, *inputs: Tensor, share: float = 0.9) -> Comb:
    """The comb of a model as one graph, of which so much is open; masked equals shrunk."""
    model = dense(model)
    combed = cpd.comb(model, inputs)
    assert combed.operations.parts == ()
    assert combed.open_share["parameters"] >= share, frozen(combed)
    for removed in (0.3, 0.6):
        plan = random_plan(combed, removed, at_least=1)
        assert plan.kept
        assert masked_error(model, shrink(copy.deepcopy(model), plan), combed, plan) <= 1e-9
    return combed


class Keypoints(nn.Module):
    """Gives the places where its score is high: as many as there are."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(1, 16, 3), nn.ReLU(), conv(16, 12, 3), nn.ReLU())
        self.score = conv(12, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.sigmoid(self.score(self.body(x)))[0, 0]
        at = torch.nonzero(scores > 0.5)
        return scores[tuple(at.t())], at.flip(1)


class Padded(nn.Module):
    """Attention under a mask as wide as the longest of its inputs."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.inp, self.head = nn.Linear(12, width), nn.Linear(width, 5)
        self.q, self.v = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        mask = torch.arange(int(lengths.max().item()))[None] >= lengths[:, None]
        x = self.inp(x)
        a = (self.q(x) @ x.transpose(1, 2)).masked_fill(mask[:, None], -1e9).softmax(-1)
        x = x + a @ self.v(x)
        return self.head((x + self.down(torch.relu(self.up(x)))).mean(1))


PADDED = torch.randn(2, 10, 12, dtype=torch.double), torch.tensor([10, 7])


def test_a_shape_that_depends_on_values_has_the_examples_size(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="cpd"):
        combed = values_checked(Keypoints(), torch.randn(1, 1, 8, 8, dtype=torch.double))
    assert sizes(combed) == {"body.0": 16, "body.2": 12}
    (place,) = combed.operations.values_read
    assert place.startswith("test_values.py:")
    assert (
        f"The forward reads values of tensors ({place}). They are assumed to be those of the example inputs."
        in caplog.text
    )


def test_a_number_used_as_a_size_is_the_examples() -> None:
    combed = values_checked(Padded(), *PADDED)
    assert sizes(combed) == {"inp": 16, "q": 16, "v": 16, "up": 32} or sizes(combed).keys() >= {"inp", "up"}
    assert len(combed.operations.values_read) == 1


@pytest.mark.parametrize("model", [Keypoints, Padded])
def test_compress_takes_models_that_read_values(model: Callable[[], nn.Module]) -> None:
    inputs = (PADDED[0].float(), PADDED[1]) if model is Padded else (torch.randn(1, 1, 8, 8),)
    result = cpd.compress(dense(model()).float(), target_macs=0.6, example_inputs=inputs, round_to=1)
    assert result.report.checks["masked equals shrunk"] <= 1e-5
    result.model(*inputs)


def test_models_that_read_no_values_are_told_none() -> None:
    combed = sketch(lambda self, x: self.b(F.relu(self.a(x))), a=conv(3, 8), b=conv(8, 2))
    assert combed.operations.answers == ()


# ---------------------------------------------------------------- every way to read a value


def on_rows(rows: Tensor, values: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Ways to take some of `rows`, [n, channels], by the integer `values`, [n]."""
    return {
        "tolist": lambda: torch.cat(rows.split(values.tolist())),
        "int": lambda: rows[: int(values.max())],
        "slice to a tensor": lambda: rows[: values.max()],
        "index by a tensor": lambda: rows[values.argmax()][None],
        "range": lambda: torch.stack([rows[i] for i in range(int(values.max()))]),
        "range of a tensor": lambda: torch.stack([rows[i] for i in range(values.max())]),
        "arange": lambda: rows[torch.arange(values.max())],
        "new_zeros": lambda: torch.cat([rows, rows.new_zeros(int(values.max()), rows.shape[1])]),
        "expand": lambda: rows[:1].expand(values.max(), rows.shape[1]),
        "item in a comparison": lambda: rows.relu() if values.max().item() > 1 else rows,
        "float": lambda: rows * float(values.float().mean()),
        "mask": lambda: rows[values > 1],
        "mask of two dimensions": lambda: rows[:, None].expand(-1, 2, -1)[torch.stack([values > 1, values > 2], 1)],
        "masked_select": lambda: rows * values.masked_select(values > 2).sum(),
        "mask written to": lambda: rows * torch.zeros_like(values).masked_fill(values > 1, 1)[:, None],
        "nonzero as tuple": lambda: rows[(values > 1).nonzero(as_tuple=True)],
        "where": lambda: rows[torch.where(values > 1)[0]],
        "argwhere": lambda: rows[torch.argwhere(values > 1)[:, 0]],
        "unique": lambda: rows[torch.unique(values)],
        "unique_consecutive": lambda: rows[torch.unique_consecutive(values, return_inverse=True)[1]],
        "repeat_interleave": lambda: rows.repeat_interleave(values, 0),
        "bincount": lambda: rows[: len(torch.bincount(values))],
        "one_hot": lambda: F.one_hot(values).to(rows).t() @ rows,
        "tensor of tensors": lambda: rows * torch.tensor([values.max(), values.min()]).sum(),
        "full": lambda: rows + torch.full((1,), values.max().item(), dtype=rows.dtype),
    }


WAYS = list(on_rows(torch.zeros(0), torch.zeros(0)))
VALUES = torch.tensor([1, 3, 3, 2])
ROWS = torch.randn(9, 6, dtype=torch.double), VALUES


class Rows(nn.Module):
    """Reads its integer input in one way, between two layers."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.a, self.b = way, nn.Linear(6, 16), nn.Linear(16, 40)
        self.c = nn.Linear(40, 3)

    def forward(self, x: Tensor, values: Tensor) -> Tensor:
        x = F.relu(self.a(x))[: values.sum() if self.way == "tolist" else len(values)]
        return self.c(F.relu(self.b(on_rows(x, values)[self.way]())))


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_read_a_value_leaves_the_channels_open(way: str) -> None:
    combed = values_checked(Rows(way), *ROWS)
    assert sizes(combed) == {"a": 16, "b": 40}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_answered_gives_what_the_forward_gives(way: str) -> None:
    model = dense(Rows(way))
    with torch.no_grad():
        expected = model(*ROWS)
        answers = asked(model, Call(ROWS, {}))
        with answering(answers):
            found = model(*ROWS)
    assert torch.equal(found, expected)


# ---------------------------------------------------------------- values of the model, and values that decide


def test_a_number_kept_in_the_model_is_no_value_of_the_inputs(caplog: pytest.LogCaptureFixture) -> None:
    """A stride kept as a plain tensor, read into a grid that is kept by the shape of the map; a flag in a buffer."""

    class Grid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.shape, self.grid = conv(3, 24), conv(24, 2), None, torch.empty(0)
            self.stride = torch.tensor([8.0])
            self.register_buffer("shifted", torch.tensor(True))

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x))
            if self.shape != x.shape:
                self.grid = torch.full(tuple(x.shape[2:]), float(self.stride[0]), dtype=x.dtype)
                self.shape = x.shape
            return self.b(x) + self.grid if self.shifted else self.b(x)

    with caplog.at_level(logging.WARNING, logger="cpd"):
        combed = values_checked(Grid(), MAP)
    assert sizes(combed) == {"a": 24}
    assert len(combed.operations.answers) == 2
    assert combed.operations.values_read == ()
    assert not caplog.records


class Deciding(nn.Module):
    """Reads a number in each of two branches, and decides by a value which of them runs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Rows("range"), Rows("mask")

    def forward(self, x: Tensor, values: Tensor) -> Tensor:
        one = self.one(x, values)
        return self.two(x, values).sum(0) if (one > 0).any() else one


def test_where_a_value_decides_the_largest_parts_are_combed(caplog: pytest.LogCaptureFixture) -> None:
    model = dense(Deciding())
    with torch.no_grad():
        model.one.c.bias.fill_(100)
    with caplog.at_level(logging.WARNING, logger="cpd"):
        combed = cpd.comb(model, ROWS)
    assert combed.operations.parts == ("one", "two")
    assert sizes(combed) == {"one.a": 16, "one.b": 40, "two.a": 16, "two.b": 40}
    assert "cannot trace Deciding at" in caplog.text
    assert "if (one > 0).any() else one" in caplog.text
    assert "what the forward does depends on a value" in caplog.text
    assert len(combed.operations.values_read) == 2
    plan = random_plan(combed, 0.5, at_least=1)
    assert masked_error(model, shrink(copy.deepcopy(model), plan), combed, plan) <= 1e-9


def test_a_model_that_decides_by_a_value_and_has_no_parts_names_the_line() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.a.weight)
        return y if y.max() > 0 else y + 1

    with pytest.raises(
        TraceError, match=r"at .*test_values\.py:\d+ .*depends on a value.*No submodule can be exported"
    ):
        sketch(forward, a=conv(3, 8))


# ---------------------------------------------------------------- what is read and a width


def test_a_number_that_counts_channels_freezes_what_it_is_used_for() -> None:
    """The forward would ask a narrower copy for as many channels as the unpruned model has."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        alive = int((y.abs().sum((0, 2, 3)) >= 0).sum())
        y = y.reshape(y.shape[0], alive, -1).mean(2)
        return self.c(F.relu(self.b(y)))

    combed = sketch(forward, a=conv(3, 8), b=nn.Linear(8, 32), c=nn.Linear(32, 3))
    assert sizes(combed) == {"b": 32}
    assert "asks for" in frozen(combed)["a"] or "8" in frozen(combed)["a"]


def test_channels_that_are_read_one_by_one_stay() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = F.relu(self.a(x)).mean((0, 2, 3))
        return self.c(F.relu(self.b(x)).mean((2, 3))) * sum(y.tolist())

    combed = checked(Sketch(forward, a=conv(3, 8), b=conv(3, 16), c=nn.Linear(16, 3)), MAP, batched=False)
    assert sizes(combed) == {"b": 16}


def test_what_a_number_is_read_from_is_inexact_where_it_mixes_channels() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        return self.b(y) * float(y.mean())

    combed = checked(Sketch(forward, a=conv(3, 8), b=conv(8, 3)), MAP, batched=False)
    (group,) = combed.open
    assert not group.exact
    assert "mean" in group.inexact


def test_a_copy_that_reads_values_in_another_order_is_frozen() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        if y.shape[1] < 8:
            y = y * int(x.sum())
        return self.b(y)[:, :, : int(x[0, 0, 0, 0]) + 3]

    combed = sketch(forward, a=conv(3, 8), b=conv(8, 3))
    assert sizes(combed) == {}
    assert "reads a value" in frozen(combed)["a"]


def test_an_auxiliary_branch_may_read_values() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.aux = conv(3, 16), conv(16, 4), conv(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.a(x))
            y = y[(y.sum((1, 2, 3)) >= 0)]
            return self.b(y) + self.aux(y)[:, :, : int((x > 0).any())] if self.training else self.b(y)

    combed = values_checked(Net(), MAP, share=0.3)
    assert sizes(combed) == {"a": 16}
    assert [str(member) for member in combed.open[0].members if member.tensor == "aux.weight"] == ["aux.weight dim 1"]


def test_asking_leaves_the_model_as_it_was() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.kept = conv(3, 8), conv(8, 2), None
            self.register_buffer("runs", torch.zeros((), dtype=torch.long))

        def forward(self, x: Tensor) -> Tensor:
            self.runs += 1
            self.kept = x
            return self.b(F.relu(self.a(x)))[: int((x > 0).any())]

    model = Counting().eval()
    before = torch.random.get_rng_state()
    assert len(asked(model, Call((MAP.float(),), {}))) == 1
    assert model.kept is None
    assert model.runs == 0
    assert torch.equal(torch.random.get_rng_state(), before)


# ---------------------------------------------------------------- what is no fault of the forward


def test_what_a_signal_handler_raises_reaches_the_caller_whenever_it_comes() -> None:
    class Late(Exception):
        pass

    def alarm(*_: object) -> None:
        raise Late

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.aux = conv(3, 8), conv(8, 2), conv(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            runs.append(len(runs))
            if runs[-1] == late:
                signal.raise_signal(signal.SIGINT)
            x = F.relu(self.a(x))
            return (self.b(x) + self.aux(x) if self.training else self.b(x))[: int((x > 0).any())]

    runs: list[int] = []
    late = -1
    combed = cpd.comb(Net().double().eval(), MAP)
    assert sizes(combed) == {"a": 8}
    total = len(runs)
    before = signal.signal(signal.SIGINT, alarm)
    try:
        for late in range(total):  # noqa: B007 the forward reads it
            runs.clear()
            with pytest.raises(Late):
                cpd.comb(Net().double().eval(), MAP)
    finally:
        signal.signal(signal.SIGINT, before)
    assert total > 10
