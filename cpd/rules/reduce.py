"""Reductions and resampling: dimensions that vanish, or lie in space and are fixed."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from cpd.algebra.axes import Fixed
from cpd.rules.base import Context, Value, broadcast, fixed, rule, tensor_inputs
from cpd.trace.graph import op_name, shape_of


@rule(
    "mean", "sum", "amax", "amin", "var", "std", "logsumexp", "norm", "linalg_vector_norm", "prod", "any", "all",
    "frobenius_norm", "std_mean", "var_mean", "nansum", "nanmean", "aminmax",
    "count_nonzero", "linalg_norm", "linalg_matrix_norm", "nuclear_norm", "special_logsumexp",
)  # fmt: skip
def reduce(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """The reduced dimensions vanish (or keep one position); the others stay."""
    shape = ctx.shape(tensor_inputs(node)[0])
    dims = args.get("dim")
    reduced = reduced_dims(dims, len(shape))
    keep = bool(args.get("keepdim", False))
    result = tuple(
        Fixed(1) if index in reduced else dim for index, dim in enumerate(shape) if keep or index not in reduced
    )
    value = fixed(node)
    return [result for _ in value] if isinstance(value, list) else result


@rule("max", "min")
def extremum(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """`x.max(dim)` gives values and indices; whoever reads the indices freezes the width that they count."""
    if "other" in args:
        return broadcast(ctx, node, [ctx.shape(source) for source in tensor_inputs(node)])
    if any(op_name(user) == "getitem" and user.args[1] == 1 and user.users for user in node.users):
        ctx.freeze(ctx.shape(args["self"])[args["dim"]], node, "channels are told apart by their index")
    return reduce(ctx, node, args)


def reduced_dims(dims: Any, rank: int) -> set[int]:
    """The dimensions that an op's `dim` argument names; all of them where it names none."""
    if dims is None or dims == []:
        return set(range(rank))
    return {dim % rank for dim in ([dims] if isinstance(dims, int) else dims)} if rank else set()


@rule("argmax", "argmin")
def arg_extremum(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """Positions are told by their index."""
    shape = ctx.shape(args["self"])
    for index in reduced_dims(args["dim"], len(shape)):
        ctx.freeze(shape[index], node, "channels are told apart by their index")
    return reduce(ctx, node, args)


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """[N, C, *] read at the places [N, *, rank] of a grid gives [N, C, *]."""
    shape = ctx.shape(args["input"])
    for dim in (*shape[2:], *ctx.shape(args["grid"])):
        ctx.freeze(dim, node, "space that is resampled")
    return (*shape[:2], *(Fixed(size) for size in shape_of(node)[2:]))


@rule(
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "max_pool1d_with_indices", "max_pool2d_with_indices",
    "max_pool3d_with_indices", "fractional_max_pool2d", "fractional_max_pool3d", "lp_pool2d",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d",
    "upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d", "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa", "_upsample_lanczos2d_aa", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d",
)  # fmt: skip
def spatial(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """Space is resampled and fixed; batch and channels stay."""
    shape = ctx.shape(tensor_inputs(node)[0])
    rank = next(int(digit) for digit in op_name(node) if digit.isdigit())
    for dim in shape[-rank:]:
        ctx.freeze(dim, node, "space that is resampled")
    values = node.meta["val"] if isinstance(node.meta["val"], (list, tuple)) else [node.meta["val"]]
    results = [(*shape[:-rank], *(Fixed(int(size)) for size in value.shape[-rank:])) for value in values]
    return results if isinstance(node.meta["val"], (list, tuple)) else results[0]


@rule("max_unpool2d", "max_unpool3d")
def max_unpool(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """[*, C, space] put back where the indices of the same shape say: space is fixed, batch and channels stay."""
    rank = int(op_name(node)[-2])
    shape = broadcast(ctx, node, [ctx.shape(args["self"]), ctx.shape(args["indices"])])
    for dim in shape[-rank:]:
        ctx.freeze(dim, node, "space that is resampled")
    return (*shape[:-rank], *(Fixed(size) for size in shape_of(node)[-rank:]))


@rule(
    "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits",
    "kl_div", "soft_margin_loss", "poisson_nll_loss", "hinge_embedding_loss", "margin_ranking_loss",
    "cross_entropy_loss", "nll_loss", "nll_loss2d", "nll_loss_nd", "ctc_loss", "multi_margin_loss",
    "multilabel_margin_loss",
)  # fmt: skip
def loss(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """A loss is defined over all that it is given: nothing of that is removed."""
    for source in tensor_inputs(node):
        for dim in ctx.shape(source):
            ctx.freeze(dim, node, "a loss is taken over it")
    return fixed(node)
