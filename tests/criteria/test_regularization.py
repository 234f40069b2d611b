"""Sparse learning: whole channels become smaller in the training before and between shrinks."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cpd
from cpd.criteria.gates import Gates
from cpd.criteria.regularization import STRENGTHS, Penalty, Regularizer
from cpd.model.tensors import named_tensors
from helpers.training import X, loader, net

KINDS = list(STRENGTHS)


@pytest.fixture(scope="module")
def combed() -> cpd.Comb:
    return cpd.comb(net(), X)


def norms(combed: cpd.Comb, model: nn.Module) -> dict[str, Tensor]:
    """The norm of each channel over all that belongs to it."""
    gates, weights = Gates(combed, everywhere=True), named_tensors(model)
    return {name: value.sqrt() for name, value in gates.sum(gates.reduce(lambda n: weights[n].square())).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_channels_lose_most(combed: cpd.Comb, kind: str) -> None:
    model = net()
    before = deepcopy(dict(named_tensors(model)))
    Regularizer(combed, Penalty(kind, 0.5)).step(model, lr=0.1, time=1.0)
    changed = {name for name, tensor in named_tensors(model).items() if not torch.equal(tensor, before[name])}
    scales = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert changed
    assert changed <= scales if kind == "batchnorm" else changed - scales
    if kind != "batchnorm":
        original = net()
        for name, now in norms(combed, model).items():
            ratio = now / norms(combed, original)[name]
            least, most = (norms(combed, original)[name].argmin(), norms(combed, original)[name].argmax())
            assert ratio[least] < ratio[most] <= 1


def test_in_time_channels_are_wholly_zero_in_every_layer_of_their_group(combed: cpd.Comb) -> None:
    model = net()
    regularizer = Regularizer(combed, Penalty("group-lasso", 1.0))
    for _ in range(40):
        regularizer.step(model, lr=0.1, time=0.0)
    found = norms(combed, model)
    assert any(bool((value == 0).any()) for value in found.values())
    assert all(bool((value > 0).any()) for value in found.values())


def test_growing_begins_with_nothing(combed: cpd.Comb) -> None:
    model = net()
    Regularizer(combed, Penalty("growing")).step(model, lr=0.1, time=0.0)
    assert all(torch.equal(tensor, net().state_dict()[name]) for name, tensor in model.state_dict().items())


def test_growing_spares_large_channels_beside_one_that_is_larger_still(combed: cpd.Comb) -> None:
    model = net()
    with torch.no_grad():
        for tensor in named_tensors(model).values():
            if tensor.dim() == 4:
                tensor[0] *= 1000
    before = norms(combed, model)["stem"]
    Regularizer(combed, Penalty("growing", 1.0)).step(model, lr=1.0, time=1.0)
    ratio = (norms(combed, model)["stem"] / before).detach()[before.argsort()]
    assert float(ratio[0]) == pytest.approx(0.5, abs=1e-3)
    assert (ratio[len(ratio) // 2 :] > 0.8).all()


def test_groups_that_stay_are_left_alone(combed: cpd.Comb) -> None:
    model, (first, *_) = net(), [group.name for group in combed.open]
    pruner = cpd.Pruner(
        model, X, comb=combed, steps=10, prune_from=0.9, target_macs=0.5, criterion="magnitude", round_to=1,
        regularization="group-lasso", regularization_strength=5.0, ratios={first: 0},
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )  # fmt: skip
    before = norms(combed, model)
    others = {site.tensor for site in Gates(combed, everywhere=True).sites if site.group != first}
    own = {site.tensor for site in Gates(combed, everywhere=True).sites if site.group == first} - others
    weights = {name: named_tensors(model)[name].clone() for name in own}
    pruner.step()
    assert own
    assert all(torch.equal(named_tensors(model)[name], weight) for name, weight in weights.items())
    assert any(bool((now < before[name]).any()) for name, now in norms(combed, model).items() if name != first)


@pytest.mark.parametrize("options", [{"schedule": "cubic"}, {"prune_from": 0.5}], ids=["cubic", "before"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_ends_with_the_last_shrink(combed: cpd.Comb, kind: str, options: dict[str, Any]) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = cpd.Pruner(
        model, X, comb=combed, steps=8, target_macs=0.6, criterion="magnitude", round_to=1, regularization=kind,
        optimizer=optimizer, **options,
    )  # fmt: skip
    worked = 0
    for _ in range(8):
        before = {name: tensor.clone() for name, tensor in named_tensors(model).items()}
        pruner.step()  # with no step of the optimizer: what changes is the penalty's doing, or the shrink's
        now = named_tensors(model)
        worked += any(not torch.equal(now[name], before[name]) for name in before if name in now)
    assert pruner.done
    assert worked == pruner.shrinks[-1].step
    again = cpd.Pruner(
        net(), X, comb=combed, steps=8, target_macs=0.6, criterion="magnitude", round_to=1, regularization=kind,
        optimizer=optimizer, **options,
    )  # fmt: skip
    again.load_state_dict(pruner.state_dict())
    assert again.plan.digest == pruner.plan.digest
    assert again._regularizer is None


@pytest.mark.parametrize("kind", ["group-lasso", "growing"])
def test_less_is_lost_by_the_shrink_after_it(combed: cpd.Comb, kind: str) -> None:
    def lost(**options: Any) -> float:
        model, teacher, data = net(), net(), loader(8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pruner = cpd.Pruner(
            model, X, comb=combed, steps=240, prune_from=0.5, target_macs=0.7, criterion="magnitude", round_to=1,
            branches=False, optimizer=optimizer, **options,
        )  # fmt: skip
        while True:
            for images, _ in data:
                optimizer.zero_grad()
                (model(images) - teacher(images)).square().mean().backward()
                optimizer.step()
                if pruner.step():
                    return float((model(X) - teacher(X)).square().mean().detach())

    assert lost(regularization=kind) < 0.5 * lost()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regularization": "growing"}, "pass prune_from=0.3"),
        ({"regularization_strength": 0.1}, "pass regularization='group-lasso'"),
        ({"regularization": "growing", "schedule": "cubic"}, "schedule='cubic' prunes during the training"),
        ({"regularization": "growing", "prune_from": 0.5}, "regularization='growing' acts during the training"),
    ],
)
def test_where_it_cannot_act(options: dict[str, Any], message: str) -> None:
    with pytest.raises(cpd.InputError, match=message):
        cpd.compress(net(), target_macs=0.5, example_inputs=X, **options)


def test_what_it_needs_is_said() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    images = torch.randn(1, 3, 8, 8)
    options: dict[str, Any] = {"steps": 4, "target_macs": 0.5, "schedule": "linear", "criterion": "magnitude"}
    with pytest.raises(cpd.InputError, match="no BatchNorm of a group that may become narrower"):
        cpd.Pruner(plain, images, regularization="batchnorm", **options)
    pruner = cpd.Pruner(plain, images, regularization="growing", **options)
    with pytest.raises(cpd.InputError, match="pass optimizer= to the pruner"):
        pruner.step()
