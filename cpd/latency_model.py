"""A fitted latency: seconds for a parameter, a multiply-accumulate and an element of activation, on this machine.

    latency = constant + a * parameters + b * MACs + c * activations,   a, b, c >= 0

by non-negative least squares over narrower copies that are exported and timed beside the original. It says what a
removed position saves, to rank by; a target is always measured.
"""

from __future__ import annotations

import copy

import numpy as np
from scipy.optimize import nnls
from torch import nn

from cpd.comb import Comb
from cpd.cost import Slope
from cpd.latency import LatencyProbe
from cpd.plan import Plan
from cpd.surgeon import shrink

#: Shares of every group kept in the copies that are timed, and of every second or every other second group.
SHARES = (0.25, 0.5, 0.75)
#: Seconds that one copy is timed.
SECONDS = 3.0


def fit_latency(model: nn.Module, comb: Comb, probe: LatencyProbe) -> Slope:
    """Milliseconds for one unit of each figure of the cost.

    Args:
        model: the unpruned model; left as it was.
        comb: its comb.
        probe: times copies beside it.

    Returns:
        The coefficients; MACs alone count, in units of the original's latency, where nothing else could be fitted.
    """
    rows, times = [], []
    for plan in _plans(comb):
        found = probe.compare(shrink(copy.deepcopy(model), plan), seconds=SECONDS)
        counts = {group.axis: len(plan.groups[group.name]) for group in comb.groups}
        cost = comb.cost(counts)
        rows.append((1.0, cost.parameters, cost.macs, cost.activations))
        times.append(found.candidate_ms)
    full = comb.cost({})
    rows.append((1.0, full.parameters, full.macs, full.activations))
    times.append(found.original_ms)
    table = np.array(rows, dtype=np.float64)
    scale = np.maximum(table.max(0), 1.0)
    coefficients = nnls(table / scale, np.array(times))[0] / scale
    if not coefficients[1:].any():
        return Slope(0.0, float(times[-1]) / max(full.macs, 1), 0.0)
    return Slope(*map(float, coefficients[1:]))


def _plans(comb: Comb) -> list[Plan]:
    """Narrower copies that tell the figures apart: all groups, and every second one."""
    return [
        comb.plan(
            {
                group.name: range(max(group.minimum, round(group.size * share)))
                for index, group in enumerate(comb.open)
                if turn is None or index % 2 == turn
            }
        )
        for turn in (None, 0, 1)
        for share in SHARES
    ]
