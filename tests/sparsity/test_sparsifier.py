"""Sparsifier: masks that change while a model is trained, weights that come back, and the closed form."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import cpd
from cpd.sparsity.closed_form import stages
from cpd.surgery.least_squares import NormalEquations, Sums, best_damping
from cpd.surgery.supported import _by_gradients, _by_zeros, _directly, solve_on

IMAGES = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, 6),
    ).eval()  # fmt: skip


def trained(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, each: Callable[[], object], first: int = 0
) -> None:
    model.train()
    for step in range(first, first + steps):
        images = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), torch.arange(8) % 6).backward()
        optimizer.step()
        each()


def made(model: nn.Module, **options: Any) -> tuple[cpd.Sparsifier, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    return cpd.Sparsifier(model, optimizer=optimizer, **options), optimizer


# ------------------------------------------------------------------------------------------ when, and how many


def test_the_cubic_schedule_is_that_of_zhu_and_gupta() -> None:
    model = network()
    sparsifier, optimizer = made(model, sparsity=0.9, schedule="cubic", interval=2, prune_until=0.8, steps=20)
    trained(model, optimizer, 20, sparsifier.step)
    assert [change.step for change in sparsifier.changes] == [2, 4, 6, 8, 10, 12, 14, 16]
    for index, change in enumerate(sparsifier.changes):
        assert change.sparsity == pytest.approx(0.9 * (1 - (1 - (index + 1) / 8) ** 3), abs=1e-3)
    assert sparsifier.done
    assert cpd.get_sparsity(model) == pytest.approx(0.9, abs=1e-3)
    assert [change.regrown for change in sparsifier.changes] == [0] * 8  # what has gone is smallest, so it stays away


@pytest.mark.parametrize("pattern", ["unstructured", "kernel", "1x3", "2:4"])
def test_zeros_stay_zero(pattern: str) -> None:
    model = network()
    sparsifier, optimizer = made(model, sparsity=None if ":" in pattern else 0.5, pattern=pattern, steps=6)
    found: list[float] = []
    trained(model, optimizer, 6, lambda: (sparsifier.step(), found.append(cpd.get_sparsity(model))))
    assert len(set(found)) == 1
    assert found[0] == pytest.approx(0.5, abs=3e-3)
    assert not any(bool(weight[~mask].any()) for weight, mask in sparsifier.masks.pairs(model))


def test_without_an_optimizer_nothing_would_keep_the_zeros() -> None:
    sparsifier = cpd.Sparsifier(network(), 0.5, steps=3)
    sparsifier.prune()  # without a training it needs none
    with pytest.raises(cpd.InputError, match="has no optimizer"):
        sparsifier.step()


def test_the_log_tells_the_share_of_all_weights(caplog: pytest.LogCaptureFixture) -> None:
    """The first layer has three input channels, which 2:4 does not divide: it stays whole."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    with caplog.at_level("INFO", logger="cpd"):
        cpd.Sparsifier(model, pattern="2:4", steps=0).prune()
    assert cpd.get_sparsity(model) == pytest.approx(288 / 792)
    assert "36.4% of the weights are zero" in caplog.text


def test_channels_end_as_a_plan() -> None:
    model = network()
    sparsifier, optimizer = made(
        model, sparsity=0.5, pattern="channel", schedule="linear", steps=10, example_inputs=IMAGES[:1]
    )
    trained(model, optimizer, 10, sparsifier.step)
    model.eval()
    masked = model(IMAGES)
    narrow = cpd.shrink(deepcopy(model), sparsifier.plan)
    torch.testing.assert_close(narrow(IMAGES), masked)
    assert sum(p.numel() for p in narrow.parameters()) < 0.55 * sum(p.numel() for p in model.parameters())


# ------------------------------------------------------------------------------------------ what comes back


def test_rigl_exchanges_the_smallest_for_the_largest_gradients() -> None:
    model = network()
    sparsifier, optimizer = made(model, sparsity=0.8, regrow="rigl", interval=2, prune_until=1.0, steps=8)
    seen: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    steps = 0

    def each() -> None:
        nonlocal steps
        steps += 1
        kept = {} if sparsifier.masks is None else dict(sparsifier.masks.kept)
        gradients = dict(sparsifier._keeper.gradients)
        sizes = {name: parameter.detach().abs() for name, parameter in model.named_parameters()}
        if sparsifier.step() and kept:
            for name, before in kept.items():
                now = sparsifier.masks.kept[name]
                assert int(now.sum()) == int(before.sum())  # of each layer as many stay
                gone, new = before & ~now, now & ~before
                if gone.any():
                    assert sizes[name][gone].max() <= sizes[name][before & now].min()
                    assert gradients[name][new].min() >= gradients[name][~before & ~now].max()
                    weight = dict(model.named_parameters())[name]
                    momentum = optimizer.state[weight]["momentum_buffer"]
                    assert not weight[new].any()
                    assert not momentum[new].any()  # it starts anew
            seen.append((kept, gradients))

    trained(model, optimizer, 8, each)
    assert len(seen) == 4
    assert [change.regrown > 0 for change in sparsifier.changes] == [
        False,
        True,
        True,
        True,
        False,
    ]
    assert cpd.get_sparsity(model) == pytest.approx(0.8, abs=2e-3)


def test_soft_pruning_lets_all_weights_be_trained_until_the_last_change() -> None:
    model = network()
    sparsifier, optimizer = made(model, sparsity=0.5, regrow="soft", interval=3, prune_until=0.5, steps=12)
    found: list[float] = []
    trained(model, optimizer, 12, lambda: (sparsifier.step(), found.append(cpd.get_sparsity(model))))
    assert found[0] == 0.5
    assert found[1] < 0.5  # weights that were zero have moved
    assert found[6:] == [0.5] * 6


def test_network_surgery_trains_the_dense_weights_by_the_masked_gradient() -> None:
    model = network()
    reference = deepcopy(model)
    sparsifier, optimizer = made(model, sparsity=0.5, regrow="splice", interval=4, prune_until=0.7, steps=12)
    sparsifier.prune()
    masks = sparsifier.masks
    dense = dict(sparsifier._keeper.dense())
    torch.testing.assert_close(dense["0.weight"], reference[0].weight.detach())
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(IMAGES[:8]), torch.arange(8) % 6).backward()
    gradient = model[0].weight.grad.clone()
    optimizer.step()
    torch.testing.assert_close(sparsifier._keeper.dense()["0.weight"], dense["0.weight"] - 0.05 * gradient)
    assert not model[0].weight[~masks.kept["0.weight"]].any()  # it runs masked
    trained(model, optimizer, 12, sparsifier.step)
    assert sparsifier.done
    assert sparsifier._keeper.dense() == {}
    assert cpd.get_sparsity(model) == 0.5


def test_network_surgery_brings_back_what_has_grown() -> None:
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    model[0].weight.data = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    sparsifier = cpd.Sparsifier(
        model, 0.5, regrow="splice", interval=1, prune_until=1.0, steps=3, optimizer=optimizer
    )  # fmt: skip
    sparsifier.prune()
    assert model[0].weight.tolist() == [[4.0, 3.0, 0.0, 0.0]]
    for gradient, expected in (([0, 0, 0, -2.1], [4, 0, 0, 0]), ([0, 0, 0, -0.5], [4, 0, 0, 3.6])):
        model[0].weight.grad = torch.tensor([gradient], dtype=torch.float32)
        optimizer.step()
        sparsifier.step()
        if expected[3]:
            torch.testing.assert_close(model[0].weight.detach(), torch.tensor([expected], dtype=torch.float32))
        else:  # 3.1 is larger than 3, but not by a tenth
            assert model[0].weight.tolist() == [[4.0, 3.0, 0.0, 0.0]]


# ------------------------------------------------------------------------------------------ on and on


@pytest.mark.parametrize("regrow", [None, "rigl", "soft", "splice"])
def test_a_run_that_goes_on_is_the_same(regrow: str | None) -> None:
    options: dict[str, Any] = {"sparsity": 0.8, "regrow": regrow, "interval": 2, "prune_until": 0.9, "steps": 14}
    options |= {} if regrow else {"schedule": "cubic"}
    model = network()
    sparsifier, optimizer = made(model, **options)
    trained(model, optimizer, 7, sparsifier.step)
    state, weights = sparsifier.state_dict(), deepcopy(model.state_dict())
    moments = deepcopy(optimizer.state_dict())
    trained(model, optimizer, 7, sparsifier.step, first=7)
    again = network()
    other, second = made(again, **options)
    other.load_state_dict(state)
    again.load_state_dict(weights)
    second.load_state_dict(moments)
    trained(again, second, 7, other.step, first=7)
    assert other.masks == sparsifier.masks
    assert other.changes == sparsifier.changes
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_state_of_another_run_is_refused() -> None:
    sparsifier = cpd.Sparsifier(network(), 0.5, steps=0)
    sparsifier.prune()
    state = sparsifier.state_dict()
    other = cpd.Sparsifier(nn.Sequential(nn.Linear(4, 4)), 0.5, steps=0)
    with pytest.raises(cpd.CheckpointError, match="state belongs to a different model"):
        other.load_state_dict(state)
    fresh = cpd.Sparsifier(network(), 0.5, steps=0)
    for wrong in ({}, {**state, "steps_taken": "x"}, {**state, "bits": {}}, {**state, "changes": []}):
        if wrong == {**state, "changes": []}:
            continue
        with pytest.raises(cpd.CheckpointError):
            fresh.load_state_dict(wrong)
    damaged = {**state, "bits": {name: bits ^ 1 for name, bits in state["bits"].items()}}
    with pytest.raises(cpd.CheckpointError, match="masks do not match their checksum"):
        fresh.load_state_dict(damaged)


# ------------------------------------------------------------------------------------------ the closed form


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 12), st.floats(0, 1), st.integers(0, 99))
def test_each_row_is_solved_on_its_own_support(
    groups: int, outputs: int, features: int, share: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, 40, features, generator=generator).double()
    xx = x.transpose(1, 2) @ x + torch.eye(features)
    cross = torch.randn(groups, outputs, features, generator=generator).double()
    support = torch.rand(groups, outputs, features, generator=generator) < share
    found = solve_on(support, xx, cross)
    for group in range(groups):
        for row in range(outputs):
            at = support[group, row]
            expected = torch.zeros(features).double()
            if at.any():
                expected[at] = torch.linalg.solve(xx[group][at][:, at], cross[group, row][at])
            torch.testing.assert_close(found[group, row], expected)
    torch.testing.assert_close(_by_gradients(support, xx, cross), found, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(_directly(support, xx, cross), found, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(_by_zeros(support, xx, cross), found, rtol=1e-7, atol=1e-7)


def test_damping_is_that_which_held_out_rows_prefer() -> None:
    """With few noisy rows much damping is better than little; with many it is the other way round."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(1, 3, 20, generator=generator)
    support = torch.rand(1, 3, 20, generator=generator) < 0.7

    def sums(rows: int, noise: float) -> Sums:
        x = torch.randn(1, rows, 20, generator=generator)
        wanted = x @ true.transpose(1, 2) + noise * torch.randn(1, rows, 3, generator=generator)
        return Sums.of(x, wanted, wanted[0])

    held = sums(2000, 0.0)
    few, _, before, after = best_damping(NormalEquations(sums(16, 3.0), False, support), held)
    many, change, _, _ = best_damping(NormalEquations(sums(5000, 0.1), False, support), held)
    assert few is None or few > many
    assert after <= before
    torch.testing.assert_close(change[support].float(), true[support], rtol=0, atol=0.5)
    assert not change[~support].any()


@pytest.mark.parametrize("takes_mean", [False, True])
def test_the_equations_are_solved_for_one_damping_after_another(takes_mean: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 50, 6, generator=generator) + 1
    lacking = torch.randn(2, 50, 3, generator=generator) + 2
    equations = NormalEquations(Sums.of(x, lacking, lacking[0]), takes_mean)
    away = [value.double() - value.double().mean(1, keepdim=True) * takes_mean for value in (x, lacking)]
    for damping in (0.1, 1e-4, 10.0, 0.1):
        xx = away[0].transpose(1, 2) @ away[0] / 50
        size = xx.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        cross = away[1].transpose(1, 2) @ away[0] / 50
        expected = cross @ torch.linalg.inv(xx + damping * size * torch.eye(6))
        torch.testing.assert_close(equations.solve(damping), expected, rtol=1e-4, atol=1e-5)
    assert not equations.solve(None).any()


def test_equations_that_rounding_has_left_short_of_positive_are_solved() -> None:
    x = torch.tensor([[[1.0, 1.0], [1.0, 1.0]]])
    found = Sums.of(x, x[:, :, :1], x[0])
    short = replace(found, xx=found.xx - 0.01 * torch.eye(2))
    assert NormalEquations(short, False).solve(1e-4).isfinite().all()


def test_stages_come_closer_and_closer() -> None:
    assert stages(0.0, 0.2) == [0.2]
    for before, after in ((0.0, 0.8), (0.0, 0.95), (0.5, 0.9), (0.0, 0.99)):
        found = stages(before, after)
        left = [1 - before, *(1 - share for share in found)]
        assert found[-1] == after
        assert all(later / earlier >= 0.599 for earlier, later in pairwise(left))
        assert found == sorted(found)


@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.7), ("2:4", None), ("kernel", 0.5)])
def test_a_refit_brings_the_model_nearer(pattern: str, sparsity: float | None) -> None:
    model = network()
    raw = cpd.mask(model, sparsity, pattern=pattern).apply(deepcopy(model))
    refitted = deepcopy(model)
    state = torch.get_rng_state()
    sparsifier = cpd.Sparsifier(refitted, sparsity, pattern=pattern, steps=0, data=list(IMAGES.split(16)))
    sparsifier.prune()
    assert torch.equal(torch.get_rng_state(), state)
    fresh = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(fresh)
        errors = [float((item(fresh) - expected).square().mean()) for item in (raw, refitted)]
    assert errors[1] < 0.9 * errors[0]
    assert not any(bool(weight[~mask].any()) for weight, mask in sparsifier.masks.pairs(refitted))
    assert sparsifier.recovery.samples == 64
    again = deepcopy(model)
    other = cpd.Sparsifier(again, sparsity, pattern=pattern, steps=0, data=list(IMAGES.split(16)))
    other.prune()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), refitted.parameters(), strict=True))


def test_a_model_wrapped_by_fsdp_is_refused() -> None:
    class FullyShardedDataParallel(nn.Module):
        pass

    model = nn.Sequential(FullyShardedDataParallel(), nn.Linear(2, 2))
    with pytest.raises(cpd.InputError, match="FSDP"):
        cpd.Sparsifier(model, 0.5, steps=0)
