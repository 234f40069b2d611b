"""Models that cannot be exported whole: which of their parts are traced, and what is left as it is."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cpd
from cpd.coupling.comb import Comb
from cpd.errors import TraceError
from cpd.surgery.masked import masked_error
from cpd.surgery.shrink import shrink
from helpers.sketches import MAP, sketch
from helpers.zoo import conv, dense, frozen, random_plan, sizes


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8, 3), conv(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b(F.relu(self.a(x))))


class Head(nn.Module):
    def __init__(self, inputs: int = 6) -> None:
        super().__init__()
        self.hidden, self.score = conv(inputs, 10), conv(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(F.relu(self.hidden(x))).flatten(2).transpose(1, 2)


class Detector(nn.Module):
    """A body and a head whose scores decide in Python what is done with them."""

    def __init__(self, body: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.head = body or Body(), Head()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = self.head(self.body(x))
        scores, values = found[..., 0].sigmoid(), found[..., 1]
        if scores.max() > 0.5:
            values = values[scores > 0.5]
        return {"scores": scores, "values": values}


def parts_checked(model: nn.Module, *inputs: Tensor) -> Comb:
    """The comb of a model in parts: those shrink soundly, and so does the whole model run."""
    model = dense(model)
    combed = cpd.comb(model, inputs)
    for share in (0.3, 0.6):
        plan = random_plan(combed, share, at_least=1)
        assert plan.kept
        shrunk = shrink(copy.deepcopy(model), plan)
        assert masked_error(model, shrunk, combed, plan) <= 1e-9
        with torch.no_grad():
            before, after = model(*inputs), shrunk(*inputs)
            shrunk(*(torch.cat([x, x]) for x in inputs))
        assert before["scores"].shape == after["scores"].shape
        assert after["values"].isfinite().all()
    return combed


def test_parts_are_found_and_what_lies_between_them_is_frozen(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="cpd"):
        combed = parts_checked(Detector(), MAP)
    assert combed.operations.parts == ("body", "head")
    assert "torch.export cannot trace Detector at" in caplog.text
    assert "Falling back to the submodules that can be exported: body, head." in caplog.text
    assert sizes(combed) == {"body.a": 8, "head.hidden": 10}
    assert "the model's output" in frozen(combed)["body.b"]
    assert "head.score" in frozen(combed)


def test_a_model_that_can_be_traced_whole_has_no_parts() -> None:
    combed = sketch(lambda self, x: self.head(self.body(x)), body=Body(), head=Head())
    assert combed.operations.parts == ()
    assert sizes(combed) == {"body.a": 8, "body.b": 6, "head.hidden": 10}


def test_a_submodule_called_twice_is_no_part() -> None:
    class Twice(Detector):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.body(x)
            y = self.body(x + 1) if y.max() > 1e6 else y + self.body(x.flip(-1))
            found = self.head(y)
            return {"scores": found[..., 0], "values": found[..., 1]}

    model = Twice()
    combed = parts_checked(model, MAP)
    assert combed.operations.parts == ("head",)
    assert sizes(combed) == {"head.hidden": 10}
    assert not [item.name for item in combed.groups if item.name.startswith("body")]


def test_layers_called_from_elsewhere_are_in_no_part() -> None:
    """The whole reads a layer of the body past it, so that the body alone is not all that uses it."""

    class Past(Detector):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            found = self.head(self.body(x) + self.body.b(self.body.a(x.flip(-1))))
            return {"scores": found[..., 0], "values": found[..., 1] * (1 if found.max() > 0 else 2)}

    combed = parts_checked(Past(), MAP)
    assert combed.operations.parts == ("head",)


def test_parts_lie_deeper_where_a_whole_submodule_cannot_be_traced() -> None:
    class Choosy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (
                nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 7)),
                nn.Sequential(conv(7, 9), nn.ReLU(), conv(9, 6)),
            )

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.second(y if y.sum() > 1e6 else y + 1)

    combed = parts_checked(Detector(Choosy()), MAP)
    assert combed.operations.parts == ("head", "body.first", "body.second")
    assert sizes(combed) == {"head.hidden": 10, "body.first.0": 8, "body.second.0": 9}


def test_a_model_of_which_nothing_can_be_traced_says_what_to_do() -> None:
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight[:, None, None] if x.sum() > 0 else x

    with pytest.raises(TraceError, match=r"cannot trace Opaque at .*test_parts\.py:\d+") as raised:
        cpd.comb(Opaque().double().eval(), MAP)
    assert isinstance(raised.value, cpd.TraceError)
    assert "Call cpd.comb on one that can, e.g. cpd.comb(model.backbone" in str(raised.value)
