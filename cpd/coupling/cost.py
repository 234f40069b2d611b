"""Cost: parameters, multiply-accumulates and activations of any widths, from the graph's shapes alone.

Each figure is a sum of products of dimensions, so a candidate's cost needs no trace: put its widths in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from torch.fx import Node

from cpd.algebra import axes
from cpd.algebra.axes import Axis, Dim, Fixed
from cpd.algebra.polynomials import ProductSums
from cpd.errors import some
from cpd.rules import Context, arguments
from cpd.rules.contraction import KERNEL, spell
from cpd.trace.graph import op_name

#: Reasons given only where a term has no other: they say little about what to change.
_PLAIN = ("a single channel", "no parameter lies along it")
NO_DIMENSION = "no removable dimension"
#: Modules with unused parameters that are named.
_NAMED = 4
UNTRACED = "in a submodule that cannot be exported"

CONVOLUTIONS = {f"conv{rank}d" for rank in (1, 2, 3)}
TRANSPOSED = {f"conv_transpose{rank}d" for rank in (1, 2, 3)}
MATRIX_PRODUCTS = {"matmul", "linalg_matmul", "bmm", "mm", "mv", "addmm", "baddbmm", "addmv"}
_MULTIPLYING = {
    "linear", "bilinear", "deform_conv2d", "conv_tbc", "tensordot", "inner", "scaled_dot_product_attention", "einsum",
    *CONVOLUTIONS, *TRANSPOSED, *MATRIX_PRODUCTS,
}  # fmt: skip
#: Ops that give a view of their input, or do nothing in eval mode: no memory of their own.
VIEWS = {
    "view", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "t", "expand", "expand_as", "slice",
    "select", "unbind", "chunk", "split", "split_with_sizes", "getitem", "alias", "dropout", "detach", "narrow",
}  # fmt: skip


@dataclass(frozen=True)
class Term:
    """A product of dimensions, and what it counts; `name` is that of a parameter, `node` an operation."""

    dims: tuple[Dim, ...]
    parameters: int = 0
    macs: int = 0
    activations: int = 0
    name: str = ""
    node: Node | None = None


@dataclass(frozen=True)
class CostFigures:
    """The cost of one set of widths.

    Attributes:
        parameters: number of parameter elements.
        macs: multiply-accumulates of one forward pass on the example inputs (convolutions, linear layers, matrix
            products, attention).
        activations: elements of all tensors computed in one forward pass (views counted once, with their source).
    """

    parameters: int
    macs: int
    activations: int


class Slope(NamedTuple):
    """What one position more of an axis adds to each figure of `CostFigures`."""

    parameters: float
    macs: float
    activations: float


@dataclass(frozen=True)
class FrozenShare:
    """What one reason keeps from being pruned.

    Attributes:
        reason: the reason without its place; numbers that differ from place to place are written N.
        parameters: share of the parameters that the forward uses.
        macs: share of the model's MACs.
        tensors: number of parameters, as tensors, that it applies to.
        places: where it applies, each as `op in module, file:line`, or the name of a parameter where the reason names
            no place; in the order of the model.
    """

    reason: str
    parameters: float
    macs: float
    tensors: int
    places: tuple[str, ...]


class Cost:
    """Evaluates the cost of any widths of one model.

    Attributes:
        unused: elements of each parameter that the forward never uses. They count as parameters, since the model holds
            them, but not in the shares: they stand in nobody's way, and nothing would become faster without them.
    """

    def __init__(self, ctx: Context, dims: Mapping[str, tuple[Dim, ...]], tensors: Mapping[str, Tensor]) -> None:
        self._terms = [*_parameter_terms(dims, tensors), *_operation_terms(ctx)]
        parts = tuple(f"{part}." for part in ctx.graph.parts)
        others = _other_parameters(dims, tensors)
        self.unused = {name: size for name, size in others.items() if not parts or name.startswith(parts)}
        self._untraced = {name: size for name, size in others.items() if name not in self.unused}
        weights = [(term.parameters, term.macs, term.activations) for term in self._terms]
        self._fixed = sum(others.values())
        self._sums = ProductSums([term.dims for term in self._terms], weights, figures=3)

    def without(self, nodes: Collection[Node], removes: Callable[[str], bool], empty: Collection[Axis] = ()) -> Cost:
        """The cost of a model without some operations.

        Args:
            nodes: the operations that are not there.
            removes: whether a parameter is not there either.
            empty: axes of which no position is left.
        """
        other = copy(self)
        kept = [not (term.node in nodes or (term.name and removes(term.name))) for term in self._terms]
        other._terms = [term for term, stays in zip(self._terms, kept, strict=True) if stays]
        other.unused = {name: size for name, size in self.unused.items() if not removes(name)}
        other._fixed = self._fixed - sum(self.unused.values()) + sum(other.unused.values())
        other._sums = self._sums.weighted(np.array(kept)[:, None]).without(empty)
        return other

    def __call__(self, counts: Mapping[Axis, int]) -> CostFigures:
        """The cost when each axis keeps `counts[axis]` positions (all, if it is not named)."""
        (figures,) = self.many(self._sums.widths(counts)[None])
        return CostFigures(*map(int, figures))

    @property
    def axes(self) -> list[Axis]:
        """The open axes that the cost depends on, in the order of the columns of `many`."""
        return self._sums.axes

    def many(self, widths: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The cost of many candidates at once.

        Args:
            widths: [candidates, axes], in the order of `axes`.

        Returns:
            [candidates, 3]: parameters, MACs and activations of each.
        """
        figures: npt.NDArray[np.int64] = self._sums(widths) + np.array([self._fixed, 0, 0])
        return figures

    def slopes(self, counts: Mapping[Axis, int]) -> dict[Axis, Slope]:
        """What one position more of each open axis adds at these widths, to first order: what one less saves.

        The slope of the activations is CPD's B x H x W, summed over all tensors that carry the position.
        """
        found = self._sums.slopes(self._sums.widths(counts))
        return {axis: Slope(*map(float, row)) for axis, row in zip(self._sums.axes, found, strict=True)}

    def open_share(self) -> dict[str, float]:
        """The share of the parameters that the forward uses, and of MACs, in terms with at least one open axis."""
        share = {"parameters": 0, "macs": 0}
        for term in self._terms:
            if any(axis.frozen is None for dim in term.dims for axis in axes.leaves(dim)):
                size = math.prod(dim.size for dim in term.dims)
                share["parameters"] += term.parameters * size
                share["macs"] += term.macs * size
        parameters, macs = self._whole()
        return {"parameters": share["parameters"] / parameters, "macs": share["macs"] / macs}

    def macs_share(self) -> dict[Axis, float]:
        """The share of the MACs in terms that carry each axis; a term of two axes counts for both."""
        found, (_, whole) = dict[Axis, float](), self._whole()
        for term in self._terms:
            macs = term.macs * math.prod(dim.size for dim in term.dims)
            for axis in {axis for dim in term.dims for axis in axes.leaves(dim)} if macs else ():
                found[axis] = found.get(axis, 0.0) + macs / whole
        return found

    def _whole(self) -> tuple[int, int]:
        """The parameters that the forward uses, and the MACs, at least 1 of each."""
        full = self({})
        return max(full.parameters - sum(self.unused.values()), 1), max(full.macs, 1)

    def frozen_share(self) -> tuple[FrozenShare, ...]:
        """The rest of `open_share` by reason, most costly first.

        A term that several reasons hold is shared equally among them, so all shares add up to one with those of
        `open_share`.
        """
        rows: dict[str, _Tally] = {}
        for term in self._terms:
            size = math.prod(dim.size for dim in term.dims)
            parameters, macs = term.parameters * size, term.macs * size
            leaves = [axis for dim in term.dims for axis in axes.leaves(dim)]
            if not (parameters or macs) or any(axis.frozen is None for axis in leaves):
                continue
            found = _by_reason(axis.frozen for axis in leaves if axis.frozen is not None)
            for key, reasons in found.items():
                told = [(why, place or term.name) for why, place in reasons]
                rows.setdefault(key, _Tally()).add(told, parameters / len(found), macs / len(found), term.parameters)
        for name, size in self._untraced.items():
            rows.setdefault(UNTRACED, _Tally()).add([(UNTRACED, name)], size, 0, 1)
        shares = [tally.share(*self._whole()) for tally in rows.values()]
        return tuple(sorted(shares, key=lambda row: (-max(row.parameters, row.macs), row.reason)))


class _Tally:
    """What one reason has been found to hold so far."""

    def __init__(self) -> None:
        self.whys: dict[str, None] = {}
        self.places: dict[str, None] = {}
        self.parameters = self.macs = 0.0
        self.tensors = 0

    def add(self, reasons: Iterable[tuple[str, str]], parameters: float, macs: float, tensors: int) -> None:
        for why, place in reasons:
            self.whys[why] = None
            if place:
                self.places[place] = None
        self.parameters += parameters
        self.macs += macs
        self.tensors += tensors

    def share(self, parameters: int, macs: int) -> FrozenShare:
        first = next(iter(self.whys))
        why = first if len(self.whys) == 1 else _alike(first)
        return FrozenShare(why, self.parameters / parameters, self.macs / macs, self.tensors, tuple(self.places))


def _by_reason(frozen: Iterable[str]) -> dict[str, list[tuple[str, str]]]:
    """The reasons worth telling as (why, place), alike ones together."""
    reasons = [reason for reason in dict.fromkeys(frozen) if not reason.startswith(KERNEL)]
    telling = [reason for reason in reasons if not reason.startswith(_PLAIN)] or reasons or [NO_DIMENSION]
    found: dict[str, list[tuple[str, str]]] = {}
    for why, place in map(split_reason, telling):
        found.setdefault(_alike(why), []).append((why, place))
    return found


def split_reason(reason: str) -> tuple[str, str]:
    """The reason of `Context.reason` as (why, place); a reason without a place has none."""
    why, _, place = reason.rpartition(" [")
    return (why, place[:-1]) if why and place.endswith("]") and " in " in place else (reason, "")


def _alike(why: str) -> str:
    """Equal for reasons that differ only in numbers."""
    return re.sub(r"\d+", "N", why)


def _parameter_terms(dims: Mapping[str, tuple[Dim, ...]], tensors: Mapping[str, Tensor]) -> list[Term]:
    """One term a parameter, however many names it has."""
    first: dict[int, str] = {}
    for name in dims:
        if isinstance(tensors[name], nn.Parameter):
            first.setdefault(id(tensors[name]), name)
    return [Term(dims[name], parameters=1, name=name) for name in first.values()]


def unused_sentence(unused: Mapping[str, int]) -> str:
    """What to say of parameters that the forward never uses, given the elements of each."""
    modules = list(dict.fromkeys(name.rpartition(".")[0] or name for name in unused))
    return f"The forward never uses {sum(unused.values()):,} parameters ({some(modules, _NAMED)})."


def _other_parameters(dims: Mapping[str, tuple[Dim, ...]], tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Elements of each parameter that the graph does not read, by its first name."""
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        if name not in dims and isinstance(tensor, nn.Parameter):
            first.setdefault(id(tensor), name)
    return {name: tensors[name].numel() for name in first.values()}


def _operation_terms(ctx: Context) -> list[Term]:
    terms: list[Term] = []
    for node in ctx.graph.operations:
        value = ctx.values[node]
        if isinstance(value, tuple) and op_name(node) not in VIEWS and not op_name(node).endswith("_"):
            terms.append(Term(value, activations=1, node=node))
        terms.extend(Term(dims, macs=1, node=node) for dims in _macs(ctx, node))
    return terms


def _macs(ctx: Context, node: Node) -> list[tuple[Dim, ...]]:
    """Products of dimensions whose sum is the op's multiply-accumulates."""
    name = op_name(node)
    if name not in _MULTIPLYING:
        return []
    bound, value = arguments(node), ctx.values[node]
    assert isinstance(value, tuple)
    if name == "linear":
        return [(*value, ctx.shape(bound["weight"])[-1])]
    if name in {"bilinear", "deform_conv2d", *CONVOLUTIONS}:
        return [(*value, *ctx.shape(bound["weight"])[1:])]
    if name == "conv_tbc":
        return [(*value, *ctx.shape(bound["weight"])[:2])]
    if name in {"tensordot", "inner"}:
        return [_tensordot_macs(ctx, node, bound)]
    if name in TRANSPOSED:
        _, outputs, *kernel = ctx.shape(bound["weight"])
        return [(*ctx.shape(bound["input"]), outputs, *kernel)]
    if name in MATRIX_PRODUCTS:
        factors = [source for source in (node.args[-2], node.args[-1]) if isinstance(source, Node)]
        return [(*value, ctx.shape(factors[0])[-1])]
    if name == "scaled_dot_product_attention":
        query, key = ctx.shape(bound["query"]), ctx.shape(bound["key"])
        return [(*query[:-1], key[-2], query[-1]), (*value, key[-2])]
    return [_einsum_macs(ctx, node, bound)]


def _tensordot_macs(ctx: Context, node: Node, bound: dict[str, Any]) -> tuple[Dim, ...]:
    value, left = ctx.values[node], ctx.shape(bound["self"])
    assert isinstance(value, tuple)
    return (*value, *(left[dim] for dim in bound.get("dims_self", [-1]) if left))


def _einsum_macs(ctx: Context, node: Node, bound: dict[str, object]) -> tuple[Dim, ...]:
    letters: dict[str, Dim] = {}
    terms = str(bound["equation"]).replace(" ", "").partition("->")[0].split(",")
    sources = bound["tensors"]
    assert isinstance(sources, (list, tuple))
    for term, source in zip(terms, sources, strict=True):
        shape = ctx.shape(source)
        for letter, dim in zip(spell(term, len(shape)), shape, strict=True):
            if letter not in letters or letters[letter] == Fixed(1):
                letters[letter] = dim
    return tuple(letters.values()) if len(terms) > 1 else (Fixed(0),)
