"""Select: the channels that stay, given scores and a target cost.

Greedy: what goes next is the step, of any group, whose score is least for what it saves, and what a step saves is
computed anew as the widths change. One order of steps serves every target: a target is a point along it. Widths move
in steps that hardware likes, stop at a floor, and are raised where a count tie demands it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cpd.algebra import axes, ties
from cpd.algebra.axes import Axis, Dim, Product
from cpd.coupling.comb import Comb
from cpd.coupling.cost import CostFigures
from cpd.coupling.groups import Group
from cpd.errors import InputError
from cpd.plan import Plan
from cpd.selection.limits import Limits, check_ratios
from cpd.selection.weighing import SCOPES, Latency, Scope, Weighing

Measure = Callable[[CostFigures], float]


#: Share of a figure that may be saved before what channels save is computed anew.
REFRESH = 0.01
#: A target may be exceeded by this share.
LEAP = 0.005
#: Positions that a width is raised by at most where that costs no time, and the share of the time of what carries it
#: that counts as none.
TOOTH, SAME = 32, 0.01


class Selector:
    """Selects among the channels of a comb's open groups.

    Args:
        comb: the comb.
        scores: {group name: Tensor[size]}; the lowest go first, and what has an infinite one stays.
        limits: what may be done to a group.
        scope: among what scores are compared.
        weighing: how they are weighed against what is saved; ranks (of any scope but "global") are not.
        start: {group name: width} to go on from, where some channels have gone; those have a score of -inf, and
            no width is above it.

    Raises:
        InputError: an unknown scope, or a pattern of `limits.ratios` that no open group has.
    """

    def __init__(
        self,
        comb: Comb,
        scores: Mapping[str, Tensor],
        limits: Limits | None = None,
        scope: Scope = "global",
        weighing: Weighing | None = None,
        start: Mapping[str, int] | None = None,
    ) -> None:
        if scope not in SCOPES:
            raise InputError(f"There is no scope {scope!r}: use one of {', '.join(SCOPES)}.")
        self.comb, self.limits, self.scope = comb, limits or Limits(), scope
        self.weighing = weighing or Weighing()
        check_ratios(comb, self.limits)
        self._most = {group.axis: (start or {}).get(group.name, group.size) for group in comb.groups}
        self.steps = {g.name: step(comb, g, self.limits.round_to) for g in comb.open}
        self.order = {g.name: torch.argsort(scores[g.name], descending=True, stable=True).numpy() for g in comb.open}
        self._held = {g.name: int(torch.isposinf(scores[g.name]).sum()) for g in comb.open}
        if scope != "global":
            self.weighing, scores = Weighing("none"), _ranked(comb, scores, self.steps, scope)
        self._ascending = {g.name: np.sort(scores[g.name].numpy()) for g in comb.open}
        self._path = self._walk()

    def floor(self, group: Group) -> int:
        """The fewest channels that a group keeps: what must stay, its minimum, and what limits say, in whole steps."""
        return max(_floor(group, self.limits, self.steps[group.name]), self._held[group.name])

    def _walk(self) -> npt.NDArray[np.int64]:
        """[steps + 1, open groups]: the widths before ties, after each step."""
        groups = self.comb.open
        floors = [self.floor(group) for group in groups]
        decided = [self.limits.ratio_of(group) is not None for group in groups]
        whole = [self._most[group.axis] for group in groups]
        starts = [min(floor, size) if done else size for size, floor, done in zip(whole, floors, decided, strict=True)]
        widths = np.array(starts, dtype=np.int64)
        path = [widths.copy()]
        while True:
            counts = self._repaired(widths)
            slopes = self.weighing.saved(self.comb, counts)
            saved = [slopes.get(group.axis, 0.0) for group in groups]
            budget = REFRESH * self.weighing.total(self.comb, counts)
            going = [i for i in range(len(groups)) if widths[i] > floors[i]]
            heap = [(self._price(i, int(widths[i]), floors[i], saved[i]), i) for i in going]
            if not heap:
                return np.stack(path)
            heapq.heapify(heap)
            while heap and budget > 0:
                _, index = heapq.heappop(heap)
                before = int(widths[index])
                widths[index] = self._next(index, before, floors[index])
                budget -= max((before - widths[index]) * saved[index], 1e-9 * abs(budget))
                path.append(widths.copy())
                if widths[index] > floors[index]:
                    price = self._price(index, int(widths[index]), floors[index], saved[index])
                    heapq.heappush(heap, (price, index))

    def _next(self, index: int, width: int, floor: int) -> int:
        """The next narrower width of a group."""
        size = self.steps[self.comb.open[index].name]
        return max(floor, size * ((width - 1) // size))

    def _price(self, index: int, width: int, floor: int, saved: float) -> float:
        """The mean score, for what it saves, of the channels that go in a group's next step."""
        group = self.comb.open[index]
        narrower = self._next(index, width, floor)
        going = self._ascending[group.name][group.size - width : group.size - narrower]
        return self.weighing(float(going.mean()), saved)

    def _repaired(self, widths: npt.NDArray[np.int64]) -> dict[Axis, int]:
        return self._tied({group.axis: int(width) for group, width in zip(self.comb.open, widths, strict=True)})

    def _tied(self, wanted: Mapping[Axis, int]) -> dict[Axis, int]:
        return ties.repair(wanted, self.comb.ties, self._most)

    def counts(self, steps: int) -> dict[Axis, int]:
        """The width of each group after so many steps."""
        return self._repaired(self._path[min(steps, len(self._path) - 1)])

    def meet(
        self, measure: Measure, target: float, excess: Callable[[Mapping[Axis, int]], float] | None = None
    ) -> dict[Axis, int]:
        """The widest widths along the way whose `measure` of the cost is at most `target`; the narrowest, if none.

        Args:
            measure: of a cost.
            target: at most so much of it.
            excess: what else must be at most 1.
        """

        def enough(counts: Mapping[Axis, int]) -> bool:
            return measure(self.comb.cost(counts)) <= target and (excess is None or excess(counts) <= 1)

        return self.counts(self._first(enough))

    def reach(self, figure: Callable[[Mapping[Axis, int]], float], target: float) -> dict[Axis, int]:
        """The widest widths along the way whose figure is at least `target`, and hardly more; the narrowest, if none.

        One step of a group that many layers read may leap over the target. Then what went last comes back, as far as
        the target allows.
        """
        index = self._first(lambda counts: figure(counts) >= target)
        widths = self._path[index].copy()
        for before, after in zip(self._path[:index][::-1], self._path[1 : index + 1][::-1], strict=True):
            if figure(self._repaired(widths)) <= target * (1 + LEAP):
                break
            raised = np.where((before != after) & (widths == after), before, widths)
            if (raised != widths).any() and figure(self._repaired(raised)) >= target:
                widths = raised
        return self._repaired(widths)

    def _first(self, enough: Callable[[Mapping[Axis, int]], bool]) -> int:
        """The first step along the way after which widths are narrow enough; the last, if none."""
        low, high = 0, len(self._path) - 1
        while low < high:
            middle = (low + high) // 2
            if enough(self.counts(middle)):
                high = middle
            else:
                low = middle + 1
        return low

    def widened(self, counts: Mapping[Axis, int], latency: Latency) -> dict[Axis, int]:
        """The same widths, each raised as far as it costs no time: to the next tooth of the saw."""
        found, local = dict(counts), latency.local(counts)
        for group in self.comb.open:
            if self.limits.ratio_of(group) is not None:
                continue
            size = self.steps[group.name]
            allowed = latency.milliseconds(found) + SAME * local.get(group.axis, 0.0)
            width = size * math.ceil(found[group.axis] / size)
            for wider in range(min(width + TOOTH, self._most[group.axis]) // size * size, width - 1, -size):
                raised = self._tied({**found, group.axis: wider})
                if wider > found[group.axis] and latency.milliseconds(raised) <= allowed:
                    found = raised
                    break
        return found

    def least(self, limits: Limits | None = None) -> dict[Axis, int]:
        """The narrowest widths that the limits and ties allow; or that other limits would allow."""
        if limits is None:
            return self.counts(len(self._path))
        floors = {
            group.axis: _floor(group, limits, step(self.comb, group, limits.round_to)) for group in self.comb.open
        }
        return self._tied({axis: min(floor, self._most[axis]) for axis, floor in floors.items()})

    def at_floor(self, counts: Mapping[Axis, int]) -> tuple[str, ...]:
        """The groups that would lose more if they were not at their floor."""
        return tuple(
            group.name
            for group in self.comb.open
            if self.limits.ratio_of(group) is None
            and counts[group.axis] <= _floor(group, self.limits, self.steps[group.name]) < group.size
        )

    def plan(self, counts: Mapping[Axis, int]) -> Plan:
        """The plan that keeps the best channels of each group at these widths."""
        keep = {group.name: np.sort(self.order[group.name][: counts[group.axis]]) for group in self.comb.open}
        return self.comb.plan(keep)


def _floor(group: Group, limits: Limits, step: int) -> int:
    """The fewest channels that a group keeps where widths go in steps."""
    share = limits.ratio_of(group)
    ratio = limits.max_ratio if share is None else share
    least = max(group.minimum, min(limits.min_width, group.size), round(group.size * (1 - ratio) + 1e-9, 6))
    return min(step * math.ceil(least / step), group.size)


def _ranked(comb: Comb, scores: Mapping[str, Tensor], steps: Mapping[str, int], scope: Scope) -> dict[str, Tensor]:
    """Scores replaced by their rank, from above 0 to 1, among their group or all groups alike in structure.

    Groups are shifted by up to a step, so that those of one size do not all step at once.
    """
    turns = {group.name: index / len(comb.open) for index, group in enumerate(comb.open)}
    classes: dict[object, list[str]] = {}
    for group in comb.open:
        classes.setdefault(group.name if scope == "group" else _structure(comb, group), []).append(group.name)
    result = {}
    for names in classes.values():
        values = torch.cat([scores[name] for name in names])
        order = torch.argsort(torch.argsort(values, stable=True), stable=True)
        for name, ranks in zip(names, order.split([len(scores[name]) for name in names]), strict=True):
            result[name] = (ranks + 1 + turns[name] * steps[name]).double() / len(values)
    return result


def _structure(comb: Comb, group: Group) -> object:
    """Equal for groups of one size whose members have the same shapes and roles (Fang et al., arXiv 2407.04616)."""
    shapes = sorted(
        (tuple(dim.size for dim in comb.dims[member.tensor]), member.dim, member.contracted) for member in group.members
    )
    return group.size, tuple(shapes)


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
    """The removable width inside one channel of `axis`, where `axis` is a factor of a product."""
    dim = axes.resolve(dim)
    if not isinstance(dim, Product) or axis not in dim.factors:
        return 1
    after = dim.factors[dim.factors.index(axis) + 1 :]
    return math.prod(factor.size for factor in after if not isinstance(factor, axes.Fixed))
