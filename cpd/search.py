"""Search: the widths whose *measured* speed-up in ONNX Runtime is the one asked for.

MACs order the candidates, a stop watch decides among them: each candidate is shrunk, exported and timed beside
the original, and the share of MACs kept for the next follows from the speed-ups measured so far.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from cpd.axes import Axis
from cpd.errors import TargetError
from cpd.latency import LatencyComparison, LatencyProbe
from cpd.plan import Plan
from cpd.selector import Selector
from cpd.surgeon import shrink

log = logging.getLogger("cpd")

#: Candidates exported and timed at most.
MAX_CANDIDATES = 8
#: Seconds that one candidate is timed.
SECONDS = 6.0


@dataclass(frozen=True)
class Candidate:
    """One measured set of widths.

    Attributes:
        counts: the width of each axis.
        plan: what is kept.
        macs_ratio: share of the original's MACs that is left.
        latency: its measured comparison with the original.
    """

    counts: Mapping[Axis, int]
    plan: Plan
    macs_ratio: float
    latency: LatencyComparison

    @property
    def speedup(self) -> float:
        """Measured latency of the original over the candidate's."""
        return self.latency.speedup


def reach(
    model: nn.Module, selector: Selector, probe: LatencyProbe, target: float, tolerance: float = 0.05
) -> tuple[Candidate, list[Candidate]]:
    """Find widths whose measured speed-up is within `tolerance` of `target`, or as near as widths allow.

    Args:
        model: the unpruned model; left as it was.
        selector: gives the widths of a share of MACs.
        probe: times candidates beside the original.
        target: the speed-up asked for.
        tolerance: the relative distance from the target that is good enough; the search aims at half of it.

    Returns:
        The nearest candidate (where widths allow none within the tolerance, the next faster one), and all measured.

    Raises:
        TargetError: if even the narrowest widths are not fast enough.
    """
    full = selector.comb.cost({}).macs
    floor = selector.comb.cost(selector.least()).macs / full
    tried: list[Candidate] = []
    ratio = max(target**-1.1, floor)
    for _ in range(MAX_CANDIDATES):
        counts = selector.meet(lambda figures: figures.macs / full, ratio)
        if any(counts == candidate.counts for candidate in tried):
            break
        tried.append(_measure(model, selector, probe, counts, full))
        found = tried[-1].speedup
        log.info("%.1f %% of the MACs: %.2f times as fast (target %g)", 100 * tried[-1].macs_ratio, found, target)
        if abs(found / target - 1) <= tolerance / 2:
            break
        ratio = max(_next_ratio(tried, target), floor)
    best = _nearest(tried, target, tolerance)
    if best.speedup < target * (1 - tolerance):
        if best.macs_ratio > floor * 1.02:  # the last try: as narrow as can be
            tried.append(_measure(model, selector, probe, selector.least(), full))
            best = _nearest(tried, target, tolerance)
        if best.speedup < target * (1 - tolerance):
            raise TargetError(_unreachable(selector, best, target))
    return best, tried


def _nearest(tried: list[Candidate], target: float, tolerance: float) -> Candidate:
    """The candidate nearest to the target; where widths allow none within the tolerance, the next that is faster."""
    near = [item for item in tried if abs(item.speedup / target - 1) <= tolerance]
    if near:
        return min(near, key=lambda item: abs(math.log(item.speedup / target)))
    return min(tried, key=lambda item: (item.speedup < target, abs(math.log(item.speedup / target))))


def _measure(
    model: nn.Module, selector: Selector, probe: LatencyProbe, counts: Mapping[Axis, int], full: int
) -> Candidate:
    plan = selector.plan(counts)
    latency = probe.compare(shrink(copy.deepcopy(model), plan), seconds=SECONDS, precision=0.01)
    return Candidate(counts, plan, selector.comb.cost(counts).macs / full, latency)


def _next_ratio(tried: list[Candidate], target: float) -> float:
    """Interpolate log speed-up over log MACs between the nearest candidates on both sides of the target."""
    points = [(0.0, 0.0), *((math.log(item.macs_ratio), math.log(max(item.speedup, 1e-3))) for item in tried)]
    goal = math.log(target)
    slower = max((point for point in points if point[1] < goal), key=lambda point: point[1], default=points[0])
    faster = [point for point in points if point[1] >= goal]
    if faster:
        nearest = min(faster, key=lambda point: point[1])
    else:  # extrapolate, a little beyond
        nearest = min(points)
        slower = points[0]
        goal *= 1.02
    rise = nearest[1] - slower[1]
    if rise <= 1e-6 or nearest[0] >= slower[0]:
        return math.exp((nearest[0] + slower[0]) / 2 if faster else nearest[0] - 0.2)
    return math.exp(slower[0] + (goal - slower[1]) / rise * (nearest[0] - slower[0]))


def _unreachable(selector: Selector, best: Candidate, target: float) -> str:
    frozen = [group for group in selector.comb.groups if group.frozen]
    reasons = "; ".join(f"{group.name} ({group.size}): {group.frozen}" for group in frozen[:8])
    return (
        f"A speed-up of {target:g} cannot be reached: the narrowest widths allowed keep {best.macs_ratio:.1%} of the "
        f"MACs and are {best.speedup:.2f} times as fast. Ask for {best.speedup:.2f} or less, or allow narrower widths "
        f"(round_to={selector.limits.round_to}, max_ratio={selector.limits.max_ratio}). "
        + (f"Frozen groups stand in the way: {reasons}." if frozen else "No group is frozen.")
    )
