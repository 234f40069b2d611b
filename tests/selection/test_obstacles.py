"""What stands in the way of a target: limits, frozen groups and what no width changes, each with its share."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import cpd
from cpd.selection.limits import Limits
from cpd.selection.obstacles import obstacles
from cpd.selection.selector import Selector

IMAGE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Half(nn.Module):
    """A convolution that may be narrower, beside one whose channels are the output."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.close, self.kept = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 1), nn.Conv2d(3, 64, 3)

    def forward(self, x):
        return self.close(self.open(x).relu()), self.kept(x)


@pytest.fixture(scope="module", name="combed")
def _combed() -> cpd.Comb:
    return cpd.comb(Half().eval(), IMAGE)


def told(combed: cpd.Comb, **limits) -> str:
    scores = cpd.score(combed.model, combed, criterion="magnitude")
    selector = Selector(combed, scores, Limits(**limits))
    return obstacles(selector, lambda counts: combed.cost(counts).macs, {"is of another kind": 0.1 * macs(combed)})


def macs(combed: cpd.Comb, width: int = 32) -> int:
    (group,) = combed.open
    return combed.cost({group.axis: width}).macs


@pytest.mark.parametrize(
    ("limits", "width", "named"),
    [
        ({"round_to": 16}, 16, "round_to=16 alone"),
        ({"round_to": 1, "max_ratio": 0.5}, 16, "max_ratio=0.5 alone"),
        ({"round_to": 1, "min_width": 24, "max_ratio": 0.99}, 24, "min_width=24 alone"),
        ({"round_to": 1, "ratios": {"open": 0.25}}, 24, "ratios={'open': 0.25} alone"),
        ({"round_to": 16, "min_width": 24}, 32, "The limits account for"),  # neither alone
    ],
)
def test_limits_are_named_with_what_they_hold(combed, limits, width, named) -> None:
    found = told(combed, **limits)
    full, least = macs(combed), macs(combed, 1)
    held = (macs(combed, width) - least) / full
    assert found.startswith(f"{macs(combed, width) / full:.1%} of the original's are left")
    assert f"The limits account for {held:.1%}" in found
    assert named in found
    assert f"would leave {least / full:.1%}" in found
    assert "10.0% is of another kind." in found


def test_frozen_groups_are_named_with_what_they_hold_and_why(combed) -> None:
    found = told(combed, round_to=1, max_ratio=0.99)
    assert "Looser limits do not help" in found
    share = combed.cost({combed.open[0].axis: 0}).macs / macs(combed)
    assert f"Frozen groups hold {share:.1%} of the MACs" in found
    assert re.search(r"[\d.]+% the model's output .* \[conv2d in kept", found)
    assert found.endswith("outputs=.")


def test_a_target_out_of_reach_says_what_would_help() -> None:
    with pytest.raises(
        cpd.TargetError, match=r"What stands in the way: .*round_to=8 alone .*: round_to=1, .* would leave"
    ):
        cpd.compress(Half().eval(), target_params=0.2, example_inputs=IMAGE)
    model = Half().eval()
    model.unused = nn.Linear(64, 64)
    with pytest.raises(cpd.TargetError, match=r"% belongs to parameters that the forward never uses\."):
        cpd.compress(model, target_params=0.01, example_inputs=IMAGE)


def test_the_milliseconds_that_no_width_changes(combed) -> None:
    found = cpd.profile_model(combed.model, IMAGE)  # measures the kernels
    from cpd.deploy.kernels import KernelTimes
    from cpd.deploy.latency import LatencyProbe
    from cpd.deploy.latency_model import LatencyModel

    assert found.total_ms > 0
    latency = LatencyModel(combed, LatencyProbe(combed.model, IMAGE).profile(), KernelTimes(1))
    fixed = latency.fixed()
    kept = [ms for what, ms in fixed.items() if "Conv" in what]
    assert len(kept) == 1
    assert 0 < kept[0] < sum(share.ms for share in latency.shares if "Conv" in share.op)
    assert sum(fixed.values()) == pytest.approx(latency._constant, rel=0.5)
