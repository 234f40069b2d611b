"""Random models: whatever the comb calls prunable must shrink to what masking gives.

A model is a list of steps, each a kind of layer, its arguments, and the earlier values that it takes. Hypothesis draws
the steps, so a failing model shrinks to few and small ones, and the text of its steps rebuilds it.

`CPD_EXAMPLES=2000 pytest tests/test_random_graphs.py` looks further than the fast suite does, `CPD_SEED=7` elsewhere.
"""

from __future__ import annotations

import copy
import os
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, assume, currently_in_test_context, given, note, seed, settings
from hypothesis import strategies as st

from cpd.coupling.comb import Comb
from cpd.model.architecture import architecture_of
from cpd.plan import Plan
from cpd.surgery.masked import masked_error
from cpd.surgery.shrink import shrink
from helpers import random_oddities  # noqa: F401 (enters its kinds)
from helpers.random_models import BATCH, CLASSES, KINDS, SIDE, Net, Step, steps_of_a_model
from helpers.zoo import (
    around,
    assert_shapes_as_predicted,
    comb,
    dense,
    going_on,
    random_branches,
    random_plan,
    relative_error,
    snapshot,
    zeroed,
)

EXAMPLES = int(os.environ.get("CPD_EXAMPLES", "150"))
SEED = os.environ.get("CPD_SEED")
HEADS, SHARES = ["mean", "flatten", "first"], [0.2, 0.3, 0.5]


def check(steps: list[tuple], head: str = "mean", share: float = 0.3, number: int = 0) -> tuple[Comb, Plan]:
    """Comb the model of these steps, shrink copies by random plans, and compare them with masking."""
    model = dense(Net([Step(*step) for step in steps], head), number)
    before = snapshot(model)
    x = torch.randn(BATCH, 3, SIDE, SIDE, dtype=torch.double, generator=torch.Generator().manual_seed(number))
    combed = comb(model, x)
    assert combed.model is model
    assert not combed.unknown
    plan = random_plan(combed, share, seed=number, at_least=1)
    shrunk = shrink(copy.deepcopy(model), plan)
    assert combed.architecture.narrowed(plan).fingerprint == architecture_of(shrunk).fingerprint
    with torch.no_grad():
        assert shrunk(x).shape == (BATCH, CLASSES)
    assert masked_error(model, shrunk, combed, plan) <= 1e-9
    exact = random_plan(combed, share, exact=True, seed=number, at_least=1)
    with torch.no_grad():
        found, expected = shrink(copy.deepcopy(model), exact)(x), zeroed(model, exact)(x)
    assert relative_error(found, expected) <= 1e-9
    assert_selected_within(combed, plan, number)
    assert_selected_around(combed, plan, number)
    if number % 4 == 1:
        assert_branches_go(model, combed, plan, x, number)
    if number % 4 == 0:  # the shrunk model is combed again: as slow as all the rest
        again = comb(shrunk, x)
        assert_shapes_as_predicted(combed, plan, again)
        assert again.cost({}) == combed.cost({g.axis: len(plan.groups[g.name]) for g in combed.groups})
    assert snapshot(model) == before
    return combed, plan


def assert_branches_go(model: torch.nn.Module, combed: Comb, first: Plan, x: torch.Tensor, number: int) -> None:
    """Some branches, then all that can, go beside channels: removed is masked, and costs what is foretold."""
    for share in (0.3, 1.0):
        removed = random_branches(combed, share, seed=number)
        if not removed:
            return
        plan = combed.plan(first.groups, remove=removed)
        assert_selected_around(combed, plan, number)
        small = shrink(copy.deepcopy(model), Plan.from_dict(plan.to_dict()))
        if currently_in_test_context():
            note(f"without {removed}")
        assert masked_error(model, small, combed, plan) <= 1e-9
        again = comb(small, x)
        assert_shapes_as_predicted(combed, plan, again)
        cost = combed.without(removed).cost({g.axis: len(plan.groups[g.name]) for g in combed.groups})
        assert cost.macs == again.cost({}).macs
        assert cost.parameters == sum(parameter.numel() for parameter in small.parameters())
        small.train()(x).sum().backward()


def assert_selected_within(combed: Comb, first: Plan, number: int) -> None:
    """What is selected after a plan keeps nothing that the plan removed: pruning goes on from there."""
    selector = going_on(combed, first, number, 1 + number % 3)
    for share in (0.0, 0.4, 0.7, 1.0):
        selector.plan(selector.counts(round(share * (len(selector._path) - 1)))).since(first)


def assert_selected_around(combed: Comb, inner: Plan, number: int) -> None:
    """What is selected around a plan keeps all that the plan keeps: the members of a family are nested."""
    selector = around(combed, inner, number, 1 + number % 3)
    for share in (0.0, 0.4, 0.7, 1.0):
        inner.since(selector.plan(selector.counts(round(share * (len(selector._path) - 1)))))


#: Models that were wrong once, as `check` takes them, and how.
MENDED = {
    "heads whole while the channels that they divide are narrower": (
        [("Conv", (3, 3), (0,)), ("CrossCovariance", (3,), (1,)), ("Narrowed", (1,), (2,)), ("Gram", (), (3,))],
        "mean", 0.2, 0,
    ),
    "a branch within an arm that went with it whenever it was tried": (
        [("Conv", (5, 3), (0,)), ("Flattened", (), (1,)), ("CrossAttention", (2, 3, "none"), (2, 2)),
         ("Linear", (4,), (3,)), ("HandNorm", (), (1,))],
        "flatten", 0.3, 1,
    ),
    "five heads of a width that four copies left as wide as the heads, by chance": (
        [("Conv", (6, 3), (0,)), ("StandardisedConv", (5,), (1,)), ("GroupNorm", (5,), (2,)),
         ("CrossCovariance", (5,), (3,)), ("CrossCovariance", (1,), (4,))],
        "mean", 0.2, 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MENDED.values(), ids=MENDED)
def test_models_that_were_wrong_once(case: tuple[list[tuple], str, float, int]) -> None:
    check(*case)


#: Kinds whose own tensors have no dimension that can shrink: one channel, windows of two, or the corners of boxes.
FROZEN = {"NeighbourGate", "SpaceGate", "Regions"}


@pytest.mark.parametrize("kind", KINDS)
def test_random_models_shrink_to_what_masking_gives(kind: str) -> None:
    """Every model holds a layer of `kind`; most must lose something, and the layer's own weights in at least one."""
    tally: Counter[str] = Counter()

    @settings(
        max_examples=max(3, round(EXAMPLES / len(KINDS))),
        deadline=None,
        derandomize=SEED is None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data(), st.sampled_from(HEADS), st.sampled_from(SHARES), st.integers(0, 99))
    def models_shrink(data: st.DataObject, head: str, share: float, number: int) -> None:
        steps = steps_of_a_model(lambda options: data.draw(st.sampled_from(options)), kind)
        assume(steps is not None)
        note(f"check({[tuple(step) for step in steps]}, {head!r}, {share}, {number})")
        combed, plan = check(steps, head, share, number)
        own = {member.tensor.split(".")[1] for group in combed.open for member in group.members}
        places = [index for index, step in enumerate(steps) if step.kind == kind]
        has_weights = any(name.startswith(f"layers.{index}.") for name in combed.dims for index in places)
        tally.update(models=1, losing=bool(plan.kept), weights=has_weights)
        tally.update(narrower=any(str(index) in own for index in places))

    (models_shrink if SEED is None else seed(int(SEED))(models_shrink))()
    assert tally["losing"] >= 0.25 * tally["models"]  # pieces of one channel have nothing to lose
    few = tally["models"] < 4  # layers of one or two positions may all be frozen
    assert tally["narrower"] or not tally["weights"] or kind in FROZEN or few
