"""Search: the widths whose *measured* speed-up, in the runtime that ships, is the one asked for.

The latency model says which widths to try; each candidate is shrunk, exported and timed beside the original, and what
was measured corrects the model. The measurement decides.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from cpd.algebra.axes import Axis
from cpd.deploy.latency import LatencyComparison, LatencyProbe
from cpd.deploy.latency_model import LatencyModel
from cpd.deploy.several import SlowestModel
from cpd.errors import TargetError
from cpd.model.tensors import copy_of
from cpd.plan import Plan
from cpd.selection.bounds import Bounds
from cpd.selection.obstacles import obstacles
from cpd.selection.selector import Selector
from cpd.selection.target import Target
from cpd.surgery.shrink import shrink

log = logging.getLogger("cpd")

#: Candidates of one search that are exported and timed at most: where they are predicted from the runtime's own
#: kernels, and where from those of another runtime.
MAX_CANDIDATES, MAX_CANDIDATES_UNPROFILED, MAX_RETURNS = 4, 6, 3
#: Seconds that one candidate is timed.
SECONDS = 6.0


@dataclass(frozen=True)
class Candidate:
    """One measured set of widths.

    Attributes:
        counts: the width of each axis.
        plan: what is kept.
        macs_ratio: share of the original's MACs that is left.
        predicted: the speed-up that the latency model gave.
        latency: its measured comparison with the original.
        attained: how fast it is for what was asked: 1 is the target, above is faster.
        excess: the largest share of a bound that it takes; above 1, one is exceeded.
        bound: whether a bound asked for narrower widths than the target did.
    """

    counts: Mapping[Axis, int]
    plan: Plan
    macs_ratio: float
    predicted: float
    latency: LatencyComparison
    attained: float
    excess: float = 0.0
    bound: bool = False

    @property
    def speedup(self) -> float:
        """Measured latency of the original over the candidate's."""
        return self.latency.speedup

    def is_within(self, distance: float) -> bool:
        """Whether it is within a relative distance of the target, give or take a standard error of its measurement."""
        interval = (self.latency.speedup_high - self.latency.speedup_low) / self.speedup
        return self.off <= distance + interval / 4 and self.excess <= 1  # of 95 %: two standard errors on either side

    def verdict(self, *, chosen: bool) -> str:
        """What came of it, in a few words: `chosen, 0.6 % faster than asked`."""
        off = f"{abs(self.attained - 1):.1%}".replace("%", " %")
        found = f"{off} {'faster' if self.attained >= 1 else 'slower'} than asked"
        over = [f"{self.excess - 1:.1%} over a bound".replace("%", " %")] if self.excess > 1 else []
        return ", ".join([*(["chosen"] if chosen else []), found, *over])

    @property
    def off(self) -> float:
        """How far it is from the target, as a fraction; where a bound decided, being faster is not."""
        return max(1 - self.attained, 0.0) if self.bound else abs(self.attained - 1)


class Search:
    """A search for widths whose measured speed-up or latency is within `tolerance` of `target`, a candidate at a time.

    Args:
        model: the unpruned model; left as it was.
        selector: gives the order in which channels go.
        probe: times candidates beside the original.
        latency: predicts; corrected by what is measured.
        target: the speed-up or latency asked for.
        original_ms: the latency of the original.
        tolerance: the relative distance from the target that is good enough; the search aims at half of it, give
            or take a standard error of the measurement.
        original_macs: multiply-accumulates of the original; None: of the selector's comb, of which no branch has gone.
        timed: widths that were timed already, and how fast they are: the search goes on from there.
        bounds: what the model may take beside the target; None: as much as it likes.

    Attributes:
        tried: all that was measured.
    """

    def __init__(
        self,
        model: nn.Module,
        selector: Selector,
        probe: LatencyProbe,
        latency: LatencyModel | SlowestModel,
        target: Target,
        original_ms: float,
        tolerance: float = 0.05,
        original_macs: int | None = None,
        timed: tuple[Mapping[Axis, int], LatencyComparison] | None = None,
        bounds: Bounds | None = None,
    ) -> None:
        self.model, self.selector, self.probe, self.latency = model, selector, probe, latency
        self.target, self.tolerance, self.tried = target, tolerance, list[Candidate]()
        self._macs = selector.comb.cost({}).macs if original_macs is None else original_macs
        self._most = MAX_CANDIDATES if probe.is_profiled else MAX_CANDIDATES_UNPROFILED
        self._goal, self._upcoming, self._since = target.speedup(original_ms), dict[Axis, int](), 0
        self._bounds, self._is_bound = bounds if bounds is not None and bounds.asked else None, False
        if self._bounds is not None:
            self._bounds.check(selector.comb, selector.least())
        if timed is not None:
            self._learn(timed[0], selector.plan(timed[0]), timed[1])

    def upcoming(self) -> Mapping[Axis, int]:
        """The widths that should be on target: no layer narrower than its time asks for."""
        if not self._upcoming:
            reached = self.selector.reach(self.latency.speedup, self._goal)
            self._upcoming = self.selector.widened(reached, self.latency)
            if not self.probe.is_profiled and self._known(self._upcoming):
                # steps that another runtime's kernels take, and this one does not
                self._upcoming = self.selector.reach(self._by_macs, self._goal)
            self._is_bound = self._excess(self._upcoming) > 1
            if self._is_bound:
                self._upcoming = self.selector.reach(self._allowed, 1.0)
        return self._upcoming

    def _allowed(self, counts: Mapping[Axis, int]) -> float:
        """How fast widths are for what was asked, or how little they take of a bound, whichever is less."""
        return min(self.latency.speedup(counts) / self._goal, 1 / max(self._excess(counts), 1e-9))

    def _excess(self, counts: Mapping[Axis, int]) -> float:
        """The largest share of a bound that widths take."""
        return 0.0 if self._bounds is None else self._bounds.excess(self.selector.comb, counts)

    def is_in_reach(self) -> bool:
        """Whether the widths that should be on target are as fast, by the prediction."""
        return self.latency.speedup(self.upcoming()) >= self._goal * (1 - self.tolerance)

    def plan(self) -> Plan:
        """What the search will end on, as far as is known by now."""
        return self.tried[-1].plan if self._on_target() else self.selector.plan(self.upcoming())

    def step(self) -> None:
        """Measure the next candidate."""
        self._measure(self.upcoming())

    def finish(self) -> Candidate:
        """The nearest candidate; where widths allow none within the tolerance, the next faster one.

        Raises:
            TargetError: if even the narrowest widths are not fast enough.
        """
        while len(self.tried) < self._most and not self._on_target() and not self._known(self.upcoming()):
            self.step()
        best = _nearest(self.tried, self.tolerance)
        if best.attained < 1 - self.tolerance:
            least = self.selector.least()
            if not self._known(least):  # the last try: as narrow as can be
                self._measure(least)
                self._return_from_least()
                best = _nearest(self.tried, self.tolerance)
            if best.attained < 1 - self.tolerance:
                raise TargetError(_unreachable(self.selector, best, self.target, self.latency))
        return best

    def _return_from_least(self) -> None:
        """Where the narrowest widths are faster than asked, look between them and the original.

        What was timed before them was too slow at widths that should have been fast enough, as it is while the machine
        has other work; so that is not relied on any more.
        """
        self._since = len(self.tried) - 1
        for _ in range(MAX_RETURNS):
            nearest = _nearest(self.tried[self._since :], self.tolerance)
            counts = self.selector.reach(self._by_macs, self._goal)
            if nearest.attained < 1 or nearest.off <= self.tolerance or self._known(counts):
                return
            self._measure(counts)

    def _by_macs(self, counts: Mapping[Axis, int]) -> float:
        """The speed-up of any widths, from those measured: in the logarithm of MACs and time, piecewise linear."""
        measured = ((-math.log(item.macs_ratio), math.log(item.speedup)) for item in self.tried[self._since :])
        points = sorted([(0.0, 0.0), *measured])
        x, (macs, times) = math.log(self._macs / self.selector.comb.cost(counts).macs), np.array(points).T
        return math.exp(float(np.interp(x, macs, times)) + max(x - macs[-1], 0.0))

    def _on_target(self) -> bool:
        return bool(self.tried) and self.tried[-1].is_within(self.tolerance / 2)

    def _known(self, counts: Mapping[Axis, int]) -> bool:
        return any(counts == candidate.counts for candidate in self.tried[self._since :])

    def _measure(self, counts: Mapping[Axis, int]) -> Candidate:
        """Shrink, export and time; the model of the latency learns from it."""
        plan = self.selector.plan(counts)
        narrower = shrink(copy_of(self.model), plan)
        expected, slowest = self.latency.speedup(counts), self.target.attained
        log.info("Candidate: the predicted speed-up is %.2f. It is exported and timed …", expected)
        candidate = narrower if self._bounds is None else self.probe.artifact(narrower)
        found = self.probe.compare(candidate, seconds=SECONDS, precision=self.tolerance / 3, slowest=slowest)
        if self._bounds is not None and not isinstance(candidate, nn.Module):
            self._bounds.saw(self.selector.comb, counts, self.probe.bytes_of(candidate))
        return self._learn(counts, plan, found)

    def _learn(self, counts: Mapping[Axis, int], plan: Plan, found: LatencyComparison) -> Candidate:
        """What a timing teaches: the model of the latency, and what a latency in ms is in the machine's state."""
        expected = self.latency.speedup(counts)
        self.latency.observe(counts, found.speedup, found.runtime)
        ratio = self.selector.comb.cost(counts).macs / max(self._macs, 1)
        log.info("Candidate: the measured speed-up is %.2f at %.1f %% of the MACs.", found.speedup, 100 * ratio)
        attained, excess = self.target.attained(found), self._excess(counts)
        self.tried.append(Candidate(counts, plan, ratio, expected, found, attained, excess, self._is_bound))
        self._goal = found.speedup / self.tried[-1].attained
        self._upcoming = {}
        return self.tried[-1]


def told_of(
    former: Iterable[Mapping[str, Any]], searches: Mapping[Any, Search], chosen: Plan | None
) -> list[dict[str, Any]]:
    """What a report says of all candidates: those of former searches, of which a later choice counts, and of these."""
    rows = [{**row, "verdict": str(row.get("verdict", "")).replace("chosen,", "chosen at first,")} for row in former]
    return rows + [
        {
            "scope": scope, "macs_ratio": item.macs_ratio, "predicted": item.predicted, "speedup": item.speedup,
            "attained": item.attained, "verdict": item.verdict(chosen=item.plan is chosen),
        }
        for scope, search in searches.items()
        for item in search.tried
    ]  # fmt: skip


def _nearest(tried: list[Candidate], tolerance: float) -> Candidate:
    """The candidate nearest to the target; where widths allow none within the tolerance, the next that is faster."""
    near = [item for item in tried if item.off <= tolerance and item.excess <= 1]
    if near:
        return min(near, key=lambda item: item.off)
    return min(tried, key=lambda item: (item.excess > 1, item.attained < 1, item.off))


def _unreachable(selector: Selector, best: Candidate, target: Target, latency: LatencyModel | SlowestModel) -> str:
    reached = best.speedup if target.name == "target_speedup" else best.latency.candidate_ms
    return (
        f"{target.name}={target.value:g} cannot be reached: the narrowest widths allowed keep {best.macs_ratio:.1%} of "
        f"the MACs and are {best.speedup:.2f} times as fast ({best.latency.candidate_ms:.3g} ms in "
        f"{best.latency.runtime}). Ask for {reached:.3g}, or change what stands in the way, in predicted shares of the "
        f"original's milliseconds: {obstacles(selector, latency.milliseconds, latency.fixed())}"
    )
