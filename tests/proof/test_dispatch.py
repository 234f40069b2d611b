"""What a narrower copy calls is what the traced graph calls at its widths; where it is not, that is seen."""

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from cpd.algebra import axes
from cpd.coupling.comb import _propagate
from cpd.proof.dispatch import behaves_as_predicted, calls_as_predicted, calls_of_model
from cpd.proof.proof import Proof
from cpd.rules import Context
from cpd.trace.tracer import trace
from helpers.zoo import comb, dense


def proof_of(model: nn.Module, x: Tensor) -> Proof:
    """The proof of a comb as it ended."""
    combed = comb(model, x)
    proof = Proof(model, combed.context, combed.dims)
    proof.attributes.update(combed.attributes)
    return proof


MODELS = {
    "timm test_byobnet": lambda: timm.create_model("test_byobnet"),
    "timm test_vit": lambda: timm.create_model("test_vit"),
    "timm sequencer2d_s": lambda: timm.create_model("sequencer2d_s", layers=(1, 1, 1, 1)),
    "torchvision shufflenet_v2_x0_5": lambda: torchvision.models.shufflenet_v2_x0_5(),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_narrower_copy_calls_what_the_graph_does_at_its_widths(name):
    proof = proof_of(MODELS[name]().eval(), torch.randn(1, 3, 224 if "sequencer" in name else 160, 224))
    counts = proof.draws.draw(done=0)
    assert any(kept < axis.size for axis, kept in counts.items())
    narrow = proof.copies.narrow(counts, meta=True)
    assert len(calls_of_model(narrow, proof.ctx)) >= len(proof.ctx.graph.operations) // 2
    assert behaves_as_predicted(narrow, proof.ctx, counts)
    other = {axis: axis.size for axis in counts}
    assert not behaves_as_predicted(narrow, proof.ctx, other)
    assert calls_as_predicted(narrow, proof.ctx, other) is None  # its shapes are not the predicted ones


class Branching(nn.Module):
    """Does at some width what it does not do at another."""

    def __init__(self, extra: str) -> None:
        super().__init__()
        self.a, self.b, self.extra = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 4, 1), extra

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.extra == "operation" and x.shape[1] < 12:
            x = x.relu()
        if self.extra == "number":
            x = x * (2.0 + x.shape[1])
        if self.extra == "device":
            tables = torch.ones(1, dtype=torch.double), torch.ones(1)
            x = x * tables[0].to(x.device) * tables[1].to(x.device, x.dtype)
        if self.extra == "order":
            return self.b(x.relu().sigmoid() if x.shape[1] < 12 else x.sigmoid().relu()).mean((2, 3))
        return self.b(x).mean((2, 3))


@pytest.mark.parametrize(
    ("extra", "alike"),
    [("none", True), ("operation", False), ("number", False), ("order", False), ("device", True)],
)
def test_other_calls_other_numbers_and_another_order_are_seen(extra, alike):
    model = dense(Branching(extra))
    ctx = Context(trace(model, torch.randn(2, 3, 4, 4, dtype=torch.double)))
    dims = _propagate(ctx, model, {})  # the algebra alone, before any proof
    (axis,) = axes.leaves(dims["a.weight"][0])
    assert axis.size == 12
    assert axis.frozen is None
    proof = Proof(model, ctx, dims)
    for kept in (12, 7):
        narrow = proof.copies.narrow({axis: kept}, meta=True)
        assert behaves_as_predicted(narrow, ctx, {axis: kept}) is (alike or kept == 12)
