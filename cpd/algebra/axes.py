"""The axis algebra: how the positions of every tensor dimension relate to each other. No torch in here.

An **axis** is a run of positions that can each be removed. A tensor's dimension is an expression over axes:

    Fixed(n)          n positions that are never removed (batch, space, constants)
    Axis(n)           n removable positions
    Product(a, b, …)  row-major product, outermost first: position (i, j) is kept if i and j are
    Concat(a, b, …)   one after the other

Expressions are immutable; an `Axis` is a variable that can be *bound* to a finer expression (split into a
product, cut into pieces, joined with another axis), and then stands for it in every expression at once.
That is how `reshape(3, heads, head_dim)` on the output of a linear layer also splits the rows of its weight.

`unify(a, b)` demands that two dimensions lose the same positions; whatever cannot be aligned is frozen.
All operations are total: where there is no finer answer, they freeze, with the reason given.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Mask: TypeAlias = npt.NDArray[np.bool_]
Indices: TypeAlias = npt.NDArray[np.int64]

#: A dimension that does not align with a reshape is cut into at most this many equal pieces, else frozen.
MAX_PIECES = 64


@dataclass(frozen=True, slots=True)
class Fixed:
    """`size` positions that are never removed."""

    size: int


class Axis:
    """`size` removable positions, of which `minimum` must stay; may become bound to a finer expression."""

    __slots__ = ("bound", "frozen", "minimum", "serial", "size", "why_minimum")

    _created = 0

    def __init__(self, size: int) -> None:
        Axis._created += 1
        self.size = size
        self.serial = Axis._created
        self.bound: Dim | None = None
        self.frozen: str | None = None
        self.minimum = 1
        self.why_minimum = ""

    def __repr__(self) -> str:
        return f"Axis({self.size}{'!' if self.frozen else ''})"


@dataclass(frozen=True, slots=True)
class Product:
    """Row-major product of factors, outermost first. Build it with `product`."""

    factors: tuple[Dim, ...]

    @property
    def size(self) -> int:
        """Number of positions."""
        return math.prod(factor.size for factor in self.factors)


@dataclass(frozen=True, slots=True)
class Concat:
    """Segments one after the other. Build it with `concat`."""

    segments: tuple[Dim, ...]

    @property
    def size(self) -> int:
        """Number of positions."""
        return sum(segment.size for segment in self.segments)


Dim: TypeAlias = Fixed | Axis | Product | Concat


# ---------------------------------------------------------------- building expressions in normal form


def resolve(dim: Dim) -> Dim:
    """`dim` in normal form, every bound axis replaced by what it is bound to."""
    if isinstance(dim, Axis):
        if dim.bound is None:
            return dim
        dim.bound = resolve(dim.bound)
        return dim.bound
    if isinstance(dim, Product):
        return product(dim.factors)
    if isinstance(dim, Concat):
        return concat(dim.segments)
    return dim


def factors_of(dim: Dim) -> tuple[Dim, ...]:
    """The factors of a resolved dimension, outermost first; `()` for a single fixed position."""
    if isinstance(dim, Product):
        return dim.factors
    return () if dim == Fixed(1) else (dim,)


def product(dims: Iterable[Dim]) -> Dim:
    """The row-major product: nested products flattened, neighbouring fixed factors merged, ones dropped."""
    flat: list[Dim] = []
    for dim in dims:
        for factor in factors_of(resolve(dim)):
            if flat and isinstance(factor, Fixed) and isinstance(flat[-1], Fixed):
                flat[-1] = Fixed(flat[-1].size * factor.size)
            else:
                flat.append(factor)
    if not flat:
        return Fixed(1)
    return flat[0] if len(flat) == 1 else Product(tuple(flat))


def concat(dims: Iterable[Dim]) -> Dim:
    """The concatenation: nested ones flattened, fixed neighbours merged, a common inner factor taken out."""
    flat: list[Dim] = []
    for dim in dims:
        resolved = resolve(dim)
        for segment in resolved.segments if isinstance(resolved, Concat) else (resolved,):
            if segment.size == 0:
                continue
            if flat and isinstance(segment, Fixed) and isinstance(flat[-1], Fixed):
                flat[-1] = Fixed(flat[-1].size + segment.size)
            else:
                flat.append(segment)
    if len(flat) <= 1:
        return flat[0] if flat else Fixed(0)
    last = factors_of(flat[-1])[-1:]
    if last and not isinstance(last[0], Fixed) and all(factors_of(segment)[-1:] == last for segment in flat):
        return product([concat(product(factors_of(segment)[:-1]) for segment in flat), last[0]])
    return Concat(tuple(flat))


def leaves(dim: Dim) -> Iterator[Axis]:
    """Every axis in `dim`, in order of position, repeated where it occurs more than once."""
    dim = resolve(dim)
    if isinstance(dim, Axis):
        yield dim
    elif isinstance(dim, Product):
        for factor in dim.factors:
            yield from leaves(factor)
    elif isinstance(dim, Concat):
        for segment in dim.segments:
            yield from leaves(segment)


def is_open(dim: Dim) -> bool:
    """Whether something of `dim` may be removed."""
    return any(axis.frozen is None for axis in leaves(dim))


# ---------------------------------------------------------------- refining: freeze, bind, split, cut


def freeze(dim: Dim, reason: str) -> None:
    """Forbid removing anything from `dim`. The first reason given to an axis stays."""
    for axis in leaves(dim):
        if axis.frozen is None:
            axis.frozen = reason


def _bind(axis: Axis, dim: Dim) -> None:
    """Let `axis` stand for `dim` from now on, everywhere."""
    if axis.frozen is not None:
        freeze(dim, axis.frozen)
    axis.bound = dim


def split(dim: Dim, inner: int, reason: str) -> tuple[Dim, Dim]:
    """Split `dim` into (outer, inner) with `inner` positions in the inner part: a reshape's boundary.

    Axes that the boundary falls into become products. Where nothing divides evenly, `dim` is cut into equal
    pieces that must lose the same positions; with more than `MAX_PIECES` of them it is frozen for `reason`.
    """
    dim = resolve(dim)
    taken: list[Dim] = []
    rest = list(factors_of(dim))
    need = inner
    while need > 1:
        size = rest[-1].size
        if need % size == 0:
            taken.insert(0, rest.pop())
            need //= size
        elif _divides(rest[-1], need):
            outer, part = _split_factor(rest.pop(), need, reason)
            rest.append(outer)
            taken.insert(0, part)
            need = 1
        else:
            return _split_into_pieces(dim, inner, reason)
    return product(rest), product(taken)


def _split_factor(factor: Dim, inner: int, reason: str) -> tuple[Dim, Dim]:
    if isinstance(factor, Fixed):
        return Fixed(factor.size // inner), Fixed(inner)
    if isinstance(factor, Axis):
        parts = Axis(factor.size // inner), Axis(inner)
        _bind(factor, Product(parts))
        return parts
    assert isinstance(factor, Concat)
    halves = [split(segment, inner, reason) for segment in factor.segments]
    for _, right in halves[1:]:
        unify(halves[0][1], right, reason)
    return concat(left for left, _ in halves), resolve(halves[0][1])


def _split_into_pieces(dim: Dim, inner: int, reason: str) -> tuple[Dim, Dim]:
    count = dim.size // inner
    if count > MAX_PIECES:
        freeze(dim, reason)
        return Fixed(count), Fixed(inner)
    pieces: list[Dim] = []
    for _ in range(count):
        piece, dim = cut(dim, inner)
        pieces.append(piece)
    for piece in pieces[1:]:
        unify(pieces[0], piece, reason)
    return Fixed(count), resolve(pieces[0])


def cut(dim: Dim, offset: int) -> tuple[Dim, Dim]:
    """Cut `dim` into its first `offset` positions and the rest, and any axis that the cut falls into with it."""
    dim = resolve(dim)
    if offset <= 0 or offset >= dim.size:
        return (Fixed(0), dim) if offset <= 0 else (dim, Fixed(0))
    if isinstance(dim, Fixed):
        return Fixed(offset), Fixed(dim.size - offset)
    if isinstance(dim, Axis):
        parts = Axis(offset), Axis(dim.size - offset)
        _bind(dim, Concat(parts))
        return parts
    if isinstance(dim, Concat):
        return _cut_concat(dim, offset)
    return _cut_product(dim, offset)


def _cut_concat(dim: Concat, offset: int) -> tuple[Dim, Dim]:
    left: list[Dim] = []
    right: list[Dim] = []
    for segment in dim.segments:
        head, tail = cut(segment, offset)
        left.append(head)
        right.append(tail)
        offset -= segment.size
    return concat(left), concat(right)


def _cut_product(dim: Product, offset: int) -> tuple[Dim, Dim]:
    """Cut between two outer positions, or inside one of them."""
    inner = product(dim.factors[1:])
    whole, part = divmod(offset, inner.size)
    head, rest = cut(dim.factors[0], whole)
    if not part:
        return product([head, inner]), product([rest, inner])
    one, tail = cut(rest, 1)
    inner_head, inner_tail = cut(inner, part)
    inner = resolve(inner)
    return (
        concat([product([head, inner]), product([one, inner_head])]),
        concat([product([one, inner_tail]), product([tail, inner])]),
    )


# ---------------------------------------------------------------- joining


def unify(left: Dim, right: Dim, reason: str) -> Dim:
    """Demand that two dimensions of one size lose the same positions; return what both have become.

    Factors are aligned from the innermost, split where they do not line up, then joined. What cannot be
    aligned, or meets a fixed position, is frozen for `reason`.
    """
    left, right = resolve(left), resolve(right)
    assert left.size == right.size, f"unify: {left.size} != {right.size} ({reason})"
    if left == right:
        return left
    if isinstance(left, Axis) and isinstance(right, Axis):
        older, younger = sorted((left, right), key=lambda axis: axis.serial)
        _bind(younger, older)
    elif isinstance(left, Fixed) or isinstance(right, Fixed):
        freeze(left, reason)
        freeze(right, reason)
    elif isinstance(left, Axis) or isinstance(right, Axis):
        axis, other = (left, right) if isinstance(left, Axis) else (right, left)
        if any(leaf is axis for leaf in leaves(other)):  # the same positions times a single removable one
            freeze(other, reason)
        else:
            _bind(axis, other)  # type: ignore[arg-type]
    elif isinstance(left, Concat) and isinstance(right, Concat):
        _unify_concats(left, right, reason)
    else:
        _unify_products(left, right, reason)
    return resolve(left)


def _unify_products(left: Dim, right: Dim, reason: str) -> None:
    *outer_left, inner_left = factors_of(left)
    *outer_right, inner_right = factors_of(right)
    size = min(inner_left.size, inner_right.size)
    if inner_left.size != inner_right.size and size == 1:  # a single removable position with no counterpart
        single, rest, other = (
            (inner_left, outer_left, right) if inner_left.size == 1 else (inner_right, outer_right, left)
        )
        freeze(single, reason)
        unify(product(rest), other, reason)
    elif inner_left.size == inner_right.size:
        unify(inner_left, inner_right, reason)
        unify(product(outer_left), product(outer_right), reason)
    elif all(_divides(factor, size) for factor in (inner_left, inner_right)):
        rest_left, inner_left = split(inner_left, size, reason)
        rest_right, inner_right = split(inner_right, size, reason)
        unify(inner_left, inner_right, reason)
        unify(product([*outer_left, rest_left]), product([*outer_right, rest_right]), reason)
    elif isinstance(left, Concat) or isinstance(right, Concat):
        _unify_concats(left, right, reason)
    else:
        freeze(left, reason)
        freeze(right, reason)


def _divides(factor: Dim, size: int) -> bool:
    """Whether `split(factor, size)` needs no cutting into pieces."""
    parts = factor.segments if isinstance(factor, Concat) else (factor,)
    return not any(part.size % size for part in parts)


def _unify_concats(left: Dim, right: Dim, reason: str) -> None:
    """Align two concatenations from their first positions, cutting at every boundary of either."""
    while left.size:
        left, right = resolve(left), resolve(right)
        first = [dim.segments[0].size if isinstance(dim, Concat) else dim.size for dim in (left, right)]
        head_left, left = cut(left, min(first))
        head_right, right = cut(right, min(first))
        unify(head_left, head_right, reason)


# ---------------------------------------------------------------- evaluating


def count(dim: Dim, counts: Mapping[Axis, int]) -> int:
    """How many positions of `dim` stay when each axis keeps `counts[axis]` (all, if it is not named)."""
    if isinstance(dim, Fixed):
        return dim.size
    if isinstance(dim, Axis):
        return counts.get(dim, dim.size) if dim.bound is None else count(resolve(dim), counts)
    if isinstance(dim, Product):
        return math.prod(count(factor, counts) for factor in dim.factors)
    return sum(count(segment, counts) for segment in dim.segments)


def mask(dim: Dim, keep: Mapping[Axis, Mask]) -> Mask:
    """Which positions of `dim` stay, given the mask of each axis (all ones, if it is not named)."""
    dim = resolve(dim)
    if isinstance(dim, Axis) and dim in keep:
        return keep[dim]
    if isinstance(dim, Product):
        result = np.ones(1, dtype=np.bool_)
        for factor in dim.factors:
            result = np.logical_and.outer(result, mask(factor, keep)).reshape(-1)
        return result
    if isinstance(dim, Concat):
        return np.concatenate([mask(segment, keep) for segment in dim.segments])
    return np.ones(dim.size, dtype=np.bool_)


def substitute(dim: Dim, others: Mapping[Axis, Axis]) -> Dim:
    """`dim` with axes of other sizes in the place of some of its own."""
    dim = resolve(dim)
    if isinstance(dim, Axis):
        return others.get(dim, dim)
    if isinstance(dim, Product):
        return product(substitute(factor, others) for factor in dim.factors)
    if isinstance(dim, Concat):
        return concat(substitute(segment, others) for segment in dim.segments)
    return dim


def labels(dim: Dim, axis: Axis) -> Indices:
    """For each position of `dim`, the position of `axis` that it belongs to; -1 where it belongs to none."""
    dim = resolve(dim)
    if dim is axis:
        return np.arange(axis.size, dtype=np.int64)
    if isinstance(dim, Product):
        result = np.full(1, -1, dtype=np.int64)
        for factor in dim.factors:
            result = np.maximum.outer(result, labels(factor, axis)).reshape(-1)
        return result
    if isinstance(dim, Concat):
        return np.concatenate([labels(segment, axis) for segment in dim.segments])
    return np.full(dim.size, -1, dtype=np.int64)
