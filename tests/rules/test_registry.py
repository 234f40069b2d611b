"""torch's own registry of ops beside the rules: what works element by element has a rule, whatever it is called."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Graph

from cpd.rules import RULES
from cpd.rules.base import find
from cpd.trace.pointwise import first_name, is_pointwise
from helpers.sketches import Sketch, checked, random
from helpers.zoo import BENCHMARKS, conv, load, sizes

listing = load(BENCHMARKS / "rules.py")


def covered(op: OpOverload) -> bool:
    """Whether a call of an op would find a rule."""
    return find(Graph().call_function(op)) is not None


def test_every_pointwise_op_has_a_rule() -> None:
    ops = list(listing.registry())
    tagged = [op for op in ops if torch.Tag.pointwise in op.tags]
    by_decomposition = [op for op in ops if torch.Tag.pointwise not in op.tags and is_pointwise(op)]
    assert len(tagged) > 400
    assert len(by_decomposition) > 100
    assert [str(op) for op in tagged + by_decomposition if not covered(op)] == []
    for name in (
        "multiply",
        "divide",
        "subtract",
        "__and__",
        "__or__",
        "__ior__",
        "greater",
        "arctan2",
        "special_expit",
    ):
        overloads = getattr(torch.ops.aten, name)
        assert any(getattr(overloads, overload) in by_decomposition for overload in overloads.overloads())


def test_what_is_not_pointwise_is_not_taken_for_it() -> None:
    aten = torch.ops.aten
    mixing = [aten.softmax.int, aten.cumsum.default, aten.flip.default, aten.mse_loss.default, aten.matmul.default,
              aten.glu.default, aten.outer.default, aten.tril.default, aten.cosine_similarity.default]  # fmt: skip
    assert [op for op in mixing if is_pointwise(op)] == []


def test_aliases_are_called_by_the_name_that_the_rules_know() -> None:
    aten = torch.ops.aten
    names = {
        aten.multiply.Tensor: "mul", aten.divide_.Tensor: "div_", aten.__and__.Tensor: "bitwise_and",
        aten.__ior__.Tensor: "bitwise_or_", aten.view_copy.default: "view", aten.mul.Tensor: "mul",
        aten.index_copy.default: "index_copy", aten.matmul.default: "matmul",
    }  # fmt: skip
    assert {op: first_name(op) for op in names} == names
    assert "pointwise" in RULES


@pytest.mark.parametrize(
    "mix",
    [
        torch.multiply,
        torch.subtract,
        lambda a, b: torch.divide(a, b.exp()),
        lambda a, b: torch.divide(a * 3, b.exp(), rounding_mode="floor"),
        lambda a, b: torch.where((a > 0) & (b > 0), a, b),
        lambda a, b: torch.where(~((a > 0) | (b > 1)) ^ (a < b), a, b),
        lambda a, b: a * ((a > 0).int() << 2).to(a.dtype) + b,
        lambda a, b: a * torch.special.expit(b),
    ],
)
def test_elementwise_ops_by_other_names_leave_channels_open(mix: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = Sketch(lambda self, x: self.c(mix(self.a(x), self.b(x))), a=conv(3, 8), b=conv(3, 8), c=conv(8, 5))
    combed = checked(model, random(2, 3, 4, 4))
    assert sizes(combed) == {"a": 8}
    assert not combed.unknown


def test_a_multiplied_scale_keeps_its_effect_by_any_name() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(12, 8) for _ in range(3))
            self.out = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            q = torch.multiply(self.q(x), self.k(x).shape[-1] ** -0.5)
            return self.out((q @ self.k(x).transpose(1, 2)).softmax(-1) @ self.v(x))

    combed = checked(Attention(), random(2, 5, 12))
    assert sizes(combed) == {"q": 8, "v": 8}
    assert all(group.exact for group in combed.open)


@torch.library.custom_op("cpd_test_registry::gelu", mutates_args=())
def gelu(x: Tensor) -> Tensor:
    """An op of another library that has the name of one of torch's, and does something else."""
    return x.flip(1) * 1.0


@gelu.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_op_of_another_library_is_no_namesake() -> None:
    model = Sketch(lambda self, x: self.b(gelu(self.a(x))), a=conv(3, 8), b=conv(8, 5))
    combed = checked(model, random(2, 3, 4, 4))
    assert sizes(combed) == {}
    assert combed.unknown == ("cpd_test_registry.gelu.default",)


def test_what_is_written_to_a_view_is_read_from_the_whole() -> None:
    def forward(self: Sketch, x: Tensor) -> Tensor:
        y = self.a(x)
        out = torch.zeros_like(y)
        out[:, :, :2] = y[:, :, :2].exp()
        return self.b(y) + out.sum(1, keepdim=True)

    combed = checked(Sketch(forward, a=conv(3, 8), b=conv(8, 5)), random(2, 3, 4, 4))
    assert sizes(combed) == {"a": 8}
    assert not combed.open[0].exact  # the exponential of zero is one, and is summed


def test_every_core_op_without_a_rule_is_explained(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rules.py", "--json", str(tmp_path / "rules.json")])
        listing.main()
    found = json.loads((tmp_path / "rules.json").read_text(encoding="utf-8"))["rows"]
    assert "to be written" not in found["core without a rule"].values()
    assert "nonzero" in capsys.readouterr().out
    assert found["overloads"]["pointwise by tag"]["with a rule"] == found["overloads"]["pointwise by tag"]["of"]
