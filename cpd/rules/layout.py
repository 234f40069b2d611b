"""Ops that re-lay a tensor: nothing is computed, dimensions are re-bracketed, reordered, joined or cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from cpd.algebra import axes
from cpd.algebra.axes import Axis, Dim, Fixed
from cpd.algebra.ties import Tie
from cpd.rules.base import Context, Shape, Value, broadcast, fixed, rule, tensor_inputs
from cpd.trace.graph import op_name, shape_of

_NO_END = 2**62


def rebracket(ctx: Context, node: Node, dims: Sequence[Dim], sizes: Sequence[int]) -> Shape:
    """A reshape: multiply all dimensions out, then split at the boundaries of the new sizes, innermost first."""
    if 0 in sizes:  # of nothing, whose boundaries say nothing
        return tuple(Fixed(size) for size in sizes)
    flat = axes.product(dims)
    result: list[Dim] = []
    for size in reversed(sizes):
        flat, inner = ctx.split(flat, size, node, "a reshape crosses the boundary of a dimension")
        result.insert(0, inner)
    return tuple(result)


@rule("view", "reshape", "_unsafe_view", "unflatten")
def view(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """Re-bracket; each size that the forward names must equal the width of its dimension."""
    if "dtype" in args:  # the same memory as numbers of another type
        return _other_type(ctx, node, args)
    result = rebracket(ctx, node, ctx.shape(args["self"]), shape_of(node))
    argument = {"reshape": "shape", "unflatten": "sizes"}.get(op_name(node), "size")
    first = args["dim"] % len(ctx.shape(args["self"])) if op_name(node) == "unflatten" else 0
    for index, size in enumerate(args[argument]):
        if size != -1:
            ctx.literal(node, argument, index, result[first + index])
    return result


def _other_type(ctx: Context, node: Node, args: dict[str, Any]) -> Shape:
    """Numbers of the last dimension are taken apart or together where the types differ in size."""
    shape, size = ctx.shape(args["self"]), shape_of(node)[-1:]
    if not shape or shape[-1].size == size[0]:
        return shape
    ctx.freeze(shape[-1], node, "viewed as numbers of another size")
    return (*shape[:-1], Fixed(size[0]))


@rule("flatten", "squeeze", "unsqueeze", "view_as", "reshape_as", "ravel", "atleast_1d", "atleast_2d", "atleast_3d")
def reshape_without_sizes(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """Re-bracket to the shape that the trace found; the forward names no width."""
    return rebracket(ctx, node, ctx.shape(args["self"]), shape_of(node))


@rule("permute")
def permute(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """Dimensions in another order."""
    shape = ctx.shape(args["self"])
    return tuple(shape[dim] for dim in args["dims"])


@rule("transpose", "swapaxes", "swapdims", "t", "numpy_T", "mT", "mH", "matrix_H", "adjoint")
def transpose(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """Two dimensions change places."""
    shape = list(ctx.shape(args["self"]))
    if len(shape) < 2:
        return tuple(shape)
    first = args.get("dim0", args.get("axis0", -2))
    second = args.get("dim1", args.get("axis1", -1))
    shape[first], shape[second] = shape[second], shape[first]
    return tuple(shape)


@rule("movedim", "moveaxis")
def movedim(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """Dimensions moved to other places, the rest in order."""
    shape = ctx.shape(args["self"])
    sources, targets = args["source"], args["destination"]
    if isinstance(sources, int):
        sources, targets = [sources], [targets]
    moved = {target % len(shape): source % len(shape) for source, target in zip(sources, targets, strict=True)}
    rest = iter(index for index in range(len(shape)) if index not in moved.values())
    return tuple(shape[moved[index]] if index in moved else shape[next(rest)] for index in range(len(shape)))


@rule("expand", "broadcast_to")
def expand(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """A repeated dimension is a new axis: all its positions are alike, so any of them may go."""
    shape, sizes = ctx.shape(args["self"]), shape_of(node)
    shape = (Fixed(1),) * (len(sizes) - len(shape)) + shape
    result = tuple(dim if dim.size == size else Axis(size) for dim, size in zip(shape, sizes, strict=True))
    for index, (asked, dim) in enumerate(zip(args["size"], result, strict=True)):
        if asked != -1:
            ctx.literal(node, "size", index, dim)
    return result


@rule("broadcast_tensors")
def broadcast_tensors(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """Several tensors, each of their common shape."""
    common = broadcast(ctx, node, [ctx.shape(source) for source in args["tensors"]])
    return [common for _ in args["tensors"]]


@rule("expand_as")
def expand_as(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """The dimensions of the second tensor, as far as the first has them unified."""
    shape, other = ctx.shape(args["self"]), ctx.shape(args["other"])
    for ours, theirs in zip(reversed(shape), reversed(other), strict=False):
        if ours.size == theirs.size:
            ctx.unify(ours, theirs, node, "expanded to a fixed dimension")
    return ctx.shape(args["other"])


@rule("repeat", "tile")
def repeat(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """The whole dimension several times over."""
    shape = ctx.shape(args["self"])
    repeats = list(args["repeats"] if op_name(node) == "repeat" else args["dims"])
    repeats = [1] * (len(shape) - len(repeats)) + repeats
    shape = (Fixed(1),) * (len(repeats) - len(shape)) + shape
    return tuple(axes.product([Fixed(times), dim]) for times, dim in zip(repeats, shape, strict=True))


@rule("repeat_interleave")
def repeat_interleave(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """Each position several times in a row; where the times are a tensor, or all is flattened, nothing is removed."""
    shape = ctx.shape(tensor_inputs(node)[0])
    if not isinstance(args.get("repeats"), int) or args.get("dim") is None:
        for dim in shape:
            ctx.freeze(dim, node, "repeated as a tensor says")
        return fixed(node)
    axis = args["dim"] % len(shape)
    repeated = axes.product([shape[axis], Fixed(args["repeats"])])
    if args.get("output_size") is not None:
        ctx.literal(node, "output_size", 0, repeated)
    return (*shape[:axis], repeated, *shape[axis + 1 :])


@rule("im2col")
def im2col(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """[*, C, H, W] to [*, C x kernel, windows]."""
    *batch, channels, height, width = ctx.shape(args["self"])
    for dim in (height, width):
        ctx.freeze(dim, node, "space that is cut into windows")
    window = axes.product([channels, Fixed(math.prod(args["kernel_size"]))])
    return (*batch, window, Fixed(shape_of(node)[-1]))


@rule("col2im")
def col2im(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """[*, C x kernel, windows] to [*, C, H, W]."""
    *batch, window, count = ctx.shape(args["self"])
    ctx.freeze(count, node, "windows that are put back in space")
    channels, kernel = ctx.split(window, math.prod(args["kernel_size"]), node, "windows over channels")
    ctx.freeze(kernel, node, "becomes space")
    return (*batch, channels, *(Fixed(size) for size in shape_of(node)[-2:]))


@rule("unfold")
def unfold(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """Windows along one dimension, which cannot shrink; they become the last one."""
    shape = list(ctx.shape(args["self"]))
    axis = args["dimension"] % len(shape)
    ctx.freeze(shape[axis], node, "cut into windows")
    shape[axis] = Fixed(shape_of(node)[axis])
    return (*shape, Fixed(shape_of(node)[-1]))


@rule("cat", "concat", "concatenate")
def cat(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """One after the other along `dim`; coupled in every other dimension."""
    shapes = [ctx.shape(source) for source in args["tensors"] if shape_of(source) != (0,)]
    return _joined(ctx, node, shapes, args["dim"]) if shapes else (Fixed(0),)


@rule("hstack", "vstack", "row_stack", "dstack", "column_stack")
def stack_along(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """One after the other along the first, second or third dimension, which each tensor is given where it lacks it."""
    name, rank, shapes = op_name(node), len(shape_of(node)), list[Shape]()
    for shape in map(ctx.shape, args["tensors"]):
        missing = (Fixed(1),) * (rank - len(shape))
        ahead = len(missing) if name in ("hstack", "vstack", "row_stack") else int(name == "dstack" and len(shape) < 2)
        shapes.append((*missing[:ahead], *shape, *missing[ahead:]))
    return _joined(ctx, node, shapes, {"hstack": min(1, rank - 1), "dstack": 2, "column_stack": 1}.get(name, 0))


def _joined(ctx: Context, node: Node, shapes: Sequence[Shape], dim: int) -> Shape:
    """Shapes one after the other along one dimension, unified in all others."""
    axis = dim % len(shapes[0])
    result: list[Dim] = list(shapes[0])
    for shape in shapes[1:]:
        for index, other in enumerate(shape):
            if index != axis:
                result[index] = ctx.unify(result[index], other, node, "concatenated beside a fixed dimension")
    result[axis] = axes.concat(shape[axis] for shape in shapes)
    return tuple(result)


@rule("stack")
def stack(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """A new dimension; coupled in all others."""
    shapes = [ctx.shape(source) for source in args["tensors"]]
    axis = args["dim"] % (len(shapes[0]) + 1)
    result: list[Dim] = list(shapes[0])
    for shape in shapes[1:]:
        result = [
            ctx.unify(ours, theirs, node, "stacked with a fixed dimension")
            for ours, theirs in zip(result, shape, strict=True)
        ]
    return (*result[:axis], Fixed(len(shapes)), *result[axis:])


def _pieces(ctx: Context, node: Node, source: Node, dim: int, sizes: Sequence[int]) -> list[Shape]:
    """Cut one dimension into runs of the given sizes."""
    shape = ctx.shape(source)
    axis = dim % len(shape)
    rest = shape[axis]
    parts: list[Dim] = []
    for size in sizes:
        part, rest = axes.cut(rest, size)
        parts.append(part)
    return [(*shape[:axis], part, *shape[axis + 1 :]) for part in parts]


def _tie_pieces(ctx: Context, node: Node, pieces: list[Shape], dim: int, why: str, slack: int) -> None:
    """Pieces of one size stay of one size; the last may be shorter by at most `slack`, if it is so now."""
    first, last = pieces[0][dim], pieces[-1][dim]
    for piece in pieces[1:]:
        if piece[dim].size == first.size:
            ctx.ties.append(Tie(first, piece[dim], ctx.reason(node, why)))
    if last.size != first.size:
        ctx.ties.append(Tie(first, last, ctx.reason(node, why), slack))


@rule("chunk", "unsafe_chunk")
def chunk(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """Equal pieces, the last of them the rest: n pieces of ceil(size / n), their widths tied in number."""
    sizes = [int(value.shape[args["dim"]]) for value in node.meta["val"]]
    pieces = _pieces(ctx, node, args["self"], args["dim"], sizes)
    if len(pieces) < args["chunks"]:
        for piece in pieces:
            ctx.freeze(piece[args["dim"]], node, "chunk gives fewer pieces than asked for")
    _tie_pieces(ctx, node, pieces, args["dim"], "chunk demands equal pieces", args["chunks"] - 1)
    return pieces


@rule("glu")
def glu(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """The first half times the sigmoid of the second: both lose the same positions."""
    dim = args["dim"] % len(shape_of(node))
    size = shape_of(node)[dim]
    first, second = _pieces(ctx, node, args["self"], dim, [size, size])
    both = ctx.unify(first[dim], second[dim], node, "multiplied with a half that is fixed")
    return (*first[:dim], both, *first[dim + 1 :])


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes")
def split(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """Pieces whose sizes the forward names."""
    sizes = [int(value.shape[args["dim"]]) for value in node.meta["val"]]
    pieces = _pieces(ctx, node, args["self"], args["dim"], sizes)
    if "split_sizes" in args:
        for index, piece in enumerate(pieces):
            ctx.literal(node, "split_sizes", index, piece[args["dim"]])
    else:
        _tie_pieces(ctx, node, pieces, args["dim"], "split by one size demands equal pieces", sizes[0] - 1)
        ctx.literal(node, "split_size", 0, pieces[0][args["dim"]])
    return pieces


@rule("tensor_split", "hsplit", "vsplit", "dsplit")
def tensor_split(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """Pieces between places that the forward names, or a number of them that differ by one: those are fixed."""
    axis = {"vsplit": 0, "hsplit": min(1, len(ctx.shape(args["self"])) - 1), "dsplit": 2}.get(
        op_name(node), args.get("dim")
    )
    assert axis is not None
    pieces = _pieces(ctx, node, args["self"], axis, [int(value.shape[axis]) for value in node.meta["val"]])
    if "indices" not in args:
        ctx.freeze(ctx.shape(args["self"])[axis], node, "cut into a number of pieces that need not be equal")
        return pieces
    for index in range(len(args["indices"])):
        ctx.literal(node, "indices", index, axes.concat([piece[axis] for piece in pieces[: index + 1]]))
    return pieces


@rule("unbind")
def unbind(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """One tensor for each position of a dimension: that dimension cannot shrink."""
    shape = ctx.shape(args["self"])
    axis = args["dim"] % len(shape)
    ctx.freeze(shape[axis], node, "taken apart channel by channel")
    return [(*shape[:axis], *shape[axis + 1 :]) for _ in range(shape[axis].size)]


@rule("select")
def select(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """One position of a dimension, named by its index: that dimension cannot shrink."""
    shape = ctx.shape(args["self"])
    axis = args["dim"] % len(shape)
    ctx.freeze(shape[axis], node, "one channel is picked by its index")
    return (*shape[:axis], *shape[axis + 1 :])


@rule("narrow")
def narrow(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """A run of positions: cut at its start and after its length, which the forward names."""
    shape = ctx.shape(args["input"] if "input" in args else args["self"])
    axis = args["dim"] % len(shape)
    start, length = args["start"], args["length"]
    if not isinstance(start, int) or start < 0:
        ctx.freeze(shape[axis], node, "channels are picked by their index")
        return (*shape[:axis], Fixed(length), *shape[axis + 1 :])
    before, rest = axes.cut(shape[axis], start)
    kept, _ = axes.cut(rest, length)
    ctx.literal(node, "start", 0, before)
    ctx.literal(node, "length", 1, kept)
    return (*shape[:axis], axes.resolve(kept), *shape[axis + 1 :])


@rule("slice")
def slice_(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """A run of positions: cut at its start and end, which the forward names."""
    shape = ctx.shape(args["self"])
    return run(ctx, node, args, shape, shape_of(node)[args["dim"] % len(shape)])


def run(ctx: Context, node: Node, args: dict[str, Any], shape: Shape, size: int) -> Shape:
    """The part of a shape between `start` and `end` of one dimension, of which it has `size` positions."""
    axis = args["dim"] % len(shape)
    dim = shape[axis]
    if args.get("step", 1) != 1:
        ctx.freeze(dim, node, "channels are picked by their index")
        return (*shape[:axis], Fixed(size), *shape[axis + 1 :])
    start, end = args["start"] or 0, args["end"]
    end = _NO_END if end is None else end
    first = max(start + dim.size, 0) if start < 0 else min(start, dim.size)
    before, rest = axes.cut(dim, first)
    kept, after = axes.cut(rest, size)
    for argument, asked, head, tail in (
        ("start", start, before, [kept, after]),
        ("end", end, [before, kept], after),
    ):
        if asked < 0:
            ctx.literal(node, argument, 0, axes.concat(tail if isinstance(tail, list) else [tail]), sign=-1)
        elif 0 < asked < dim.size:
            ctx.literal(node, argument, 0, axes.concat(head if isinstance(head, list) else [head]))
    return (*shape[:axis], axes.resolve(kept), *shape[axis + 1 :])


@rule("roll", "flip", "fliplr", "flipud", "fft_fftshift", "fft_ifftshift")
def roll(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """Positions change places: the dimension cannot shrink."""
    shape = ctx.shape(args["self"])
    dims = {"fliplr": [1], "flipud": [0]}.get(op_name(node), args.get("dims", args.get("dim")))
    for dim in [dims] if isinstance(dims, int) else dims or range(len(shape)):
        ctx.freeze(shape[dim], node, "channels change places")
    return shape


@rule("rot90")
def rot90(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """A plane is turned: neither of its dimensions can shrink."""
    shape = list(ctx.shape(args["self"]))
    for dim in args["dims"]:
        ctx.freeze(shape[dim], node, "channels change places")
        shape[dim] = Fixed(shape_of(node)[dim])
    return tuple(shape)


@rule("pad", "constant_pad_nd", *(f"{kind}_pad{rank}d" for kind in ("reflection", "replication") for rank in (1, 2, 3)))
def pad(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """Constant positions before and after: new axes, whose widths the forward names."""
    shape, sizes = list(ctx.shape(args["self"])), shape_of(node)
    amounts: list[int] = args["pad"] if "pad" in args else args["padding"]
    constant = args.get("mode", "constant") == "constant" and op_name(node) in ("pad", "constant_pad_nd")
    for position in range(len(amounts) // 2):
        axis = len(shape) - 1 - position
        before, after = amounts[2 * position], amounts[2 * position + 1]
        if before == after == 0:
            continue
        if isinstance(shape[axis], Fixed) or not constant or min(before, after) < 0:
            ctx.freeze(shape[axis], node, "padded or cropped other than by a constant")
            shape[axis] = Fixed(sizes[axis])
            continue
        ends = [Axis(amount) if amount else Fixed(0) for amount in (before, after)]
        for offset, end in enumerate(ends):
            ctx.literal(node, "pad", 2 * position + offset, end)
        shape[axis] = axes.concat([ends[0], shape[axis], ends[1]])
    return tuple(shape)


@rule("pixel_shuffle")
def pixel_shuffle(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """[*, C r r, H, W] to [*, C, H r, W r]: whole blocks of r x r channels can go."""
    *batch, channels, _, _ = ctx.shape(args["self"])
    factor = args["upscale_factor"]
    outer, inner = ctx.split(channels, factor * factor, node, "pixel shuffle")
    ctx.freeze(inner, node, "becomes space in a pixel shuffle")
    return (*batch, outer, *(Fixed(size) for size in shape_of(node)[-2:]))


@rule("pixel_unshuffle")
def pixel_unshuffle(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """[*, C, H r, W r] to [*, C r r, H, W]."""
    *batch, channels, _, _ = ctx.shape(args["self"])
    factor = args["downscale_factor"]
    return (
        *batch,
        axes.product([channels, Fixed(factor * factor)]),
        *(Fixed(s) for s in shape_of(node)[-2:]),
    )


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """[N, G x C, *] to [N, C x G, *]."""
    batch, channels, *space = ctx.shape(args["input"] if "input" in args else args["self"])
    groups, inner = ctx.split(channels, channels.size // args["groups"], node, "channel shuffle")
    ctx.freeze(groups, node, "the number of groups of a channel shuffle")
    return (batch, axes.product([inner, groups]), *space)
