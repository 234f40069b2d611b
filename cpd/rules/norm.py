"""Normalisation: parameters that lie along a dimension, and statistics taken over one.

Statistics over a removable dimension are taken over the kept positions after shrinking; `cpd.coupling.exactness` marks
such groups inexact.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from cpd.algebra import axes
from cpd.rules.base import Context, Value, rule

_FIXED = "normalised with parameters that are fixed"


@rule("batch_norm", "instance_norm")
def batch_norm(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """[N, C, *]: weight, bias and running statistics lie along C."""
    shape = list(ctx.shape(args["input"]))
    for name in ("weight", "bias", "running_mean", "running_var"):
        if args.get(name) is not None:
            shape[1] = ctx.unify(shape[1], ctx.shape(args[name])[0], node, _FIXED)
    return tuple(shape)


@rule("layer_norm", "rms_norm")
def layer_norm(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """[*, D]: weight and bias lie along the last dimensions; the forward names their widths."""
    shape = list(ctx.shape(args["input"]))
    count = len(args["normalized_shape"])
    start = len(shape) - count
    for name in ("weight", "bias"):
        if args.get(name) is not None:
            for index, dim in enumerate(ctx.shape(args[name])):
                shape[start + index] = ctx.unify(shape[start + index], dim, node, _FIXED)
    for index in range(count):
        ctx.literal(node, "normalized_shape", index, shape[start + index])
    return tuple(shape)


@rule("group_norm")
def group_norm(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """[N, G x C, *]: whole groups can go, or the same channels of every group."""
    batch, channels, *space = ctx.shape(args["input"])
    for name in ("weight", "bias"):
        if args.get(name) is not None:
            channels = ctx.unify(channels, ctx.shape(args[name])[0], node, _FIXED)
    groups, inner = ctx.split(channels, channels.size // args["num_groups"], node, "groups of a normalisation")
    ctx.literal(node, "num_groups", 0, groups)
    return (batch, axes.product([groups, inner]), *space)


@rule("_weight_norm", "_weight_norm_interface")
def weight_norm(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """A weight v divided by the norm of its slices along one dimension, times g, which lies along it too."""
    shape, scale = list(ctx.shape(args["v"])), ctx.shape(args["g"])
    if args["dim"] >= 0:
        shape[args["dim"]] = ctx.unify(shape[args["dim"]], scale[args["dim"]], node, _FIXED)
    return [tuple(shape), scale] if isinstance(node.meta["val"], (list, tuple)) else tuple(shape)
