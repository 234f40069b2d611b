"""The state of an optimizer follows the channels of its parameters."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from cpd.surgery.optimizer_state import narrow_state, narrowed_state
from cpd.surgery.shrink import shrink
from helpers.training import X, loader, net
from helpers.zoo import comb, random_plan


@pytest.mark.parametrize(
    ("make", "keys"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), {"momentum_buffer"}),
        (lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True), {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
        (lambda p: torch.optim.AdamW(p, lr=0.1), {"exp_avg", "exp_avg_sq"}),
        (lambda p: torch.optim.RMSprop(p, lr=0.1), {"square_avg"}),
    ],
)
def test_the_state_of_an_optimizer_is_that_of_the_parameters_kept(make, keys: set[str]) -> None:
    model = net()
    optimizer = make(model.parameters())
    for x, y in loader(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    plan = random_plan(comb(copy.deepcopy(model), X), 0.5, at_least=1)
    before = {name: {k: v.clone() for k, v in optimizer.state[p].items()} for name, p in model.named_parameters()}
    entries = narrowed_state(optimizer, model, plan)
    shrink(model, plan)
    narrow_state(entries)
    narrower = 0
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            expected = before[name][key]
            for dim, index in plan.kept.get(name, {}).items() if key in keys else ():
                expected = expected.index_select(dim, index)
                narrower += 1
            assert torch.equal(value, expected), (name, key)
            assert key not in keys or value.shape == parameter.shape
    assert narrower > 8
    optimizer.zero_grad()
    F.cross_entropy(model(X), torch.tensor([1, 2])).backward()
    optimizer.step()
