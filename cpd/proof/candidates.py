"""Candidates: what could explain a width that a forward names or checks; integers that modules keep, other widths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import combinations

from torch.fx import Node

from cpd.algebra import axes
from cpd.algebra.axes import Concat, Dim, Fixed, Product
from cpd.algebra.ties import Tie
from cpd.proof.constants import widths_in_sight
from cpd.proof.copies import Copies
from cpd.proof.draws import Counts
from cpd.proof.provenance import Place, integers
from cpd.proof.replay import Observation
from cpd.rules import Literal
from cpd.trace.graph import owner, owners

#: Modules inside the calling one whose attributes are tried.
MAX_INNER = 16
#: By how much an integer that follows a width may be larger.
MAX_FACTOR = 8
#: A ratio of two widths has a numerator and a denominator whose product is at most this.
MAX_RATIO = 128
#: Ties tried where a forward checks a width and refuses.
MAX_PAIRS = 32


@dataclass(frozen=True)
class Candidates:
    """Finds, for a width, the attributes that may have to follow it and the ties that may hold for it.

    Attributes:
        copies: of the model in question.
        integers: for each module asked about, the integers that it keeps.
    """

    copies: Copies
    integers: dict[str, list[tuple[Place, int]]] = field(default_factory=dict)

    # ------------------------------------------------------------ what a module sees

    def widths_of(self, path: str) -> list[Dim]:
        """The removable dimensions, and parts of them, of what a module sees and of the parameters that it keeps."""
        ctx = self.copies.ctx
        own = [shape for name, shape in self.copies.dims.items() if name.rpartition(".")[0] == path]
        kept = [axes.resolve(dim) for shape in own for dim in shape if any(True for _ in axes.leaves(dim))]
        whole = [*widths_in_sight(ctx, path), *kept]
        return list(dict.fromkeys(part for dim in whole for part in parts_of(dim)))

    # ------------------------------------------------------------ attributes

    def kept(self, path: str) -> list[tuple[Place, int]]:
        """The integers that the module at `path` keeps."""
        if path not in self.integers:
            self.integers[path] = list(integers(self.copies.model, path))
        return self.integers[path]

    def followed(self, item: Literal) -> list[tuple[Place, Dim]]:
        """The integers that the literal was seen to be computed from, each with the widths that it is as large as."""
        places = sorted(self.copies.places.get(item, ()))
        modules = dict.fromkeys(place.module for place in places)
        kept = {place: value for path in modules for place, value in self.kept(path)}
        return [(place, dim) for dim in self._widths_around(item) for place in places if kept[place] == dim.size]

    def around(self, item: Literal) -> list[tuple[Place, Dim]]:
        """Integers that the modules around the literal keep, each with the widths that it is as large as.

        Those named like the op's argument come first, then those of the whole width, then the innermost module's.
        """
        kept = [one for path in self._modules_around(item.node) for one in self.kept(path)]
        found = [(place, dim) for dim in self._widths_around(item) for place, value in kept if value == dim.size]
        return sorted(found, key=lambda candidate: candidate[0].name not in item.names())

    def checked(self, culprit: str, path: str, counts: Counts) -> Iterator[dict[Place, Dim]]:
        """Integers of the module at `path`, each with the narrower widths that the module `culprit` sees.

        First each alone, then all of one width at once (a forward may compare several of them in one line), and at
        last those that are a multiple of a width.
        """
        dims = [dim for dim in self.widths_of(culprit) if axes.count(dim, counts) != dim.size]
        kept = [one for one in self.kept(path) if one[0] not in self.copies.attributes]
        equal = {dim: [place for place, value in kept if value == dim.size] for dim in dims}
        yield from ({place: dim} for dim, places in equal.items() for place in places)
        yield from (dict.fromkeys(places, dim) for dim, places in equal.items() if len(places) > 1)
        for dim in dims:
            for place, value in kept:
                if value % dim.size == 0 and 1 < value // dim.size <= MAX_FACTOR:
                    yield {place: axes.product([Fixed(value // dim.size), dim])}

    def _widths_around(self, item: Literal) -> list[Dim]:
        """The literal's width, parts of it (`B * self.num_heads`, `self.dim * 3`), and those around (`dim - part`)."""
        around = (dim for node in [*item.node.all_input_nodes, item.node] for dim in self.copies.ctx.dims_of(node))
        removable = (dim for dim in around if any(True for _ in axes.leaves(dim)))
        return list(dict.fromkeys([*parts_of(item.dim), *removable]))

    def _modules_around(self, node: Node) -> Iterator[str]:
        """The module that calls a node, those inside it (whose methods it may have called), those around it."""
        path, *outer = owners(node)
        yield path
        inner = [name for name, _ in self.copies.model.get_submodule(path).named_modules() if name]
        yield from (f"{path}.{name}" if path else name for name in inner[:MAX_INNER])
        yield from outer

    # ------------------------------------------------------------ ties

    def ties(self, item: Literal, seen: Observation) -> list[Tie]:
        """Dimensions in the same module as wide as the literal's, or as a run of its neighbours' product.

        Those come first from whose width the integer follows that the forward asked for. Of widths in another ratio
        (`2 * key_dim`, `C // 4`) there are only those.
        """
        ctx, counts, asked = self.copies.ctx, seen.counts, seen.asked.get(item)
        module = owner(item.node)
        named = [axes.resolve(dim) for place, dim in self.copies.attributes.items() if place.module == module]
        in_sight = list(dict.fromkeys([*named, *widths_in_sight(ctx, module)]))
        blocks = list(dict.fromkeys(axes.resolve(dim) for dim in (item.dim, *self._blocks_around(item))))
        why = ctx.reason(item.node, "a width is computed from another")
        pairs = [(block, dim) for block in filter(axes.is_open, blocks) for dim in filter(axes.is_open, in_sight)]

        def follows(block: Dim, dim: Dim) -> bool:
            rest, width = axes.count(block, counts) // axes.count(item.dim, counts), axes.count(dim, counts)
            expected = width * Fraction(block.size, dim.size)
            return asked is not None and rest * asked <= expected < rest * (asked + 1)

        equal = [pair for pair in pairs if pair[0].size == pair[1].size and pair[0] != pair[1]]
        ratios = [
            (block, dim)
            for block, dim in pairs
            if dim.size != block.size and axes.count(dim, counts) != dim.size and not seen.is_constant(item)
            if not any(isinstance(factor, Fixed) for factor in axes.factors_of(block)) and follows(block, dim)
        ]
        first = [pair for pair in equal if follows(*pair)]
        found = [_in_ratio(*pair, why) for pair in (*first, *ratios, *(pair for pair in equal if pair not in first))]
        return [tie for tie in found if tie is not None]

    def in_ratio(self, item: Literal) -> Iterator[tuple[Tie, Place, Dim]]:
        """The integers that the literal was seen to be computed from, each with an open width of its size.

        With them the tie between that width and the literal's own, where those are in a ratio of small numbers.
        """
        why = self.copies.ctx.reason(item.node, "a width is computed from another")
        places = sorted(self.copies.places.get(item, frozenset()) - self.copies.attributes.keys())
        values = {place: value for path in {place.module for place in places} for place, value in self.kept(path)}
        for place in places:
            for dim in widths_in_sight(self.copies.ctx, owner(item.node)):
                tie = (
                    _in_ratio(axes.resolve(item.dim), dim, why) if dim.size == values[place] != item.dim.size else None
                )
                if tie is not None and axes.is_open(dim) and axes.is_open(item.dim):
                    yield tie, place, dim

    def checked_ties(self, path: str) -> list[Tie]:
        """The open dimensions that the module at `path` sees, in pairs: of equal size, then of one in a small ratio."""
        in_sight = [dim for dim in self.widths_of(path) if axes.is_open(dim)]
        pairs = list(combinations(in_sight, 2))
        why = f"the forward checks a width [{path or 'the model'}]"
        equal = [Tie(left, right, why) for left, right in pairs if left.size == right.size]
        ratios = [_in_ratio(left, right, why) for left, right in pairs if left.size != right.size]
        return [*equal, *(tie for tie in ratios if tie is not None)][:MAX_PAIRS]

    def _blocks_around(self, item: Literal) -> Iterator[Dim]:
        """Products of neighbouring dimensions of the literal's node that contain its own."""
        value = self.copies.ctx.values[item.node]
        if not isinstance(value, tuple) or not any(dim is item.dim for dim in value):
            return
        place = next(index for index, dim in enumerate(value) if dim is item.dim)
        for start in range(place, -1, -1):
            for end in range(place + 1, len(value) + 1):
                block = axes.product(value[start:end])
                if end - start > 1 and not any(axis.frozen for axis in axes.leaves(block)):
                    yield block


def _in_ratio(left: Dim, right: Dim, why: str) -> Tie | None:
    """The tie that keeps the ratio of two widths; None where it is not one of small numbers, or one is a factor.

    Where one is a segment of the other, the tie is between it and the rest.
    """
    if left.size == right.size:
        return Tie(left, right, why)
    for one, other in ((left, right), (right, left)):
        if isinstance(other, Concat) and one in other.segments:
            left, right = one, axes.concat(segment for segment in other.segments if segment != one)
    ratio = Fraction(left.size, max(right.size, 1))
    of_left, of_right = set(axes.leaves(left)), set(axes.leaves(right))
    factor = (isinstance(left, Product) and of_right <= of_left) or (isinstance(right, Product) and of_left <= of_right)
    if ratio.numerator * ratio.denominator > MAX_RATIO or factor:
        return None
    times_left, times_right = Fixed(ratio.denominator), Fixed(ratio.numerator)
    return Tie(axes.product([times_left, left]), axes.product([times_right, right]), why)


def parts_of(dim: Dim) -> Iterator[Dim]:
    """A dimension, its factors but for the fixed ones, and each removable factor and segment of it."""
    dim = axes.resolve(dim)
    yield dim
    factors = [factor for factor in axes.factors_of(dim) if not isinstance(factor, Fixed)]
    if factors:
        yield axes.product(factors)
    for part in (*factors, *(dim.segments if isinstance(dim, Concat) else ())):
        if part != dim and not isinstance(part, Fixed):
            yield from parts_of(part)
