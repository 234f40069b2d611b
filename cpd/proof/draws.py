"""Draws: the widths at which narrower copies are tried, random ones for the most part; the ties hold at all of them."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, cycle
from typing import TypeAlias

from cpd.algebra import axes, ties
from cpd.algebra.axes import Axis, Dim
from cpd.rules import Context

Counts: TypeAlias = Mapping[Axis, int]

#: Random widths drawn to find some that the ties allow, and how deep a draw may cut.
TRIES, DEPTHS = 64, (0.125, 0.25, 0.5)
#: Axes of up to this many positions are whole or narrower by turns: random widths would be alike too often.
SMALL = 8
#: In which two of the four copies after the first a small axis is whole: each of six neighbours is whole once while
#: another one is narrower.
TURNS = list(combinations(range(1, 5), 2))
#: Shares of every width that are kept where all are narrowed alike.
SHARES = (0.5, 0.75, 0.625, 0.875)


class Widths(dict[str, tuple[Dim, ...]]):
    """The dimensions of every parameter and buffer, once no axis is split or joined any more."""

    @cached_property
    def axes(self) -> list[Axis]:
        """Every axis with more than one position, in the order of the parameters."""
        found = [axis for shape in self.values() for dim in shape for axis in axes.leaves(dim)]
        return [axis for axis in dict.fromkeys(found) if axis.size > 1]


@dataclass(frozen=True)
class Draws:
    """Widths for narrower copies; the same ones in the same order for the same model.

    Attributes:
        ctx: the result of the algebra; the ties are those that it has at the time of a draw.
        dims: the dimensions of every parameter and buffer.
        rng: the source of the random widths.
    """

    ctx: Context
    dims: Widths
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def small_axes(self) -> list[Axis]:
        """The open axes of up to `SMALL` positions."""
        return [axis for axis in open_axes(self.dims) if axis.size <= SMALL]

    def draw(self, unproven: Collection[Axis] = (), done: int | None = None) -> dict[Axis, int]:
        """Random widths that the ties allow; of several such for axes tied to each other, those that narrow most.

        Of a series of copies the first has every axis narrower, but for the ties. In those after it small axes are
        whole by `TURNS`, so that a width that must not be less than another, or must equal it, is found out.

        Args:
            unproven: the axes in question.
            done: number of the copy in a series.
        """
        unproven, counts = set(unproven), dict[Axis, int]()
        whole = {axis for axis, turns in zip(self.small_axes(), cycle(TURNS), strict=False) if done in turns}
        blocks = ties.components(open_axes(self.dims), self.ctx.ties)
        for trial in range(TRIES):
            depth, alike = self.rng.choice(DEPTHS), dict[int, int]()
            pending = []
            for found, among in blocks:
                least = {axis: int(done == 0 or (done is not None and axis.size <= SMALL)) for axis in found}
                wanted = {axis: axis.size - _cut(self.rng, axis.size, depth, least[axis]) for axis in found}
                wanted.update((axis, axis.size) for axis in found if axis in whole)
                if trial % 2:  # alike axes alike: what ties many layers to one width is met more often
                    wanted = {axis: alike.setdefault(axis.size, kept) for axis, kept in wanted.items()}
                widths = ties.repair(wanted, among)
                asked = unproven.intersection(found)
                if trial == 0 or len(moved(widths, asked)) > len(moved(counts, asked)):
                    counts.update(widths)
                if moved(counts, asked) < asked:
                    pending.append((found, among))
            if not (blocks := pending):
                break
        return counts

    def draw_alike(self, share: float | None = None) -> dict[Axis, int]:
        """The same share of every width, which passes most checks of a forward: that one divides or equals another.

        Half of the times, only the larger factor of heads x head_dim is narrowed.

        Args:
            share: of every width; one of `SHARES` if not given.
        """
        whole: set[Axis] = set()
        for dim in map(axes.resolve, (dim for dims in self.dims.values() for dim in dims)):
            factors = [factor for factor in axes.factors_of(dim) if isinstance(factor, Axis)]
            whole.update(sorted(factors, key=lambda axis: axis.size)[:-1])
        share, inner_only = share or self.rng.choice(SHARES), self.rng.random() < 0.5
        kept = {
            axis: axis.size if inner_only and axis in whole else max(1, round(axis.size * share))
            for axis in open_axes(self.dims)
        }
        return ties.repair(kept, self.ctx.ties)

    def narrowest(self) -> dict[Axis, int]:
        """The least widths that the ties and the minimums allow."""
        return ties.repair(dict.fromkeys(open_axes(self.dims), 1), self.ctx.ties)


def open_axes(dims: Widths) -> list[Axis]:
    """Every axis of a parameter that may still shrink, in the order of the parameters."""
    return [axis for axis in dims.axes if axis.frozen is None]


def moved(counts: Counts, among: Iterable[Axis]) -> set[Axis]:
    """The axes among these that lose positions."""
    return {axis for axis in among if counts.get(axis, axis.size) < axis.size}


def _cut(rng: random.Random, size: int, depth: float, least: int) -> int:
    """How many positions go: `least`, a few, or any number, so that no two widths are taken for one for long.

    A single position is left of two only: where forwards fail on that is found out apart from all else.
    """
    return rng.choice((least, rng.randint(1, max(1, int(size * depth))), rng.randint(1, max(1, size - 2))))
