"""Masks as values: applied, kept, saved, exchanged with torch, and together with plans."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import cpd


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
    ).eval()


IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PATTERNS = [("unstructured", 0.8), ("kernel", 0.5), ("1x3", 0.7), ("4x1", 0.7), ("2:4", None)]


@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
def test_there_and_back(pattern: str, sparsity: float | None, tmp_path: Path) -> None:
    model = network()
    masks = cpd.mask(model, sparsity, pattern=pattern)
    assert cpd.Masks.load(masks.save(tmp_path / "m.safetensors")) == masks
    assert cpd.Masks.load(tmp_path / "m.safetensors").pattern == pattern
    other = masks.to_torch(deepcopy(model))
    back = cpd.Masks.from_torch(other)
    assert back == masks
    masks.apply(model)
    torch.testing.assert_close(other(IMAGES), model(IMAGES), rtol=0, atol=0)
    assert cpd.get_sparsity(other) == cpd.get_sparsity(model)
    size = (tmp_path / "m.safetensors").stat().st_size
    assert size < masks.elements / 8 + 1500


def test_applied_is_a_plain_model(tmp_path: Path) -> None:
    """It has the names, classes and graph of the dense model, and goes wherever that goes."""
    dense, model = network(), network()
    masks = cpd.mask(model, 0.8)
    assert masks.apply(model) is model
    assert cpd.get_sparsity(model) == pytest.approx(0.8, abs=1e-3)
    plain = network()
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(plain(IMAGES), model(IMAGES))
    assert torch.equal(deepcopy(model)(IMAGES), model(IMAGES))
    kinds = [
        [node.op_type for node in onnx.load_from_string(cpd.export_onnx(item, IMAGES)).graph.node]
        for item in (dense, model)
    ]
    assert kinds[0] == kinds[1]
    narrow = cpd.shrink(model, cpd.comb(model, IMAGES[:1]).plan({"0": range(4)}))
    assert narrow[0].weight.shape == (4, 3, 3, 3)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_zeros_are_kept_through_a_training(optimizer: str) -> None:
    model = network().train()
    masks = cpd.mask(model, 0.8)
    made = (
        torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
        if optimizer == "sgd"
        else torch.optim.AdamW(model.parameters(), 1e-2)
    )
    before = model[0].weight.clone()
    with masks.keep(model, made) as handle:
        for _ in range(3):
            made.zero_grad()
            nn.functional.cross_entropy(model(IMAGES), torch.arange(4)).backward()
            assert any(parameter.grad[~mask].any() for parameter, mask in masks.pairs(model))
            handle.mask_gradients()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
            made.step()
            assert not any(bool(parameter[~mask].any()) for parameter, mask in masks.pairs(model))
            own = [p.grad for p in model.parameters()]
            assert norm == pytest.approx(float(torch.cat([g.flatten() for g in own]).norm()), rel=1e-4)
    assert not torch.equal(model[0].weight, before)
    assert not model._forward_pre_hooks
    made.zero_grad()
    nn.functional.cross_entropy(model(IMAGES), torch.arange(4)).backward()
    made.step()
    assert any(bool(parameter[~mask].any()) for parameter, mask in masks.pairs(model))  # the handle has been removed


def test_masks_of_another_model_change_nothing() -> None:
    masks, other = cpd.mask(network(), 0.5), nn.Sequential(nn.Conv2d(3, 8, 3))
    before = other[0].weight.clone()
    for use in (masks.apply, masks.to_torch, lambda model: masks.keep(model, torch.optim.SGD(model.parameters(), 0.1))):
        with pytest.raises(cpd.InputError, match=r"no parameter '3.weight'"):
            use(other)
    wide = network()
    wide[3] = nn.Conv2d(8, 9, 3)
    with pytest.raises(
        cpd.InputError, match=r"3.weight has shape \[9, 8, 3, 3\] here, and its mask has \[8, 8, 3, 3\]"
    ):
        masks.apply(wide)
    assert torch.equal(other[0].weight, before)
    with pytest.raises(cpd.InputError, match="No mask of torch"):
        cpd.Masks.from_torch(network())


def test_a_file_that_is_damaged_or_foreign(tmp_path: Path) -> None:
    path = cpd.mask(network(), 0.5).save(tmp_path / "m.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(cpd.ArtifactError, match="damaged"):
        cpd.Masks.load(path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(cpd.ArtifactError, match="cannot be read as masks"):
        cpd.Masks.load(path)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(cpd.ArtifactError, match="no masks of the format"):
        cpd.Masks.load(path)
    with pytest.raises(cpd.ArtifactError, match="is missing"):
        cpd.Masks.load(tmp_path / "none")


def test_torch_masks_of_several_kinds() -> None:
    model = network()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    prune.ln_structured(model[3], "weight", amount=0.25, n=2, dim=0)
    prune.random_unstructured(model[6], "weight", amount=100)
    masks = cpd.Masks.from_torch(model)
    assert {name: round(share, 3) for name, share in masks.by_layer.items()} == {
        "0.weight": 0.5, "3.weight": 0.25, "6.weight": 0.195,
    }  # fmt: skip
    expected = model(IMAGES)
    plain = network()
    assert torch.equal(masks.apply(plain)(IMAGES), expected)
    assert cpd.mask(model, 0.9).zeros > masks.zeros  # it goes on from a model with masks


def test_fake_sparsity_of_torch_ao() -> None:
    from torch.ao.pruning import WeightNormSparsifier

    model = network()
    sparsifier = WeightNormSparsifier(sparsity_level=0.5, sparse_block_shape=(1, 1), zeros_per_block=1)
    sparsifier.prepare(model, [{"tensor_fqn": "6.weight"}])
    sparsifier.step()
    masks = cpd.Masks.from_torch(model)
    assert masks.by_layer == {"6.weight": 0.5}


def test_sparsity_of_tensors_and_models() -> None:
    assert cpd.get_sparsity(torch.tensor([[0.0, 1.0], [0.0, 0.0]])) == 0.75
    model = network()
    assert cpd.get_sparsity(model) == 0
    model[0].weight.data[:4] = 0
    rows = cpd.get_sparsity(model, details=True)
    assert [(row.name, row.sparsity) for row in rows] == [("0.weight", 0.5), ("3.weight", 0.0), ("6.weight", 0.0)]
    assert cpd.get_sparsity(model) == 108 / (216 + 576 + 512)


# ------------------------------------------------------------------------------------------ with plans


def dead(model: nn.Sequential, channels: list[int]) -> cpd.Masks:
    """Masks that leave nothing of some channels of the first layer."""
    kept = torch.ones_like(model[0].weight, dtype=torch.bool)
    kept[channels] = False
    return cpd.Masks({"0.weight": kept})


def test_wholly_zero_channels_become_a_plan() -> None:
    model = network()
    comb = cpd.comb(model, IMAGES[:1])
    plan = dead(model, [1, 5]).plan(comb)
    assert plan.groups["0"] == (0, 2, 3, 4, 6, 7)
    reading = cpd.Masks({"3.weight": torch.ones(8, 8, 3, 3).bool().index_fill(1, torch.tensor([2]), False)})
    assert reading.plan(comb).groups["0"] == (0, 1, 3, 4, 5, 6, 7)
    assert not cpd.mask(model, 0.0).plan(comb).changes
    everything = dead(model, list(range(8))).plan(comb)
    assert len(everything.groups["0"]) == 1


def test_a_mask_of_channels_is_a_plan_that_changes_nothing_when_it_is_applied() -> None:
    model = network()
    comb = cpd.comb(model, IMAGES[:1])
    masks = cpd.mask(model, 0.5, pattern="channel", comb=comb)
    masks.apply(model)
    plan = masks.plan(comb)
    assert plan.changes
    masked = model(IMAGES)
    narrow = cpd.shrink(deepcopy(model), plan)
    torch.testing.assert_close(narrow(IMAGES), masked)
    assert narrow[0].out_channels < 8


def test_masks_of_a_narrower_model() -> None:
    model = network()
    masks = cpd.mask(model, 0.5)
    plan = cpd.comb(model, IMAGES[:1]).plan({"0": [0, 2, 4]})
    narrow = cpd.shrink(masks.apply(model), plan)
    found = masks.narrowed(plan)
    weights: dict[str, Tensor] = dict(narrow.named_parameters())
    for name, mask in found.kept.items():
        assert torch.equal(weights[name] != 0, mask)
