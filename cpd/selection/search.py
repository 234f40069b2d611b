"""Search: the widths whose *measured* speed-up in ONNX Runtime is the one asked for.

The latency model says which widths to try; each candidate is shrunk, exported and timed beside the original, and what
was measured corrects the model. The measurement decides.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from cpd.algebra.axes import Axis
from cpd.deploy.latency import LatencyComparison, LatencyProbe
from cpd.deploy.latency_model import LatencyModel
from cpd.errors import TargetError
from cpd.model.tensors import copy_of
from cpd.plan import Plan
from cpd.selection.obstacles import obstacles
from cpd.selection.selector import Selector
from cpd.selection.target import Target
from cpd.surgery.shrink import shrink

log = logging.getLogger("cpd")

#: Candidates exported and timed at most; with the original and the result, six exports.
MAX_CANDIDATES = 4
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
    """

    counts: Mapping[Axis, int]
    plan: Plan
    macs_ratio: float
    predicted: float
    latency: LatencyComparison
    attained: float

    @property
    def speedup(self) -> float:
        """Measured latency of the original over the candidate's."""
        return self.latency.speedup

    def is_within(self, distance: float) -> bool:
        """Whether it is within a relative distance of the target, give or take a standard error of its measurement."""
        interval = (self.latency.speedup_high - self.latency.speedup_low) / self.speedup
        return abs(self.attained - 1) <= distance + interval / 4  # of 95 %: two standard errors on either side


def predicted(selector: Selector, latency: LatencyModel, target: float) -> dict[Axis, int]:
    """The widths that should be `target` times as fast: no layer narrower than its time asks for."""
    return selector.widened(selector.reach(latency.speedup, target), latency)


def reach(
    model: nn.Module,
    selector: Selector,
    probe: LatencyProbe,
    latency: LatencyModel,
    target: Target,
    original_ms: float,
    tolerance: float = 0.05,
) -> tuple[Candidate, list[Candidate]]:
    """Find widths whose measured speed-up or latency is within `tolerance` of `target`, or as near as widths allow.

    Args:
        model: the unpruned model; left as it was.
        selector: gives the order in which channels go.
        probe: times candidates beside the original.
        latency: predicts; corrected by what is measured.
        target: the speed-up or latency asked for.
        original_ms: the latency of the original.
        tolerance: the relative distance from the target that is good enough; the search aims at half of it, give
            or take a standard error of the measurement.

    Returns:
        The nearest candidate (where widths allow none within the tolerance, the next faster one), and all measured.

    Raises:
        TargetError: if even the narrowest widths are not fast enough.
    """
    tried: list[Candidate] = []
    goal = target.speedup(original_ms)

    def measure(counts: Mapping[Axis, int]) -> Candidate:
        tried.append(_measure(model, selector, probe, latency, counts, target, tolerance / 3))
        return tried[-1]

    while len(tried) < MAX_CANDIDATES:
        counts = predicted(selector, latency, goal)
        if any(counts == candidate.counts for candidate in tried):
            break
        found = measure(counts)
        if found.is_within(tolerance / 2):
            break
        goal = found.speedup / found.attained  # of a latency in ms, in the machine's present state
    best = _nearest(tried, tolerance)
    if best.attained < 1 - tolerance:
        least = selector.least()
        if all(candidate.counts != least for candidate in tried):  # the last try: as narrow as can be
            measure(least)
            best = _nearest(tried, tolerance)
        if best.attained < 1 - tolerance:
            raise TargetError(_unreachable(selector, best, target, latency))
    return best, tried


def _nearest(tried: list[Candidate], tolerance: float) -> Candidate:
    """The candidate nearest to the target; where widths allow none within the tolerance, the next that is faster."""
    near = [item for item in tried if abs(item.attained - 1) <= tolerance]
    if near:
        return min(near, key=lambda item: abs(math.log(item.attained)))
    return min(tried, key=lambda item: (item.attained < 1, abs(math.log(item.attained))))


def _measure(
    model: nn.Module,
    selector: Selector,
    probe: LatencyProbe,
    latency: LatencyModel,
    counts: Mapping[Axis, int],
    target: Target,
    precision: float,
) -> Candidate:
    """Shrink, export and time; the model of the latency learns from it."""
    plan = selector.plan(counts)
    expected = latency.speedup(counts)
    narrower = shrink(copy_of(model), plan)
    log.info("Candidate: predicted %.2f times as fast; exporting and timing it …", expected)
    found = probe.compare(narrower, seconds=SECONDS, precision=precision, slowest=target.attained)
    latency.observe(counts, found.speedup)
    ratio = selector.comb.cost(counts).macs / selector.comb.cost({}).macs
    log.info("Candidate: %.2f times as fast at %.1f %% of the MACs", found.speedup, 100 * ratio)
    return Candidate(counts, plan, ratio, expected, found, target.attained(found))


def _unreachable(selector: Selector, best: Candidate, target: Target, latency: LatencyModel) -> str:
    reached = best.speedup if target.name == "target_speedup" else best.latency.candidate_ms
    return (
        f"{target.name}={target.value:g} cannot be reached: the narrowest widths allowed keep {best.macs_ratio:.1%} of "
        f"the MACs and are {best.speedup:.2f} times as fast ({best.latency.candidate_ms:.3g} ms). Ask for "
        f"{reached:.3g}, or for less of what stands in the way. Of the milliseconds, as predicted: "
        f"{obstacles(selector, latency.milliseconds, latency.fixed())}"
    )
