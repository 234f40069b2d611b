"""Costs against torch's own counter and against finite differences."""

from __future__ import annotations

import copy
import time

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import cpd
from helpers.zoo import comb, random_plan

IMAGE = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def flops(model: nn.Module) -> int:
    """As torch counts them; of attention by its matrix products, since not all versions count the CPU's own kernel."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(IMAGE)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "vit_tiny_patch16_224", "densenet121"])
def test_macs_are_those_of_torchs_own_counter(name):
    model = timm.create_model(name, **({"img_size": 64} if "vit" in name else {})).eval()
    combed = comb(model, IMAGE)
    assert 2 * combed.cost({}).macs == flops(model)
    plan = random_plan(combed, 0.3, at_least=1)
    narrow = cpd.shrink(copy.deepcopy(model), plan)
    found = combed.cost({item.axis: len(plan.groups[item.name]) for item in combed.groups})
    assert 2 * found.macs == flops(narrow)
    assert found.parameters == sum(p.numel() for p in narrow.parameters())


def test_thousands_of_candidates_a_second_and_slopes():
    combed = comb(timm.create_model("resnet18").eval(), IMAGE)
    cost, rng = combed.cost, np.random.default_rng(0)
    widths = np.stack([rng.integers(1, axis.size + 1, 2000) for axis in cost.axes], 1)
    start = time.perf_counter()
    found = cost.many(widths)
    assert len(widths) / (time.perf_counter() - start) > 2000
    for index in range(5):
        counts = dict(zip(cost.axes, map(int, widths[index]), strict=True))
        figures, slopes = cost(counts), cost.slopes(counts)
        assert tuple(found[index]) == (figures.parameters, figures.macs, figures.activations)
        for axis in cost.axes[:4]:
            up, down = (cost({**counts, axis: counts[axis] + step}) for step in (1, -1))
            assert slopes[axis].macs == pytest.approx((up.macs - down.macs) / 2)
            assert slopes[axis].activations == pytest.approx((up.activations - down.activations) / 2)
