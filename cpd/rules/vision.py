"""Ops of torchvision: regions read from a map, and deformable convolution. It need not be installed."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from cpd.algebra.axes import Fixed
from cpd.rules.base import Context, Value, fixed, rule, tensor_inputs
from cpd.rules.contraction import KERNEL, grouped
from cpd.trace.graph import op_name, shape_of

_REGIONS = "space that is read by region"


@rule("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool")
def regions(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """[N, C, H, W] read in K regions gives [K, C, h, w]; a position-sensitive op has channels for each place."""
    batch, channels, *space = ctx.shape(args["input"])
    for dim in (batch, *space, *ctx.shape(args["rois"])):
        ctx.freeze(dim, node, _REGIONS)
    places = args["pooled_height"] * args["pooled_width"]
    if op_name(node).startswith("ps_"):
        channels, places = ctx.split(channels, places, node, "channels of each place of a region")
        ctx.freeze(places, node, "channels of each place of a region")
    values = node.meta["val"] if isinstance(node.meta["val"], (list, tuple)) else [node.meta["val"]]
    found = [(Fixed(value.shape[0]), channels, *map(Fixed, value.shape[2:])) for value in values]
    return found if isinstance(node.meta["val"], (list, tuple)) else found[0]


@rule("nms")
def nms(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """Boxes are told apart by their values: nothing of them is removed."""
    for source in tensor_inputs(node):
        for dim in ctx.shape(source):
            ctx.freeze(dim, node, "boxes are told apart by their values")
    return fixed(node)


@rule("deform_conv2d")
def deform_conv2d(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """A convolution that reads at offsets [N, 2 x offset groups x kernel, *]: those, and where they lie, are frozen."""
    batch, channels, *space = ctx.shape(args["input"])
    for name in ("offset", "mask"):
        for dim in ctx.shape(args[name])[1:]:
            ctx.freeze(dim, node, "offsets of a deformable convolution")
    for dim in space:
        ctx.freeze(dim, node, "the space of a convolution")
    for dim in ctx.shape(args["weight"])[2:]:
        ctx.freeze(dim, node, KERNEL)
    outer, _ = ctx.split(channels, channels.size // args["offset_groups"], node, "groups of offsets")
    ctx.freeze(outer, node, "groups of offsets")
    return (batch, grouped(ctx, node, args, ctx.shape(args["input"])[1]), *map(Fixed, shape_of(node)[2:]))
