"""Integers that equal a width and that the forward does not ask for."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

import cpd
from cpd.proof.unread import Unread
from cpd.surgery.shrink import shrink
from helpers.sketches import MAP, Sketch, checked, random
from helpers.zoo import comb, conv, dense, random_plan


class Halves(nn.Module):
    """Cuts what it computes in two, in its forward by `chunk`, for an exporter by an integer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width, self.depth = width, 2
        self.a, self.b, self.head = conv(3, 2 * width), conv(width, width), conv(2 * width, 4)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.a(x).chunk(2, 1)
        return self.head(torch.cat([first, self.b(second)], 1)).mean((2, 3))

    def exported(self, x: Tensor) -> Tensor:
        first, second = self.a(x).split((self.width, self.width), 1)
        return self.head(torch.cat([first, self.b(second)], 1)).mean((2, 3))


def test_an_integer_that_another_method_reads_follows_the_width_that_the_module_cuts_out() -> None:
    """`b` gives as many channels too, which nothing ties to the halves."""
    combed = checked(Halves(), MAP)
    for halves, others in ((5, 9), (11, 3)):
        plan = combed.plan({"a": range(halves), "a#2": range(halves), "b": range(others)})
        shrunk = shrink(copy.deepcopy(combed.model), plan)
        assert shrunk.width == halves
        torch.testing.assert_close(shrunk.exported(MAP), shrunk(MAP))
        assert not combed.left_alone(plan)


class Block(nn.Module):
    """Keeps its width, which only other methods read."""

    def __init__(self, inputs: int, dim: int) -> None:
        super().__init__()
        self.dim, self.layer = dim, conv(inputs, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).relu()


@pytest.mark.parametrize(("last", "follows"), [(20, True), (12, False)])
def test_an_integer_that_is_the_width_in_each_module_of_a_class(last: int, follows: bool) -> None:
    combed = checked(nn.Sequential(Block(3, 12), Block(12, last), conv(last, 4)), MAP)
    plan = combed.plan({"0.layer": range(5), "1.layer": range(7)})
    found = {f"{item.module}.{item.name}": item.new for item in plan.attributes}
    assert found == ({"0.dim": 5, "1.dim": 7} if follows else {})
    assert combed.left_alone(plan) == (() if follows else ("0.dim = 12", "1.dim = 12"))
    assert combed.left_alone(combed.plan({"1.layer": range(7)})) == (() if follows else ("1.dim = 12",))


def test_what_the_forward_reads_for_something_else_does_not_follow() -> None:
    def forward(self: Sketch, x: Tensor) -> Tensor:
        first, second = self.a(x).chunk(2, 1)
        for _ in range(self.rounds):
            first = first * 0.5
        return self.out(torch.cat([first, second], 1))

    combed = checked(Sketch(forward, a=conv(3, 20), out=conv(20, 4), rounds=10, width=10, other=10), MAP)
    plan = combed.plan({"a": range(5), "a#2": range(5)})
    assert {item.name: item.new for item in plan.attributes} == {"width": 5, "other": 5}
    assert combed.left_alone(plan) == ("rounds = 10",)


def test_ambiguous_and_small_integers_and_those_of_torch_are_left_alone() -> None:
    def forward(self: Sketch, x: Tensor) -> Tensor:
        x = self.norm(self.a(x))
        return self.out(x.flatten(2).unflatten(2, (8, 8)))  # space of the same size

    class Norm(nn.BatchNorm2d):
        pass

    model = Sketch(forward, a=conv(3, 8), norm=Norm(8), out=conv(8, 4), width=8, stride=2, flag=True)
    combed = checked(model, MAP)
    plan = combed.plan({"a": range(5)})
    assert not plan.attributes
    assert combed.left_alone(plan) == ("width = 8",)
    assert shrink(combed.model, plan).norm.num_features == 5


def test_a_model_that_follows_nothing_is_not_run_again(monkeypatch) -> None:
    runs = []
    monkeypatch.setattr(Unread, "harmless", lambda self, follow, counts: runs.append(follow) or follow)
    comb(dense(Halves()), MAP)
    assert not runs  # the copies compared last have told


def test_a_width_given_by_a_constant_of_the_forward() -> None:
    """Its copies are compared by their export, so what may follow is tried apart."""

    def forward(self: Sketch, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, 2, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, n, -1))

    layers = {"q": nn.Linear(12, 16), "k": nn.Linear(12, 16), "v": nn.Linear(12, 24)}
    combed = checked(Sketch(forward, out=nn.Linear(24, 5), head_dim=8, **layers), random(2, 5, 12))
    assert combed.scales
    plan = combed.plan({"q#2": range(3), "v": range(4)})
    assert {item.name: item.new for item in plan.attributes} == {"head_dim": 3}


def test_attention_of_torch_keeps_its_head_dim_in_line() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    combed = checked(nn.Sequential(nn.Linear(12, 16), layer, nn.Linear(16, 5)), random(2, 5, 12))
    shrunk = shrink(copy.deepcopy(combed.model), random_plan(combed, 0.5))
    inner = shrunk[1].self_attn
    assert inner.head_dim * inner.num_heads == inner.embed_dim < 16


def test_what_is_left_alone_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(Block(3, 16), Block(16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()
    with caplog.at_level(logging.INFO, logger="cpd"):
        result = cpd.compress(model, target_params=0.5, example_inputs=MAP.float(), progress=False, round_to=1)
    notes = [note for note in result.report.notes if "0.dim = 16" in note]
    assert len(notes) == 1
    assert notes[0] in caplog.text
    assert notes[0].startswith(
        "These integer attributes equal a former width, but are not changed, "
        "because the forward does not read them: 0.dim = 16"
    )
