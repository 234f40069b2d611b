"""Ops that tell positions of a dimension apart, by order or by index: that dimension alone cannot shrink."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node

from cpd.algebra.axes import Dim, Fixed
from cpd.rules.base import Context, Shape, Value, broadcast, fixed, rule, tensor_inputs
from cpd.rules.layout import run
from cpd.trace.graph import op_name, shape_of

_PICKED = "single channels are picked, ordered or written to"
_COUPLED = "coupled elementwise with a dimension that is fixed"


def _freeze(ctx: Context, node: Node, dims: Iterable[Dim], why: str) -> None:
    for dim in dims:
        ctx.freeze(dim, node, why)


def _beside(ctx: Context, node: Node, shape: Shape, other: Shape, axis: int) -> list[Dim]:
    """Unify two tensors in all dimensions but `axis`, which is picked from; where one is cut short, nothing goes."""
    result = list(shape)
    if len(shape) != len(other):
        _freeze(ctx, node, (*shape, *other), _PICKED)
        return result
    for index, (ours, theirs) in enumerate(zip(shape, other, strict=True)):
        if index == axis or ours.size != theirs.size:
            _freeze(ctx, node, (ours, theirs), _PICKED)
        else:
            result[index] = ctx.unify(ours, theirs, node, _COUPLED)
    return result


@rule("cumsum", "cumprod", "logcumsumexp", "index_select", "index_fill", "diff")
def ordered(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """Positions of one dimension are told apart by their order or index: that dimension cannot shrink."""
    first, *others = (ctx.shape(source) for source in tensor_inputs(node))
    shape = list(first)
    axis = args["dim"] % len(shape)
    ctx.freeze(shape[axis], node, "channels are told apart by their order or index")
    for other in others:
        if len(other) == len(shape) and "index" not in args:
            shape = _beside(ctx, node, tuple(shape), other, axis)
        else:
            _freeze(ctx, node, other, "used as an index")
    shape[axis] = Fixed(shape_of(node)[axis])
    return tuple(shape)


@rule("cross", "linalg_cross")
def cross(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """The three positions of one dimension are mixed, each in its own way; all others broadcast."""
    result = broadcast(ctx, node, [ctx.shape(source) for source in tensor_inputs(node)])
    axis = result if args["dim"] is None else [result[args["dim"]]]
    _freeze(ctx, node, axis, "channels are told apart by their order or index")
    return result


@rule("cummax", "cummin", "sort", "argsort", "topk", "kthvalue", "mode", "median", "nanmedian", "msort")
def sorted_(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """Values of one dimension in order, and where they were: the other dimensions stay."""
    shape = ctx.shape(args["self"])
    value = fixed(node)
    results = value if isinstance(value, list) else [value]
    if not shape or ("dim" not in args and op_name(node) != "msort"):
        _freeze(ctx, node, shape, _PICKED)
        return value
    axis = args.get("dim", 0) % len(shape)
    ctx.freeze(shape[axis], node, _PICKED)
    keeps = len(results[0]) == len(shape)
    picked = results[0][axis : axis + 1] if keeps else ()
    found = (*shape[:axis], *picked, *shape[axis + 1 :])
    return [found for _ in results] if isinstance(value, list) else found


@rule("gather", "take_along_dim")
def gather(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """Positions of one dimension, each picked by an index: in the others the index lies along the tensor."""
    index: Node = args["index"] if "index" in args else args["indices"]
    shape, picks = ctx.shape(args["self"]), ctx.shape(index)
    if args["dim"] is None or not shape or len(shape) != len(picks):
        _freeze(ctx, node, (*shape, *picks), _PICKED)
        return fixed(node)
    axis = args["dim"] % len(shape)
    _freeze(ctx, node, (shape[axis], picks[axis]), _PICKED)
    if "indices" in args:  # of a single position, it is repeated
        rest = [(Fixed(1), Fixed(1)) if at == axis else pair for at, pair in enumerate(zip(shape, picks, strict=True))]
        result = list(broadcast(ctx, node, list(zip(*rest, strict=True))))
    else:
        result = _beside(ctx, node, picks, shape, axis)
    result[axis] = Fixed(shape_of(node)[axis])
    return tuple(result)


@rule("scatter", "scatter_add", "scatter_reduce")
def scatter(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """Single positions of one dimension are written to: in the others index and source lie along the tensor."""
    shape = ctx.shape(args["self"])
    axis = args["dim"] % len(shape) if shape else 0
    for name in ("index", "src"):
        if isinstance(args.get(name), Node):
            shape = tuple(_beside(ctx, node, shape, ctx.shape(args[name]), axis))
    return shape


@rule("index_add", "index_copy", "index_reduce")
def index_add(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """Whole slices of one dimension are written to, as an index says: the other dimensions are those of the source."""
    _freeze(ctx, node, ctx.shape(args["index"]), "used as an index")
    shape = ctx.shape(args["self"])
    axis = args["dim"] % len(shape) if shape else 0
    return tuple(_beside(ctx, node, shape, ctx.shape(args["source"]), axis))


@rule("slice_scatter")
def slice_scatter(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """A run of positions is replaced by those of another tensor."""
    shape, source = ctx.shape(args["self"]), ctx.shape(args["src"])
    axis = args["dim"] % len(shape)
    for ours, theirs in zip(run(ctx, node, args, shape, source[axis].size), source, strict=True):
        ctx.unify(ours, theirs, node, _COUPLED)
    return ctx.shape(args["self"])


@rule("select_scatter", "diagonal_scatter")
def select_scatter(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """One position of a dimension, or a diagonal of two, is replaced: there nothing goes."""
    shape, source = ctx.shape(args["self"]), ctx.shape(args["src"])
    places = {args[name] % len(shape) for name in ("dim", "dim1", "dim2") if name in args}
    _freeze(ctx, node, (shape[place] for place in places), _PICKED)
    rest = [dim for place, dim in enumerate(shape) if place not in places]
    _freeze(ctx, node, source[len(rest) :], _PICKED)
    for ours, theirs in zip(rest, source, strict=False):
        ctx.unify(ours, theirs, node, _COUPLED)
    return ctx.shape(args["self"])


@rule("index", "_unsafe_index")
def index(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """Gather by index tensors: the indexed dimensions cannot shrink, the others stay."""
    if any(source.meta["val"].dtype == torch.bool for source in tensor_inputs(node)[1:]):
        return picked(ctx, node, args)
    return _indexed(ctx, node, args, shape_of(node))


@rule("index_put", "_unsafe_index_put", "_index_put_impl")
def index_put(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """Write by index tensors: the indexed dimensions cannot shrink, the others are those of what is written.

    One number written where a mask over the first dimensions is true (`x[x < 0] = 0`) works element by element.
    """
    self, values, indices = ctx.shape(args["self"]), ctx.shape(args["values"]), args["indices"]
    mask = indices[0]
    if len(indices) == 1 and mask.meta["val"].dtype == torch.bool and args["values"].meta["val"].numel() == 1:
        for ours, theirs in zip(self, ctx.shape(mask), strict=False):
            ctx.unify(ours, theirs, node, _COUPLED)
        return ctx.shape(args["self"])
    if any(item is not None and item.meta["val"].dtype == torch.bool for item in indices):
        return picked(ctx, node, args)
    places = [
        item if item is None else torch.empty(shape_of(item), dtype=torch.long, device="meta") for item in indices
    ]
    read = torch.ops.aten.index(torch.empty(shape_of(args["self"]), device="meta"), places)
    broadcast(ctx, node, [_indexed(ctx, node, args, tuple(read.shape)), values])
    return ctx.shape(args["self"])


def _indexed(ctx: Context, node: Node, args: dict[str, Any], sizes: tuple[int, ...]) -> Shape:
    """What index tensors read of a tensor, given its shape in the trace."""
    shape = ctx.shape(args["self"])
    picked = [position for position, item in enumerate(args["indices"]) if item is not None]
    for source in args["indices"]:
        _freeze(ctx, node, ctx.shape(source) if source is not None else (), "used as an index")
    _freeze(ctx, node, (shape[position] for position in picked), "read through an index tensor")
    kept = [dim for position, dim in enumerate(shape) if position not in picked]
    rank = len(sizes) - len(kept)
    start = picked[0] if picked == list(range(picked[0], picked[-1] + 1)) else 0
    new = tuple(Fixed(size) for size in sizes[start : start + rank])
    return (*kept[:start], *new, *kept[start:])


@rule("searchsorted", "bucketize")
def searchsorted(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """Each element's place between boundaries, which are told apart by their order."""
    bounds: Node = args["sorted_sequence"] if "sorted_sequence" in args else args["boundaries"]
    values = args["self"]
    _freeze(ctx, node, ctx.shape(bounds), "channels are told apart by their order or index")
    if not isinstance(values, Node):
        return fixed(node)
    if len(shape_of(bounds)) > 1 or args.get("sorter") is not None:
        for source in tensor_inputs(node):
            _freeze(ctx, node, ctx.shape(source), _PICKED)
        return fixed(node)
    return ctx.shape(values)


@rule("diagonal", "linalg_diagonal")
def diagonal(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """The diagonal of two dimensions, which cannot shrink, becomes the last."""
    shape = ctx.shape(args["A"] if "A" in args else args["self"])
    places = {args["dim1"] % len(shape), args["dim2"] % len(shape)}
    _freeze(ctx, node, (shape[place] for place in places), _PICKED)
    return (*(dim for place, dim in enumerate(shape) if place not in places), Fixed(shape_of(node)[-1]))


@rule("tril", "triu")
def triangle(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """Positions of the last two dimensions are compared: those cannot shrink."""
    shape = ctx.shape(args["self"])
    _freeze(ctx, node, shape[-2:], "channels are told apart by their order or index")
    return shape


@rule(
    "masked_scatter", "masked_select", "take", "put", "diag", "diagflat", "diag_embed", "trace", "as_strided",
    "as_strided_scatter", "fill_diagonal", "histc", "bincount", "quantile", "nanquantile", "cartesian_prod",
    "combinations", "block_diag", "vander", "multinomial", "pdist",
    "cov", "corrcoef", "gradient", "trapezoid", "cumulative_trapezoid",
)  # fmt: skip
def picked(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """Single positions of all dimensions are picked, ordered or written to: nothing of these tensors is removed."""
    for source in tensor_inputs(node):
        _freeze(ctx, node, ctx.shape(source), _PICKED)
    return fixed(node)


@rule(
    "linalg_householder_product", "linalg_matrix_exp", "matrix_exp", "linalg_solve", "linalg_solve_ex", "linalg_inv",
    "linalg_inv_ex", "inverse", "linalg_qr", "linalg_svd", "linalg_svdvals", "linalg_eigh", "linalg_eigvalsh",
    "linalg_eig", "linalg_eigvals", "linalg_cholesky", "linalg_cholesky_ex", "linalg_det", "linalg_slogdet", "det",
    "slogdet", "logdet", "linalg_pinv", "pinverse", "linalg_lstsq", "linalg_lu_factor", "linalg_solve_triangular",
    "triangular_solve", "cholesky", "cholesky_solve", "linalg_matrix_power", "matrix_power", "geqrf", "orgqr",
    "linalg_matrix_rank", "svd",
)  # fmt: skip
def whole(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """A matrix is taken as a whole: a part of its inverse, say, is not the inverse of a part. Its batch stays fixed."""
    for source in tensor_inputs(node):
        _freeze(ctx, node, ctx.shape(source), "a matrix taken as a whole, of which no part has a meaning of its own")
    return fixed(node)
