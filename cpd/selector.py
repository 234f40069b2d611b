"""Select: the positions that stay, given scores and a target cost.

One threshold over all groups: what scores below it goes. The widths are then rounded up to what hardware likes,
kept above a floor, and raised where a count tie demands it; the threshold is searched until the cost is met.
Scores are compared over all groups (scope "global"), or by their rank within the group ("group"), which takes the same
share of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cpd import axes, ties
from cpd.axes import Axis, Dim, Product
from cpd.comb import Comb, Group
from cpd.cost import Figures
from cpd.plan import Plan

Measure = Callable[[Figures], float]


@dataclass(frozen=True)
class Limits:
    """What a selection may do to a group.

    Attributes:
        round_to: widths are kept to a multiple of this many positions (of the whole width, where a group is one
            factor of it: heads of 64 positions go one by one).
        max_ratio: the largest share of a group that may go.
    """

    round_to: int = 8
    max_ratio: float = 0.9


Scope = Literal["global", "group"]
#: Every scope.
SCOPES: tuple[Scope, ...] = ("global", "group")


def ranks(scores: Tensor, shift: float) -> Tensor:
    """Scores replaced by their rank within the group, from above 0 (the lowest) to 1, and `shift` positions more."""
    order = torch.argsort(torch.argsort(scores, stable=True), stable=True)
    return (order + 1 + shift).double() / len(scores)


class Selector:
    """Selects among the positions of a comb's open groups.

    Args:
        comb: the comb.
        scores: {group name: Tensor[size]}; the lowest go first.
        limits: what may be done to a group.
        scope: whether scores are compared over all groups, or within each.
    """

    def __init__(
        self, comb: Comb, scores: Mapping[str, Tensor], limits: Limits | None = None, scope: Scope = "global"
    ) -> None:
        self.comb, self.limits, self.scope = comb, limits or Limits(), scope
        self.steps = {g.name: step(comb, g, self.limits.round_to) for g in comb.open}
        if scope == "group":  # shifted by up to a step, so that groups of one size do not all step at once
            turns = {group.name: index / len(comb.open) for index, group in enumerate(comb.open)}
            scores = {name: ranks(scores[name], turn * self.steps[name]) for name, turn in turns.items()}
        self.order = {g.name: torch.argsort(scores[g.name], descending=True, stable=True).numpy() for g in comb.open}
        self.sorted = {g.name: np.sort(scores[g.name].numpy())[::-1] for g in comb.open}
        self.thresholds = np.unique(np.concatenate([self.sorted[g.name] for g in comb.open]))

    def counts(self, threshold: float) -> dict[Axis, int]:
        """The width of each group when what scores below `threshold` goes."""
        wanted = {}
        for group in self.comb.open:
            above = int((self.sorted[group.name] >= threshold).sum())
            floor = max(group.minimum, math.ceil(group.size * (1 - self.limits.max_ratio)))
            width = self.steps[group.name] * math.ceil(max(above, floor) / self.steps[group.name])
            wanted[group.axis] = min(width, group.size)
        return ties.repair(wanted, self.comb.ties)

    def meet(self, measure: Measure, target: float) -> dict[Axis, int]:
        """The widest widths whose `measure` (of the cost, falling with the threshold) is at most `target`."""
        low, high = 0, len(self.thresholds)
        while low < high:
            middle = (low + high) // 2
            if measure(self.comb.cost(self.counts(self._at(middle)))) > target:
                low = middle + 1
            else:
                high = middle
        return self.counts(self._at(low))

    def least(self) -> dict[Axis, int]:
        """The narrowest widths that the limits and ties allow."""
        return self.counts(math.inf)

    def _at(self, index: int) -> float:
        return float(self.thresholds[index]) if index < len(self.thresholds) else math.inf

    def plan(self, counts: Mapping[Axis, int]) -> Plan:
        """The plan that keeps the best positions of each group at these widths."""
        keep = {group.name: np.sort(self.order[group.name][: counts[group.axis]]) for group in self.comb.open}
        return self.comb.plan(keep)


def step(comb: Comb, group: Group, round_to: int) -> int:
    """Positions of a group that go together so that whole widths stay multiples of `round_to`.

    A group narrower than two such steps (one segment of a concatenation, say) takes half or quarter steps instead.
    """
    inner = 1
    for member in group.members:
        inner = max(inner, _inner_width(comb.dims[member.tensor][member.dim], group.axis))
    width = round_to // math.gcd(round_to, inner)
    while width > 1 and group.size < 2 * width:
        width //= 2
    return width


def _inner_width(dim: Dim, axis: Axis) -> int:
    """The removable width inside one position of `axis`, where `axis` is a factor of a product."""
    dim = axes.resolve(dim)
    if not isinstance(dim, Product) or axis not in dim.factors:
        return 1
    after = dim.factors[dim.factors.index(axis) + 1 :]
    return math.prod(factor.size for factor in after if not isinstance(factor, axes.Fixed))
