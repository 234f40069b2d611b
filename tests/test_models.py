"""The models of the issue, unmodified, by the same code: each oracle of the design on a random 30 % of every group.

One comb a model: pytest runs all tests of one model one after the other, and the fixture holds what they share.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from torch import Tensor, nn

from cpd.coupling.comb import Comb
from cpd.deploy.export import export_onnx, onnx_parity
from cpd.model.architecture import architecture_of
from cpd.plan import Plan
from cpd.surgery.masked import masked_error
from cpd.surgery.shrink import shrink
from helpers.zoo import (
    MODELS,
    assert_shapes_as_predicted,
    comb,
    counts,
    dense,
    images,
    names_of,
    random_plan,
    relative_error,
    zeroed,
)


@dataclass
class Case:
    """A model, its comb, and 30 % of every open group removed."""

    name: str
    model: nn.Module
    comb: Comb
    x: Tensor
    plan: Plan
    shrunk: nn.Module

    @cached_property
    def again(self) -> Comb:
        """The comb of the shrunk model."""
        return comb(self.shrunk, self.x)


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    make, side = MODELS[request.param]
    model, x = dense(make()), images(side)
    combed = comb(model, x)
    plan = random_plan(combed)
    return Case(request.param, model, combed, x, plan, shrink(copy.deepcopy(model), plan))


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def test_exact_groups_shrink_to_what_zeroing_gives(case: Case) -> None:
    """Zeroing here is plain: slices of the weights set to zero, the model's own forward run."""
    plan = random_plan(case.comb, exact=True, seed=1)
    assert plan.kept
    shrunk = shrink(copy.deepcopy(case.model), plan)
    masked = zeroed(case.model, plan)
    expected = output(masked, case.x)
    assert relative_error(output(shrunk, case.x), expected) < 1e-9
    assert relative_error(output(shrunk.float(), case.x.float()), output(masked.float(), case.x.float())) < 1e-4
    assert relative_error(output(case.model, case.x), expected) > 1e-3  # something was removed


def test_all_groups_shrink_to_what_masking_gives(case: Case) -> None:
    assert masked_error(case.model, case.shrunk, case.comb, case.plan) < 1e-9


def test_at_most_three_quarters_of_the_parameters_remain(case: Case) -> None:
    before, after = (sum(p.numel() for p in model.parameters()) for model in (case.model, case.shrunk))
    assert after <= 0.75 * before


def test_the_model_stays_the_object_and_the_class_it_was(case: Case) -> None:
    model = copy.deepcopy(case.model)
    modules = {path: (id(module), type(module)) for path, module in model.named_modules()}
    tensors = {name: id(tensor) for name, tensor in model.named_parameters()}
    assert shrink(model, case.plan) is model
    assert {path: (id(module), type(module)) for path, module in model.named_modules()} == modules
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == tensors
    assert type(model) is type(case.model)
    assert model.state_dict().keys() == case.model.state_dict().keys()


def test_shapes_are_as_predicted(case: Case) -> None:
    assert_shapes_as_predicted(case.comb, case.plan, case.again)


def test_the_architecture_is_predicted(case: Case) -> None:
    assert case.comb.architecture.difference(architecture_of(case.model)) is None
    narrower = case.comb.architecture.narrowed(case.plan)
    assert narrower.fingerprint == architecture_of(case.shrunk).fingerprint == case.again.architecture.fingerprint


def test_cost_is_predicted_without_a_trace(case: Case) -> None:
    predicted = case.comb.cost(counts(case.comb, case.plan))
    assert predicted.parameters == sum(p.numel() for p in case.shrunk.parameters())
    assert predicted == case.again.cost({})
    full = case.comb.cost({})
    assert full.parameters == sum(p.numel() for p in case.model.parameters())
    assert predicted.macs < 0.8 * full.macs
    assert predicted.activations < full.activations


def test_the_shrunk_model_combs_and_shrinks_again(case: Case) -> None:
    assert names_of(case.again.groups) == names_of(case.comb.groups)
    assert [group.size for group in case.again.groups] == [len(kept) for kept in case.plan.groups.values()]
    still_open = set(names_of(case.again.open))
    lost = set(names_of(case.comb.open)) - still_open
    assert still_open <= set(names_of(case.comb.open))
    assert all(group.size == 1 or group.ties for group in case.again.groups if group.name in lost)
    assert len(lost) <= 0.1 * len(case.comb.open)
    plan = random_plan(case.again, seed=2)
    twice = shrink(copy.deepcopy(case.shrunk), plan)
    assert masked_error(case.shrunk, twice, case.again, plan) < 1e-9
    assert sum(p.numel() for p in twice.parameters()) < sum(p.numel() for p in case.shrunk.parameters())


def test_a_train_step_runs_at_another_batch_size(case: Case) -> None:
    model = copy.deepcopy(case.shrunk).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = nn.functional.cross_entropy(model(images(case.x.shape[-1], batch=3)), torch.tensor([0, 1, 2]))
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed >= {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
    assert len(changed) > 0.8 * len(before)  # a bias ahead of a batch norm has no gradient


def test_a_plan_survives_json_to_the_bit(case: Case) -> None:
    plan = Plan.from_dict(json.loads(json.dumps(case.plan.to_dict())))
    assert plan.to_dict() == case.plan.to_dict()
    fresh = shrink(copy.deepcopy(case.model), plan)
    assert torch.equal(output(fresh, case.x), output(case.shrunk, case.x))


def test_onnx_agrees_with_pytorch_on_the_shrunk_model(case: Case) -> None:
    model, x = copy.deepcopy(case.shrunk).float(), case.x.float()
    assert onnx_parity(model, export_onnx(model, x, check=False), x) < 1e-4
