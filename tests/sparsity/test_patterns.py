"""Patterns and ratios: as many weights are zero as were asked for, and those that belong together."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import cpd
from cpd.sparsity.patterns import Pattern, lowest, prunable
from cpd.sparsity.ratios import erk, lamp

SIZES = st.integers(1, 13)
SHARES = st.floats(0, 0.99)


def layers(outputs: int, inputs: int, kernel: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel), nn.ConvTranspose2d(outputs, inputs, kernel), nn.Linear(inputs, 5)
    )


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, st.integers(1, 3), SHARES, st.sampled_from(["global", "layer"]), st.integers(0, 99))
def test_single_weights_are_zero_exactly_as_asked(
    outputs: int, inputs: int, kernel: int, share: float, scope: str, seed: int
) -> None:
    model = layers(outputs, inputs, kernel, seed)
    masks = cpd.mask(model, share, scope=scope, max_ratio=1.0)
    if scope == "global":
        assert masks.zeros == round(share * masks.elements)
        kept = torch.cat([layer.weight[masks.kept[name]].abs() for name, layer in prunable(model).items()])
        gone = torch.cat([layer.weight[~masks.kept[name]].abs() for name, layer in prunable(model).items()])
        assert not len(gone) or not len(kept) or gone.max() <= kept.min()
    else:
        whole = round(share * masks.elements) / masks.elements
        for mask in masks.kept.values():
            assert int((~mask).sum()) == round(whole * mask.numel())


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, st.integers(1, 3), SHARES, st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_blocks_are_zero_as_a_whole(
    outputs: int, inputs: int, kernel: int, share: float, rows: int, columns: int, seed: int
) -> None:
    model = layers(outputs, inputs, kernel, seed)
    masks = cpd.mask(model, share, pattern=f"{rows}x{columns}", max_ratio=1.0)
    for name, layer in prunable(model).items():
        matrix = layer.forward(masks.kept[name]).flatten(1)
        for top in range(0, matrix.shape[0], rows):
            for left in range(0, matrix.shape[1], columns):
                block = matrix[top : top + rows, left : left + columns]
                assert bool(block.all()) or not bool(block.any())
    assert abs(masks.zeros - share * masks.elements) <= rows * columns / 2 + 0.5


@settings(max_examples=30, deadline=None)
@given(SIZES, st.integers(1, 6), st.integers(1, 3), st.sampled_from(["1:2", "2:4", "4:8", "3:5"]), st.integers(0, 99))
def test_of_each_run_as_many_stay(outputs: int, runs: int, kernel: int, name: str, seed: int) -> None:
    stay, length = map(int, name.split(":"))
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(runs * length, outputs, kernel), nn.ConvTranspose2d(runs * length, outputs, kernel))
    masks = cpd.mask(model, pattern=name)
    for key, layer in prunable(model).items():
        found = layer.forward(masks.kept[key]).transpose(1, 2).reshape(-1, length)
        assert bool((found.sum(1) == stay).all())
        size = layer.forward(layer.weight.abs()).transpose(1, 2).reshape(-1, length)
        assert bool((torch.where(found, size, math.inf).amin(1) >= torch.where(found, 0, size).amax(1)).all())


def test_a_run_that_does_not_fit_leaves_the_layer_whole() -> None:
    masks = cpd.mask(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), pattern="2:4")
    assert [*masks.kept] == ["1.weight"]
    with pytest.raises(cpd.InputError, match="no layer has a number of channels that can be divided so"):
        cpd.mask(nn.Conv2d(3, 8, 3), pattern="2:4")


def test_kernels() -> None:
    model = nn.Conv2d(4, 6, 3)
    masks = cpd.mask(model, 0.5, pattern="kernel")
    inside = masks.kept["weight"].flatten(2)
    assert bool((inside.all(2) == inside.any(2)).all())
    assert int(inside.all(2).sum()) == 12
    order = model.weight.abs().sum((2, 3)).flatten().argsort()
    assert not inside.all(2).flatten()[order[:12]].any()


def test_the_norm_counts_for_blocks() -> None:
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor([[3.0, 0.0], [2.0, 2.0]])  # L1 3 and 4, L2 3 and 2.8
    for norm, row in ((1, 0), (2, 1)):
        masks = cpd.mask(model, 0.5, pattern="1x2", norm=norm)
        assert not masks.kept["weight"][row].any()


def test_ties_and_zeros_do_not_change_the_count() -> None:
    """`kthvalue` with a threshold would drop all weights of one size, or none."""
    model = nn.Linear(10, 10)
    for value in (1.0, 0.0):
        nn.init.constant_(model.weight, value)
        assert cpd.mask(model, 0.37).zeros == 37
    assert lowest(torch.ones(6), torch.full((6,), 4), 9).tolist() == [False, False, True, True, True, True]


def test_ratios_by_name_and_the_rest_makes_up() -> None:
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 10))
    masks = cpd.mask(model, 0.4, ratios={"0": 0.0, "2.*": 0.25})
    assert masks.by_layer["0.weight"] == 0
    assert masks.by_layer["2.weight"] == 0.25
    assert masks.zeros == 400
    with pytest.raises(cpd.InputError, match="'9' matches no layer that can be sparse; these are"):
        cpd.mask(model, 0.5, ratios={"9": 0.5})
    with pytest.raises(cpd.InputError, match="cannot be reached"):
        cpd.mask(model, 0.9, ratios={"0": 0.0})


def test_erdos_renyi_kernel() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 64, 3), nn.Linear(64, 10))
    found = prunable(model)
    total = sum(layer.weight.numel() for layer in found.values())
    masks = cpd.mask(model, 0.8, ratios="erk")
    assert abs(masks.zeros - 0.8 * total) <= len(found)
    density = {name: 1 - share for name, share in masks.by_layer.items()}
    raw = {name: sum(layer.weight.shape) / layer.weight.numel() for name, layer in found.items()}
    open_layers = [name for name in raw if density[name] < 0.999]
    ratios = [density[name] / raw[name] for name in open_layers]
    assert len(open_layers) >= 2
    assert max(ratios) / min(ratios) < 1.05
    assert all(share <= 0.5 for share in erk(found, 0.5 * total, 0.5).values())


def test_lamp_is_its_formula() -> None:
    scores = torch.tensor([4.0, 1.0, 9.0, 1.0]).double()
    expected = torch.tensor([4 / 13, 1 / 14, 1, 1 / 15]).double()
    torch.testing.assert_close(lamp(scores), expected)
    model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 4))
    model[1].weight.data *= 1e-3  # whatever the scale of a layer, LAMP does not empty it
    assert cpd.mask(model, 0.8).by_layer["1.weight"] > 0.9
    assert cpd.mask(model, 0.8, ratios="lamp").by_layer["1.weight"] < 0.8


def test_no_layer_is_emptied() -> None:
    model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 4))
    model[1].weight.data *= 1e-6
    assert cpd.mask(model, 0.5, max_ratio=0.75).by_layer["1.weight"] == 0.75


def test_shares_from_a_sensitivity() -> None:
    """The layer whose error rises ten times as fast has fewer zeros, and all have the same error."""
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    curves = SimpleNamespace(
        by_group={
            str(layer): [SimpleNamespace(ratio=ratio, error=steep * ratio) for ratio in (0.25, 0.5, 0.75)]
            for layer, steep in ((0, 1.0), (1, 2.0))
        }
    )
    shares = cpd.mask(model, 0.3, ratios=curves).by_layer
    assert shares["0.weight"] == pytest.approx(2 * shares["1.weight"], abs=0.01)
    with pytest.raises(cpd.InputError, match="pass the Sensitivity of the same model"):
        cpd.mask(model, 0.3, ratios=SimpleNamespace(by_group={"other": []}))


def test_what_can_be_sparse_is_told() -> None:
    """Weights of convolutions, linear layers and projections of attention, each once; no bias, norm or embedding."""
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({
        "conv": nn.Conv1d(2, 4, 3), "norm": nn.BatchNorm1d(4), "table": nn.Embedding(5, 4), "a": shared, "b": shared,
        "attention": nn.MultiheadAttention(4, 2),
    })  # fmt: skip
    assert [*prunable(model)] == ["conv.weight", "a.weight", "attention.in_proj_weight", "attention.out_proj.weight"]


@pytest.mark.parametrize("name", ["2:1", "0:4", "1x0", "x", "block", "2:4:8", "", "9" * 20 + ":4"])
def test_what_is_no_pattern(name: str) -> None:
    with pytest.raises(cpd.InputError, match="pattern must be"):
        Pattern.of(name)
    with pytest.raises(cpd.InputError, match="pattern must be"):
        cpd.mask(nn.Linear(4, 4), 0.5, pattern=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "sparsity must be given"),
        ({"sparsity": 0.7, "pattern": "2:4"}, "sets a share of 0.5 to zero: leave sparsity out"),
        ({"pattern": "2:4", "ratios": "erk"}, "leave ratios out"),
        ({"pattern": "2:4", "schedule": "cubic"}, "has no steps in between"),
        ({"sparsity": 1.0}, "sparsity must be"),
        ({"sparsity": 0.5, "pattern": "channel"}, "pass example_inputs="),
        ({"sparsity": 0.5, "criterion": "taylor"}, "needs data"),
        ({"sparsity": 0.5, "criterion": "tailor"}, "Is taylor meant"),
        ({"sparsity": 0.5, "ratios": "earth"}, "ratios must be erk, lamp"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(cpd.InputError, match=message):
        cpd.mask(nn.Linear(8, 8), **options)


# ------------------------------------------------------------------------------------------ scores of weights


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(16, 6, generator=generator), torch.randint(4, (16,), generator=generator)) for _ in range(3)]


def test_taylor_is_its_formula() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4))
    scores = torch.zeros(4, 6)
    for images, labels in batches():
        model.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        scores += (model[0].weight * model[0].weight.grad).square().detach()
    model.zero_grad()
    masks = cpd.mask(model, 0.5, criterion="taylor", data=batches())
    assert masks.kept["0.weight"].flatten()[scores.flatten().argsort()[12:]].all()
    assert model[0].weight.grad is None


def test_obs_keeps_what_cannot_be_made_up_for() -> None:
    """Inputs 0 and 1 are the same, so either can stand in for the other; input 2 is alone, and its weight smaller."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 1.1, 0.9]])
    rows = torch.randn(256, 1)
    data = [torch.cat([rows, rows + 0.01 * torch.randn(256, 1), torch.randn(256, 1)], 1)]
    assert cpd.mask(model, 1 / 3, criterion="magnitude").kept["weight"].tolist() == [[True, True, False]]
    assert cpd.mask(model, 1 / 3, criterion="obs", data=data).kept["weight"].tolist() == [[False, True, True]]


def test_a_criterion_of_ones_own() -> None:
    model = nn.Linear(4, 4)

    def columns(setting: Any) -> dict[str, Tensor]:
        return {name: torch.arange(4.0).expand(4, 4) for name in setting.layers}

    assert cpd.mask(model, 0.5, criterion=columns).kept["weight"].tolist() == [[False, False, True, True]] * 4
    with pytest.raises(cpd.InputError, match=r"returned \[2\] for weight"):
        cpd.mask(model, 0.5, criterion=lambda setting: {"weight": torch.ones(2)})
    with pytest.raises(cpd.TrainingError, match="not finite"):
        cpd.mask(model, 0.5, criterion=lambda setting: {"weight": torch.full((4, 4), torch.nan)})
