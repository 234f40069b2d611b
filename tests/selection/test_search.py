"""The search that ends on a measured target, however wrong the prediction."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import cpd
from cpd.selection import decision
from cpd.selection.common import Found
from cpd.selection.decision import Decider
from cpd.selection.limits import Limits
from cpd.selection.search import Candidate, Search
from cpd.selection.selector import Selector
from cpd.selection.target import Target

IMAGE = torch.randn(1, 3, 64, 64)


class Stopwatch:
    """Latencies from a formula, off from the prediction by a power, for a search without exports."""

    is_profiled = True

    def __init__(self, combed: Any, power: float, noise: float = 0) -> None:
        self.noise = noise
        self.combed, self.power, self.full = combed, power, combed.cost({}).macs
        self.observed: list[tuple[float, float]] = [(0.0, 0.0)]
        self.exports = 0

    def raw(self, counts: Any) -> float:
        return math.log(self.full / self.combed.cost(counts).macs)

    # what the search asks of the latency model
    def speedup(self, counts: Any) -> float:
        found, real = zip(*sorted(self.observed), strict=True)
        raw = self.raw(counts)
        return math.exp(np.interp(raw, found, real) if raw < found[-1] else raw + real[-1] - found[-1])

    def observe(self, counts: Any, speedup: float, runtime: str = "") -> None:
        self.observed.append((self.raw(counts), math.log(speedup)))

    def milliseconds(self, counts: Any) -> float:
        return 10 / self.speedup(counts)

    def local(self, counts: Any) -> dict[Any, float]:
        return {}

    def fixed(self) -> dict[str, float]:
        return {"goes into calling nodes": 0.4, "goes into Softmax": 0.0}

    # and of the probe
    def compare(self, model: nn.Module, **_: Any) -> Any:
        self.exports += 1
        macs = cpd.comb(model, IMAGE).cost({}).macs
        speedup = (self.full / macs) ** self.power
        low, high = speedup / (1 + self.noise), speedup * (1 + self.noise)
        return SimpleNamespace(
            speedup=speedup, speedup_low=low, speedup_high=high, original_ms=10.0, candidate_ms=10.0 / speedup,
            runtime="a watch",
        )  # fmt: skip


@pytest.fixture(scope="module")
def selector() -> Selector:
    torch.manual_seed(0)
    layers = [part for width in (3, 64, 128, 96, 64, 128) for part in (nn.LazyConv2d(2 * width, 3), nn.ReLU())]
    model = nn.Sequential(*layers, nn.LazyConv2d(4, 1)).eval()
    model(IMAGE)
    combed = cpd.comb(model, IMAGE)
    return Selector(combed, cpd.score(model, combed, criterion="magnitude"), Limits(round_to=8))


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("target", [Target("target_speedup", 2.0), Target("target_latency_ms", 5.0)])
def test_the_search_ends_on_target_however_wrong_the_prediction(selector, power, target):
    watch = Stopwatch(selector.comb, power)
    search = Search(selector.comb.model, selector, watch, watch, target, 10.0)
    best, tried = search.finish(), search.tried
    assert abs(best.attained - 1) < 0.05
    assert best.speedup == pytest.approx(2, rel=0.05)
    assert len(tried) == watch.exports <= 4


def test_what_is_on_target_but_for_the_error_of_its_measurement_is_not_improved_on(selector):
    target = Target("target_speedup", 2.0)
    exact, blurred = Stopwatch(selector.comb, 1.08), Stopwatch(selector.comb, 1.08, noise=0.1)
    search = Search(selector.comb.model, selector, exact, exact, target, 10.0)
    search.finish()
    first, *others = search.tried
    assert others
    assert not first.is_within(0.025)
    search = Search(selector.comb.model, selector, blurred, blurred, target, 10.0)
    search.finish()
    (only,) = search.tried
    assert only.attained == first.attained


@pytest.mark.parametrize("power", [0.8, 1.0, 1.5])
def test_a_machine_that_was_busy_at_first_does_not_end_at_the_narrowest_widths(selector, power):
    class Busy(Stopwatch):
        """Four timings come out at widths that seem to bring nothing."""

        def compare(self, model: nn.Module, **options: Any) -> Any:
            found = super().compare(model, **options)
            return SimpleNamespace(**{**vars(found), "speedup": 1.1}) if self.exports <= 4 else found

    watch = Busy(selector.comb, power)
    search = Search(selector.comb.model, selector, watch, watch, Target("target_speedup", 2.0), 10.0)
    best = search.finish()
    assert search.tried[4].counts == selector.least()
    assert search.tried[4].attained > 2
    assert best.speedup == pytest.approx(2, rel=0.05)
    assert len(search.tried) <= 8


def test_a_target_out_of_reach_says_what_can_be(selector):
    watch = Stopwatch(selector.comb, 0.1)
    with pytest.raises(cpd.TargetError, match=r"target_speedup=9 cannot be reached.*times as fast.*Ask for 1\.\d"):
        Search(selector.comb.model, selector, watch, watch, Target("target_speedup", 9.0), 10.0).finish()
    told = r"% of the original's are left .* 4.0% goes into calling nodes\. Frozen groups hold"
    with pytest.raises(cpd.TargetError, match=told) as caught:
        Search(selector.comb.model, selector, watch, watch, Target("target_speedup", 9.0), 10.0).finish()
    assert "Softmax" not in str(caught.value)
    with pytest.raises(cpd.TargetError, match="nothing to do"):
        Search(selector.comb.model, selector, watch, watch, Target("target_latency_ms", 11.0), 10.0).finish()


def test_a_search_goes_on_from_a_timing(selector):
    """The last timing of a plan says that it is slower than the search had found: the next widths are narrower."""
    watch, target = Stopwatch(selector.comb, 0.7), Target("target_speedup", 2.0)
    first = Search(selector.comb.model, selector, watch, watch, target, 10.0).finish()
    later = Stopwatch(selector.comb, 0.6)
    narrower = cpd.shrink(cpd.model.tensors.copy_of(selector.comb.model), first.plan)
    seen = first.counts, later.compare(narrower)
    search = Search(selector.comb.model, selector, later, later, target, 10.0, timed=seen)
    assert len(search.tried) == 1
    found = search.finish()
    assert abs(found.speedup / 2 - 1) < 0.05
    assert found.macs_ratio < first.macs_ratio
    there = Search(selector.comb.model, selector, later, later, target, 10.0, timed=(found.counts, found.latency))
    assert there.finish().counts == found.counts  # on target: nothing more is measured
    assert len(there.tried) == 1


def test_a_bound_that_asks_for_less_decides_and_a_faster_result_is_on_target(selector):
    """Half of the MACs' parameters are allowed, at a speed that more would reach: one candidate, and it is taken."""
    comb, whole = selector.comb, selector.comb.cost({}).parameters
    bounds = SimpleNamespace(
        asked=True, check=lambda *_: None, excess=lambda comb, counts: comb.cost(counts).parameters / (0.5 * whole),
        saw=lambda *_: None,
    )  # fmt: skip
    watch = Stopwatch(comb, 1.0)
    watch.artifact = lambda model: model
    search = Search(comb.model, selector, watch, watch, Target("target_speedup", 1.2), 10.0, bounds=bounds)
    found = search.finish()
    assert comb.cost(found.counts).parameters <= 0.5 * whole
    assert found.bound
    assert found.speedup > 1.2 * 1.05
    assert len(search.tried) == 1


def test_the_note_names_the_scope_that_was_taken(monkeypatch):
    """Of two scopes the nearer one turns out not to reach the target."""

    class Fixed:
        def __init__(self, model: Any, selector: Any, *_: Any) -> None:
            self.selector, self.tried = selector, []

        def step(self) -> None:
            latency = SimpleNamespace(speedup=2.1, speedup_low=2.1, speedup_high=2.1)
            self.tried.append(Candidate({}, self.plan(), 0.4, 2.0, latency, 1.05))

        def plan(self) -> Any:
            return SimpleNamespace(groups={"a": (0,)}, error=self.selector.error)

        def finish(self) -> Any:
            if self.selector.error == 0.1:
                raise cpd.TargetError("out of reach")
            return self.tried[-1]

    monkeypatch.setattr(decision, "Search", Fixed)
    decider = Decider.__new__(Decider)
    decider.comb = SimpleNamespace(model=None, cost=lambda counts: SimpleNamespace(macs=100 if not counts else 40))
    decider._found, decider._timed, decider.bounds = Found(), None, None
    decider.target, decider.tolerance = Target("target_speedup", 2.0), 0.05
    decider.search = [{"scope": "global", "verdict": "chosen, 1.0 % faster than asked"}]  # of the first shrink, say
    decider.counts = decider._probe = decider._latency = decider._original_ms = lambda *_: {"a": 1}
    decider._error_of = lambda plan, roughly: plan.error
    selectors = {
        scope: SimpleNamespace(comb=decider.comb, error=error) for scope, error in (("global", 0.1), ("group", 0.2))
    }
    chosen, plan, (note,) = decider._measured(selectors)
    assert (chosen, plan.error) == ("group", 0.2)
    assert [(row["scope"], row["verdict"]) for row in decider.search] == [
        ("global", "chosen at first, 1.0 % faster than asked"),
        ("global", "5.0 % faster than asked"),
        ("group", "chosen, 5.0 % faster than asked"),
    ]
    assert decider.search[-1]["attained"] == 1.05
    assert note == (
        "Ranking scope: group (what should be on target: global keeps 40.0% of the MACs, relative error of the logits "
        "0.1; group keeps 40.0% of the MACs, relative error of the logits 0.2)."
    )


def test_a_leap_over_the_target_is_taken_back(selector):
    """A figure that leaps by one step: other groups come back, as far as it goes."""
    combed, cost, full = selector.comb, selector.comb.cost, selector.comb.cost({}).macs
    stem = combed.open[0]

    def figure(counts: Any) -> float:
        return full / cost(counts).macs * (1.5 if counts[stem.axis] < stem.size else 1.0)

    steps = [figure(selector.counts(step)) for step in range(len(selector._path))]
    index = next(i for i, (a, b) in enumerate(itertools.pairwise(steps)) if b / a > 1.4)
    target = steps[index] * 1.2
    counts = selector.reach(figure, target)
    assert target <= figure(counts) < steps[index + 1]
    assert cost(counts).macs > cost(selector.counts(index + 1)).macs


def test_a_wider_layer_that_is_as_fast_is_kept_wide(selector):
    class Teeth:
        """Vectors of 32."""

        def milliseconds(self, counts: Any) -> float:
            return sum(math.ceil(width / 32) for axis, width in counts.items() if axis in axes)

        def local(self, counts: Any) -> dict[Any, float]:
            return {axis: math.ceil(counts[axis] / 32) for axis in axes}

    groups = selector.comb.open[1:3]
    axes = {group.axis for group in groups}
    counts = {group.axis: group.size for group in selector.comb.groups} | {group.axis: 40 for group in groups}
    found = selector.widened(counts, Teeth())
    assert [found[group.axis] for group in groups] == [64, 64]
