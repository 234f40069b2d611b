"""Plans one after the other."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

import cpd
from cpd.errors import PlanError
from cpd.model.tensors import named_tensors
from cpd.surgery.shrink import shrink
from helpers.training import Net, X
from helpers.zoo import comb, dense, random_plan, relative_error


@pytest.mark.parametrize("name", ["net", "vit_tiny_patch16_224", "regnety_002"])
def test_two_steps_of_a_plan_make_the_same_model_as_one(name: str) -> None:
    """The difference of two nested plans, applied to the result of the first, is the second."""
    if name == "net":
        model, x = dense(Net()), X.double()
    else:
        model, x = dense(timm.create_model(name)), torch.randn(1, 3, 224, 224, dtype=torch.float64)
    combed = comb(copy.deepcopy(model), x)
    first = random_plan(combed, 0.3, at_least=1)
    narrower = {name: list(positions)[: max(1, len(positions) // 2)] for name, positions in first.groups.items()}
    keep = {group.name: narrower[group.name] for group in combed.open}
    second = combed.plan({**keep, **_raised(combed.plan(keep), first)})
    stepwise = shrink(shrink(copy.deepcopy(model), first), second.since(first))
    at_once = shrink(copy.deepcopy(model), second)
    for (key, found), expected in zip(named_tensors(stepwise).items(), named_tensors(at_once).values(), strict=True):
        assert found.shape == expected.shape, key
        if found.is_floating_point() and found.numel():
            assert torch.allclose(found, expected, rtol=1e-12, atol=0), key
    with torch.no_grad():
        assert relative_error(stepwise(x), at_once(x)) < 1e-12
    with pytest.raises(PlanError, match="earlier one removes"):
        first.since(second)


def _raised(plan: cpd.Plan, within: cpd.Plan) -> dict[str, list[int]]:
    """Where ties have brought back what `within` lacks: as many of its positions."""
    return {
        name: list(within.groups[name])[: len(positions)]
        for name, positions in plan.groups.items()
        if not set(positions) <= set(within.groups[name])
    }
