"""Masks of `torch.nn.utils.prune`: kept with their weights, or made permanent; every score sees what they leave."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import cpd
from cpd.criteria import CRITERIA
from cpd.model.masks import masked_weights, masks_applied

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten())
    model = nn.Sequential(*layers, nn.Linear(256, 4)).eval()
    prune.ln_structured(model[0], "weight", 0.5, n=2, dim=0)
    prune.l1_unstructured(model[3], "weight", 0.5)
    prune.l1_unstructured(model[3], "weight", 0.1)  # two masks in one container
    prune.ln_structured(model[5], "weight", 0.5, n=2, dim=1)
    with torch.no_grad():
        model(X)  # the computed weights are leaves then, which can be copied
    return model


def loader() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, 8, 8, generator=g), torch.randint(4, (8,), generator=g)) for _ in range(2)]


def test_a_mask_is_multiplied_in_and_taken_off() -> None:
    model, expected = network(), network()(X)
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert set(masked_weights(model)) == {"0.weight_orig", "3.weight_orig", "5.weight_orig"}
    assert masks_applied(model) is model
    assert masked_weights(model) == {}
    assert not any(name.endswith(("_orig", "_mask")) for name in model.state_dict())
    assert {name.removesuffix("_orig"): place for name, place in parameters.items()} == {
        name: id(parameter) for name, parameter in model.named_parameters()
    }
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_score_is_the_same_below_a_mask_and_with_the_mask_multiplied_in(criterion: str) -> None:
    kept, permanent = network(), masks_applied(network())
    scores = [cpd.score(model, cpd.comb(model, X), loader(), criterion=criterion) for model in (kept, permanent)]
    for below, within in zip(scores[0].values(), scores[1].values(), strict=True):
        assert torch.allclose(below, within)


def test_masks_are_kept_or_made_permanent_as_asked() -> None:
    for masks, names in (("keep", 3), ("permanent", 0)):
        model = network()
        given = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        found = cpd.compress(model, target_macs=0.5, example_inputs=X, round_to=1, progress=False, masks=masks)
        assert len(masked_weights(found.model)) == names
        assert found.report.result.macs <= 0.5 * found.report.original.macs
        assert found.report.checks["masked equals shrunk"] < 1e-4
        assert set(given) == set(model.state_dict())
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in given.items())
        zeros = found.model[0].get_buffer("weight_mask") if names else (found.model[0].weight != 0)
        assert zeros.any()


def test_a_pruner_makes_them_permanent_in_its_model() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = cpd.Pruner(
        model, X, target_macs=0.5, steps=1, data=loader(), masks="permanent", round_to=1, optimizer=optimizer
    )
    pruner.prune()
    assert masked_weights(model) == {}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    assert model(X).shape == (1, 4)
