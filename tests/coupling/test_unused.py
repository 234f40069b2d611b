"""Parameters that a forward never uses stand in nobody's way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import cpd
from cpd.coupling.cost import unused_sentence


class Deeper(nn.Module):
    """An encoder with one stage more than its decoder asks for, and a part that cannot be exported if wanted."""

    def __init__(self, sorts: bool = False) -> None:
        super().__init__()
        stages = [nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1), nn.Conv2d(32, 256, 3, 2, 1)]
        self.stages, self.head, self.after = nn.ModuleList(stages), nn.Conv2d(32, 2, 1), nn.Linear(2, 2)
        self.sorts = sorts

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages[:2]:
            x = stage(x).relu()
        x = self.head(x).mean((2, 3))
        if not self.sorts:
            return self.after(x)
        return self.after(x[x[:, 0] > -9]) if bool(x.sum() > -99) else x


IMAGE = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
STAGE = 32 * 256 * 9 + 256


def test_what_is_never_used_is_told_and_counts_in_no_share():
    model = Deeper().eval()
    combed = cpd.comb(model, IMAGE)
    assert combed.unused == {"stages.2.weight": 32 * 256 * 9, "stages.2.bias": 256}
    assert {row.reason for row in combed.frozen_share} == {"the model's output"}
    total = sum(parameter.numel() for parameter in model.parameters())
    assert combed.cost({}).parameters == total
    held = sum(parameter.numel() for name, parameter in model.named_parameters() if name == "after.bias")
    assert combed.open_share["parameters"] == pytest.approx(1 - held / (total - STAGE))
    assert unused_sentence(combed.unused) == f"The forward never uses {STAGE:,} parameters (stages.2)."


def test_a_run_says_so_and_so_does_a_target_that_it_keeps_out_of_reach():
    sentence = f"The forward never uses {STAGE:,} parameters (stages.2)."
    found = cpd.compress(Deeper().eval(), target_macs=0.6, example_inputs=IMAGE, progress=False)
    assert sentence in found.report.notes
    with pytest.raises(cpd.TargetError, match=r"No group|Frozen groups") as caught:
        cpd.compress(Deeper().eval(), target_params=0.5, example_inputs=IMAGE)
    assert str(caught.value).endswith(sentence)


def test_what_lies_outside_the_parts_that_can_be_exported_is_not_unused():
    model = Deeper(sorts=True).eval()
    combed = cpd.comb(model, IMAGE)
    assert combed.operations.parts
    outside = [row for row in combed.frozen_share if row.reason == "in a submodule that cannot be exported"]
    assert {place.rpartition(".")[0] for row in outside for place in row.places} == {"stages.2"}
    assert combed.unused == {}
    assert combed.open_share["parameters"] + sum(row.parameters for row in combed.frozen_share) == pytest.approx(1)
