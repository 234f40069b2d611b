"""Shrink: what stays as it was, what follows the widths, and that a failed shrink changes nothing."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cpd.surgery.shrink
from cpd.errors import InputError, ShrinkError
from cpd.plan import Attribute, Plan, Rescale
from cpd.surgery.shrink import shrink
from helpers.zoo import comb, randomize, snapshot

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    """One layer of each kind that keeps its widths in attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.act = nn.PReLU(8)
        self.up = nn.ConvTranspose2d(8, 12, 1)
        self.groups = nn.GroupNorm(3, 12)
        self.layer = nn.LayerNorm(12)
        self.table = nn.Embedding(64, 12)
        self.fc = nn.Linear(12, 6)
        self.twin = nn.Linear(12, 6)
        self.twin.weight = self.fc.weight
        self.head = nn.Linear(6, 4)
        self.register_buffer("ids", torch.arange(64))

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.deep(F.relu(self.norm(self.stem(x)))))
        y = self.groups(self.up(y)).flatten(2).transpose(1, 2)
        y = self.layer(y + self.table(self.ids))
        return self.head(F.relu(self.fc(y)) + self.twin(y)).mean(1)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return comb(Small().eval(), X).plan(KEEP)


#: stem: channels; stem.weight and all that follows to `up`; up: groups of the norm, then channels in each.
KEEP = {"stem": [0, 2, 3, 5, 7], "up.bias": [0, 2], "up.bias#2": [1, 2, 3], "fc": [0, 1, 3, 5]}


def small() -> nn.Module:
    return randomize(Small()).eval()


def test_the_groups_are_those_that_the_tests_prune(plan: Plan) -> None:
    assert {name: list(plan.groups[name]) for name in KEEP} == KEEP


def test_bookkeeping_of_torch_nn(plan: Plan) -> None:
    model = shrink(small(), plan)
    found = [
        (model.stem.in_channels, model.stem.out_channels),
        (model.norm.num_features,),
        (model.deep.in_channels, model.deep.out_channels, model.deep.groups),
        (model.act.num_parameters,),
        (model.up.in_channels, model.up.out_channels),
        (model.groups.num_groups, model.groups.num_channels),
        model.layer.normalized_shape,
        (model.table.num_embeddings, model.table.embedding_dim),
        (model.fc.in_features, model.fc.out_features),
        (model.head.in_features, model.head.out_features),
    ]
    assert found == [(3, 5), (5,), (5, 5, 5), (5,), (5, 6), (2, 6), (6,), (64, 6), (6, 4), (4, 4)]
    assert isinstance(model.layer.normalized_shape, tuple)
    assert model.norm.running_mean.shape == model.norm.running_var.shape == (5,)
    assert model(X).shape == (2, 4)


def test_kept_values_are_the_old_ones_in_order(plan: Plan) -> None:
    model = small()
    before = copy.deepcopy(model)
    shrink(model, plan)
    assert torch.equal(model.stem.weight, before.stem.weight[KEEP["stem"]])
    assert torch.equal(model.norm.running_var, before.norm.running_var[KEEP["stem"]])
    assert torch.equal(model.fc.weight, before.fc.weight[KEEP["fc"]][:, [1, 2, 3, 9, 10, 11]])


def test_an_optimizer_made_before_still_trains_the_model(plan: Plan) -> None:
    model = small().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shrink(model, plan)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    F.cross_entropy(model(X), torch.tensor([0, 1])).backward()
    optimizer.step()
    assert {id(p) for p in model.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert set(changed) == set(before)


def test_flags_dtypes_layout_and_hooks_are_kept(plan: Plan) -> None:
    model = small().to(memory_format=torch.channels_last)
    model.stem.weight.requires_grad_(False)
    model.head.double()
    model.norm.train()
    calls: list[tuple[int, ...]] = []
    model.stem.register_forward_hook(lambda module, args, result: calls.append(tuple(result.shape)))
    model.stem.weight.mark = "mine"
    before = {name: (id(p), p.requires_grad, p.dtype, type(p)) for name, p in model.named_parameters()}
    shrink(model, plan)
    assert {name: (id(p), p.requires_grad, p.dtype, type(p)) for name, p in model.named_parameters()} == before
    assert model.stem.weight.mark == "mine"
    assert model.stem.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.stem.weight.is_contiguous()
    assert [module.training for module in (model, model.norm, model.stem)] == [False, True, False]
    model.head.float()
    model(X)
    assert calls == [(2, 5, 8, 8)]


def test_gradients_are_sliced_with_their_parameters(plan: Plan) -> None:
    model = small()
    model(X).sum().backward()
    model.head.bias.grad = None
    before = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    shrink(model, plan)
    assert torch.equal(model.stem.weight.grad, before["stem.weight"][KEEP["stem"]])
    assert torch.equal(model.head.weight.grad, before["head.weight"][:, KEEP["fc"]])
    assert model.head.bias.grad is None
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())


def test_tied_parameters_stay_tied(plan: Plan) -> None:
    model = shrink(small(), plan)
    assert model.fc.weight is model.twin.weight
    assert (model.twin.in_features, model.twin.out_features) == (6, 4)


def test_rows_are_rescaled_even_where_nothing_of_their_tensor_is_removed(plan: Plan) -> None:
    scaled = replace(plan, rescales=(Rescale("head.bias", 0, (1, 3), 0.5), Rescale("stem.weight", 0, (1, 2), 3.0)))
    model, plain = shrink(small(), scaled), shrink(small(), plan)
    assert torch.equal(model.head.bias, plain.head.bias * torch.tensor([1, 0.5, 1, 0.5]))
    assert torch.equal(model.stem.weight, plain.stem.weight * torch.tensor([1, 3, 1, 1, 1]).view(5, 1, 1, 1))


def other_stem() -> nn.Module:
    model = small()
    model.stem = nn.Conv2d(3, 9, 3)
    return model


def other_groups() -> nn.Module:
    model = small()
    model.groups.num_groups = 4
    return model


def no_twin() -> nn.Module:
    model = small()
    del model.twin
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (other_stem, r"stem\.weight has shape \[8, 3, 3, 3\]; in this model its shape is \[9, 3, 3, 3\]"),
        (other_groups, r"groups\.num_groups is 4, but the plan was made for 3"),
        (no_twin, r"twin\.weight has shape \[6, 12\]; in this model there is no such tensor"),
    ],
)
def test_a_plan_for_another_model_changes_nothing(plan: Plan, make, message: str) -> None:
    model = make()
    before = snapshot(model)
    with pytest.raises(ShrinkError, match=message):
        shrink(model, plan)
    assert snapshot(model) == before


def test_a_shrunk_model_is_not_shrunk_by_the_same_plan_again(plan: Plan) -> None:
    model = shrink(small(), plan)
    before = snapshot(model)
    with pytest.raises(ShrinkError, match="not to one already shrunk"):
        shrink(model, plan)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    "change",
    [
        {"attributes": (Attribute("gone", "groups", 2, 1),)},
        {"attributes": (Attribute("stem", "gone", 2, 1),)},
        {"rescales": (Rescale("gone", 0, (0,), 2.0),)},
        {"rescales": (Rescale("stem.weight", 0, (8,), 2.0),)},
    ],
)
def test_a_plan_with_unknown_places_changes_nothing(plan: Plan, change: dict) -> None:
    model = small()
    before = snapshot(model)
    with pytest.raises(ShrinkError):
        shrink(model, replace(plan, **change))
    assert snapshot(model) == before


def test_a_shrink_that_fails_half_way_is_undone(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small().to(memory_format=torch.channels_last)
    model(X).sum().backward()
    before = snapshot(model)

    def broken(module: nn.Module) -> None:
        assert module.stem.out_channels == 5
        raise RuntimeError("half way")

    monkeypatch.setattr(cpd.surgery.shrink, "lint", broken)
    with pytest.raises(RuntimeError, match="half way"):
        shrink(model, plan)
    assert snapshot(model) == before


def test_lint_refuses_a_plan_that_forgets_the_bias(plan: Plan) -> None:
    model = small()
    before = snapshot(model)
    kept = {name: dims for name, dims in plan.kept.items() if name != "fc.bias"}
    with pytest.raises(ShrinkError, match=r"fc would have a weight of shape \[4, 6\] and a bias of \[6\]"):
        shrink(model, replace(plan, kept=kept))
    assert snapshot(model) == before


def test_shrink_takes_modules_alone(plan: Plan) -> None:
    with pytest.raises(InputError, match=r"torch\.nn\.Module"):
        shrink({}, plan)


def test_training_goes_on_while_an_earlier_loss_is_held():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    combed = cpd.comb(model, torch.randn(1, 3, 8, 8))
    loss = model(torch.randn(2, 3, 8, 8)).square().mean()  # held, as a training loop does
    loss.backward()
    cpd.shrink(model, combed.plan({combed.open[0].name: range(5)}))
    model(torch.randn(2, 3, 8, 8)).square().mean().backward()
    assert model[0].weight.grad.shape == (5, 3, 3, 3)
    assert loss.requires_grad
