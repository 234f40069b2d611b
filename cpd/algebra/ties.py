"""Count ties: widths that must be equal in number, though not in position.

`x.chunk(2)` demands that both halves keep equally many channels; a forward that computes the width of a head as
`C // num_heads` demands that as many channels stay as heads x head_dim. A tie says that two dimensions keep
equally many positions; `repair` raises the counts of a plan until every tie holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product as combinations

import networkx as nx

from cpd.algebra import axes
from cpd.algebra.axes import Axis, Dim

#: Enumerating the widths that a tied dimension can take stops here; beyond, its groups keep everything.
MAX_COMBINATIONS = 200_000
#: Rounds of choosing anew from the counts given; beyond, counts only rise.
MAX_ROUNDS = 100


@dataclass(frozen=True)
class Tie:
    """Two dimensions that must keep equally many positions, and why.

    Attributes:
        left: one dimension.
        right: the other; may keep fewer positions than `left`, by at most `slack`.
        reason: why.
        slack: 0, or by how much the last piece of a chunk may be shorter than the others.
    """

    left: Dim
    right: Dim
    reason: str
    slack: int = 0

    @property
    def axes(self) -> list[Axis]:
        """Every axis that takes part, each once."""
        return list(dict.fromkeys([*axes.leaves(self.left), *axes.leaves(self.right)]))

    def holds(self, counts: Mapping[Axis, int]) -> bool:
        """Whether both sides keep as many positions as they must."""
        return 0 <= axes.count(self.left, counts) - axes.count(self.right, counts) <= self.slack


def components(among: Iterable[Axis], ties: Sequence[Tie]) -> list[tuple[list[Axis], list[Tie]]]:
    """These axes in parts that no tie joins, each with the ties between its axes, in the order given."""
    graph: nx.Graph = nx.Graph()
    graph.add_nodes_from(among)
    for tie in ties:
        nx.add_path(graph, tie.axes)
    number = {axis: index for index, part in enumerate(nx.connected_components(graph)) for axis in part}
    found: dict[int, tuple[list[Axis], list[Tie]]] = {}
    for axis in among:
        found.setdefault(number[axis], ([], []))[0].append(axis)
    for tie in ties:
        if tie.axes and number[tie.axes[0]] in found:
            found[number[tie.axes[0]]][1].append(tie)
    return list(found.values())


def repair(counts: Mapping[Axis, int], ties: Sequence[Tie], most: Mapping[Axis, int] | None = None) -> dict[Axis, int]:
    """Small counts, none below those given, that satisfy every tie and every axis's minimum.

    Each broken tie raises its narrower side. A side of several axes (heads x head_dim) is chosen anew from the counts
    given each time that its goal rises, since what fitted the last goal need not be on the way to the next: twelve
    layers of 9 to 12 heads then meet at a common width below the full one. Where that goes round in circles (an axis
    in several ties), counts only rise; all positions kept satisfies every tie, so this ends.

    Args:
        counts: of every axis that may be raised.
        ties: all that must hold.
        most: counts that are not exceeded, at which every tie holds and none of which is below `counts`; all
            positions of an axis that it does not name.
    """
    counts = {axis: max(count, min(axis.minimum, axis.size)) for axis, count in counts.items()}
    result, rounds = dict(counts), 0
    while broken := [tie for tie in ties if not tie.holds(result)]:
        rounds += 1
        base = counts if rounds <= MAX_ROUNDS else result
        for tie in broken:
            left, right = axes.count(tie.left, result), axes.count(tie.right, result)
            if left < right:
                result.update(_raise_to(tie.left, right, base, most or {}))
            elif right < left - tie.slack:
                result.update(_raise_to(tie.right, left - tie.slack, base, most or {}))
    return result


def _raise_to(dim: Dim, goal: int, counts: Mapping[Axis, int], most: Mapping[Axis, int]) -> dict[Axis, int]:
    """Raise the axes of `dim` to the least width that is at least `goal`, the relative rise as even as can be."""
    names = [axis for axis in dict.fromkeys(axes.leaves(dim)) if axis.frozen is None]
    ranges = [range(counts.get(axis, axis.size), most.get(axis, axis.size) + 1) for axis in names]
    size = 1
    for choices in ranges:
        size *= len(choices)
    if size > MAX_COMBINATIONS:
        return {axis: most.get(axis, axis.size) for axis in names}
    best: tuple[int, float, tuple[int, ...]] | None = None
    for choice in combinations(*ranges):
        width = axes.count(dim, {**counts, **dict(zip(names, choice, strict=True))})
        if width < goal or (best is not None and width > best[0]):
            continue
        rise = max(value / options[0] for value, options in zip(choice, ranges, strict=True))
        if best is None or (width, rise, choice) < best:
            best = (width, rise, choice)
    assert best is not None, "keeping as much as may be kept reaches any goal"
    return dict(zip(names, best[2], strict=True))
