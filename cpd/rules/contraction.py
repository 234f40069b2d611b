"""Stop operations and products: ops that sum over a dimension and may give a fresh one."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from cpd.algebra import axes
from cpd.algebra.axes import Dim, Fixed
from cpd.rules.base import Context, Shape, Value, broadcast, fixed, rule, tensor_inputs
from cpd.trace.graph import op_name, shape_of

#: Why kernels are frozen; `comb` lists no group for them.
KERNEL = "kernel of a convolution"
_MEETS_FIXED = "contracted with a fixed dimension (for example the image's input channels)"


def _bias(ctx: Context, node: Node, args: dict[str, Any], dim: Dim) -> Dim:
    """The bias lies along the output dimension."""
    if args.get("bias") is None:
        return dim
    return ctx.unify(dim, ctx.shape(args["bias"])[0], node, "added to a bias that is fixed")


@rule("linear")
def linear(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """[*, I] with weight [O, I]: I is summed over, O is fresh."""
    weight = ctx.shape(args["weight"])
    *batch, features = ctx.shape(args["input"])
    ctx.unify(features, weight[-1], node, _MEETS_FIXED)
    ctx.contract(args["weight"], len(weight) - 1)
    if len(weight) == 1:
        return tuple(batch)
    return (*batch, _bias(ctx, node, args, weight[0]))


@rule("conv1d", "conv2d", "conv3d")
def conv(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """[*, G x I, space] with weight [G x O, I, kernel]: I is summed over within each of G groups, O is fresh.

    A depthwise convolution is the case I = O = 1: its channels are the groups. Space that a kernel of one position
    steps through one by one stays what it is.
    """
    weight, shape = ctx.shape(args["weight"]), ctx.shape(args["input"])
    kernel = list(weight[2:])
    *batch, channels = shape[: len(shape) - len(kernel)]
    space = _space(ctx, node, args, kernel, shape[len(shape) - len(kernel) :])
    return (*batch, grouped(ctx, node, args, channels), *space)


def grouped(ctx: Context, node: Node, args: dict[str, Any], channels: Dim) -> Dim:
    """The output channels of a convolution, which sums over its input channels within each group."""
    outputs, inputs, *_ = ctx.shape(args["weight"])
    groups_in, inner = ctx.split(channels, inputs.size, node, "groups of a convolution")
    groups_out, outputs = ctx.split(outputs, outputs.size // args["groups"], node, "groups of a convolution")
    ctx.unify(inner, inputs, node, _MEETS_FIXED)
    groups = ctx.unify(groups_in, groups_out, node, "groups of a convolution over a dimension that is fixed")
    ctx.contract(args["weight"], 1)
    ctx.literal(node, "groups", 0, groups)
    return _bias(ctx, node, args, axes.product([groups, outputs]))


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """[*, G x I, space] with weight [G x I, O, kernel]: I is summed over within each of G groups, O is fresh."""
    weight, shape = ctx.shape(args["weight"]), ctx.shape(args["input"])
    inputs, outputs, *kernel = weight
    *batch, channels = shape[: len(shape) - len(kernel)]
    space = _space(ctx, node, args, kernel, shape[len(shape) - len(kernel) :])
    ctx.unify(channels, inputs, node, _MEETS_FIXED)
    groups, _ = ctx.split(inputs, inputs.size // args["groups"], node, "groups of a convolution")
    if args["groups"] == 1:
        ctx.contract(args["weight"], 0)
    ctx.literal(node, "groups", 0, groups)
    result = _bias(ctx, node, args, axes.product([groups, outputs]))
    return (*batch, result, *space)


def _space(ctx: Context, node: Node, args: dict[str, Any], kernel: list[Dim], space: Shape) -> list[Dim]:
    """The dimensions of space after a convolution."""
    result: list[Dim] = []
    for index, (dim, size) in enumerate(zip(space, shape_of(node)[-len(kernel) :], strict=True)):
        ctx.freeze(kernel[index], node, KERNEL)
        padding = _at(args["padding"], index)
        if kernel[index].size == _at(args["stride"], index) == 1 and padding in (0, "valid", "same"):
            result.append(dim)
        else:
            ctx.freeze(dim, node, "the space of a convolution")
            result.append(Fixed(size))
    return result


def _at(setting: Any, index: int) -> Any:
    """A setting of one dimension of space."""
    return setting[min(index, len(setting) - 1)] if isinstance(setting, (list, tuple)) else setting


@rule("matmul", "linalg_matmul", "bmm", "mm", "mv", "dot", "vdot")
def matmul(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """[*, M, K] @ [*, K, N]: K is summed over, M and N stay, the leading dimensions broadcast."""
    left, right = (ctx.shape(source) for source in node.all_input_nodes * (3 - len(node.all_input_nodes)))
    vector = len(right) == 1
    ctx.unify(left[-1], right[-1 if vector else -2], node, _MEETS_FIXED)
    for source, dim in zip(node.args, (len(left) - 1, len(right) - (1 if vector else 2)), strict=False):
        ctx.contract(source, dim)
    batch = broadcast(ctx, node, [left[:-2], right[:-2]])
    return (*batch, *left[-2:-1], *(() if vector else right[-1:]))


@rule("addmm", "baddbmm", "addmv")
def addmm(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """A bias plus a matrix product."""
    names = {"addmm": ("mat1", "mat2"), "addmv": ("mat", "vec")}.get(
        op_name(node).removesuffix("_"), ("batch1", "batch2")
    )
    left, right = (ctx.shape(args[name]) for name in names)
    summed = max(len(right) - 2, 0)
    ctx.unify(left[-1], right[summed], node, _MEETS_FIXED)
    ctx.contract(args[names[1]], summed)
    return broadcast(ctx, node, [ctx.shape(args["self"]), (*left[:-1], *right[summed + 1 :])])


@rule("outer", "ger", "kron")
def outer(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """Every position of one tensor times every one of the other; of matrices, rows by rows and columns by columns."""
    left, right = (ctx.shape(args[name]) for name in (("self", "vec2") if "vec2" in args else ("self", "other")))
    if op_name(node) != "kron":
        return (*left, *right)
    rank = max(len(left), len(right))
    pairs = zip(*((*(Fixed(1),) * (rank - len(shape)), *shape) for shape in (left, right)), strict=True)
    return tuple(axes.product(pair) for pair in pairs)


@rule("tensordot", "inner", "linalg_vecdot")
def tensordot(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """Some dimensions of one tensor are summed over with as many of the other."""
    sources = (args["x"], args["y"]) if "x" in args else (args["self"], args["other"])
    left, right = (ctx.shape(source) for source in sources)
    if "x" in args:  # along one dimension, beside the others
        both = broadcast(ctx, node, [left, right])
        for source in sources:
            ctx.contract(source, args["dim"] % len(both) - len(both) + len(ctx.shape(source)))
        return tuple(dim for index, dim in enumerate(both) if index != args["dim"] % len(both))
    if not left or not right:
        return (*left, *right)
    pairs = [(args.get("dims_self", [-1])), (args.get("dims_other", [-1]))]
    summed = [[dim % len(shape) for dim in dims] for dims, shape in zip(pairs, (left, right), strict=True)]
    for ours, theirs in zip(*summed, strict=True):
        ctx.unify(left[ours], right[theirs], node, _MEETS_FIXED)
        ctx.contract(sources[0], ours)
        ctx.contract(sources[1], theirs)
    return tuple(
        dim for shape, gone in zip((left, right), summed, strict=True)
        for index, dim in enumerate(shape) if index not in gone
    )  # fmt: skip


@rule("bilinear")
def bilinear(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """[*, I] and [*, J] with weight [O, I, J]: I and J are summed over, O is fresh."""
    weight = ctx.shape(args["weight"])
    inputs = [ctx.shape(args[name]) for name in ("input1", "input2")]
    for index, shape in enumerate(inputs):
        ctx.unify(shape[-1], weight[1 + index], node, _MEETS_FIXED)
        ctx.contract(args["weight"], 1 + index)
    return (*broadcast(ctx, node, [shape[:-1] for shape in inputs]), _bias(ctx, node, args, weight[0]))


@rule("conv_tbc")
def conv_tbc(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """[T, N, I] with weight [kernel, I, O]: I is summed over, O is fresh."""
    time, batch, channels = ctx.shape(args["self"])
    kernel, inputs, outputs = ctx.shape(args["weight"])
    ctx.freeze(kernel, node, KERNEL)
    ctx.freeze(time, node, "the space of a convolution")
    ctx.unify(channels, inputs, node, _MEETS_FIXED)
    ctx.contract(args["weight"], 1)
    return (Fixed(shape_of(node)[0]), batch, _bias(ctx, node, args, outputs))


@rule("cosine_similarity", "pairwise_distance", "cosine_embedding_loss", "triplet_margin_loss", "dist")
def distance(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """Two tensors of one shape are compared over one dimension, or over all: it is summed over."""
    sources = [source for source in tensor_inputs(node) if source is not args.get("target")]
    shape = broadcast(ctx, node, [ctx.shape(source) for source in sources])
    if op_name(node) not in ("cosine_similarity", "pairwise_distance"):
        for dim in shape[:-1]:
            ctx.freeze(dim, node, "compared as a whole")
        return tuple(Fixed(size) for size in shape_of(node))
    axis = args.get("dim", -1) % len(shape)
    return (*shape[:axis], *((Fixed(1),) if args.get("keepdim") else ()), *shape[axis + 1 :])


@rule("cdist")
def cdist(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """[*, P, M] and [*, R, M] to [*, P, R]: M is summed over."""
    left, right = ctx.shape(args["x1"]), ctx.shape(args["x2"])
    ctx.unify(left[-1], right[-1], node, _MEETS_FIXED)
    return (*broadcast(ctx, node, [left[:-2], right[:-2]]), left[-2], right[-2])


@rule("einsum")
def einsum(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """Dimensions of one letter are unified; a letter that the result lacks is summed over."""
    left, _, right = args["equation"].replace(" ", "").partition("->")
    letters: dict[str, Dim] = {}
    terms = left.split(",")
    for term, source in zip(terms, args["tensors"], strict=True):
        shape = ctx.shape(source)
        for index, (letter, dim) in enumerate(zip(spell(term, len(shape)), shape, strict=True)):
            if letter in letters and letters[letter].size == dim.size:
                ctx.unify(letters[letter], dim, node, _MEETS_FIXED)
            if letter not in letters or letters[letter].size == 1:
                letters[letter] = dim
            if letter not in right and not letter.isdigit():
                ctx.contract(source, index)
    if not right:
        free = sorted({letter for letter in left if left.count(letter) == 1 and letter.isalpha()})
        right = ("..." if "..." in left else "") + "".join(free)
    return tuple(axes.resolve(letters[letter]) for letter in spell(right, len(shape_of(node))))


def spell(term: str, rank: int) -> list[str]:
    """One name a dimension; those under an ellipsis are numbered from the last."""
    if "..." not in term:
        return list(term)
    head, tail = term.split("...")
    hidden = rank - len(head) - len(tail)
    return [*head, *(str(hidden - 1 - index) for index in range(hidden)), *tail]


@rule("scaled_dot_product_attention")
def attention(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """softmax(q k^T * scale + mask) v with q [*, L, E], k [*, S, E], v [*, S, V] gives [*, L, V].

    The default scale is 1/sqrt(E); comb keeps its old value (see `cpd.proof.constants`).
    """
    query, key, value = (ctx.shape(args[name]) for name in ("query", "key", "value"))
    ctx.unify(query[-1], key[-1], node, _MEETS_FIXED)
    ctx.unify(key[-2], value[-2], node, _MEETS_FIXED)
    if args.get("enable_gqa"):
        _grouped_queries(ctx, node, query[-3], [key[-3], value[-3]])
        batch: Shape = query[:-2]
    else:
        batch = broadcast(ctx, node, [query[:-2], key[:-2], value[:-2]])
    if args.get("attn_mask") is not None:
        mask = ctx.shape(args["attn_mask"])
        broadcast(ctx, node, [mask, (*batch, query[-2], key[-2])])
    return (*batch, query[-2], value[-1])


def _grouped_queries(ctx: Context, node: Node, query: Dim, others: list[Dim]) -> None:
    """Each key head serves a run of query heads; whole runs go, so the ratio stays."""
    for other in others:
        outer, inner = ctx.split(query, query.size // other.size, node, "grouped query heads")
        ctx.freeze(inner, node, "query heads that share one key head")
        ctx.unify(outer, other, node, _MEETS_FIXED)


@rule("embedding")
def embedding(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """Rows of a table: the rows cannot shrink, their width is fresh."""
    rows, width = ctx.shape(args["weight"])
    ctx.freeze(rows, node, "rows of a table read by index")
    return (*ctx.shape(args["indices"]), width)


@rule("embedding_bag")
def embedding_bag(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """Rows of a table, summed by bag: the rows cannot shrink, their width is fresh."""
    rows, width = ctx.shape(args["weight"])
    ctx.freeze(rows, node, "rows of a table read by index")
    for source in tensor_inputs(node)[1:]:
        for dim in ctx.shape(source):
            ctx.freeze(dim, node, "used as an index")
    value = fixed(node)
    assert isinstance(value, list)
    return [(*value[0][:1], width), *value[1:]]
