"""Fourier transforms, and the two numbers that a complex one is made of: what is transformed cannot shrink."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from cpd.algebra.axes import Fixed
from cpd.rules.base import Context, Value, rule, tensor_inputs
from cpd.trace.graph import op_name, shape_of

#: Kinds of transforms: of one dimension, of two, of several.
KINDS = ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")
TRANSFORMS = {f"fft_{kind}{rank}" for kind in KINDS for rank in ("", "2", "n")}


@rule(*sorted(TRANSFORMS))
def transform(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """Each position of a dimension that is transformed follows from all of them; the other dimensions stay."""
    shape = list(ctx.shape(args["self"]))
    dims = args["dim"]
    if dims is None:
        dims = range(-len(args["s"]), 0) if args["s"] is not None else range(len(shape))
    for dim in [dims] if isinstance(dims, int) else dims:
        ctx.freeze(shape[dim], node, "a Fourier transform over it")
        shape[dim] = Fixed(shape_of(node)[dim])
    return tuple(shape)


@rule("_fft_r2c", "_fft_c2r", "_fft_c2c", "stft", "istft")
def along_the_last(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """Windows of time are transformed, [*, time] to [*, frequency, frame], or back; a batch of signals stays."""
    source = tensor_inputs(node)[0]
    shape, sizes = ctx.shape(source), shape_of(node)
    stays = 1 if op_name(node) in ("stft", "istft") and len(shape) == (2 if op_name(node) == "stft" else 3) else 0
    for tensor in tensor_inputs(node):
        for dim in ctx.shape(tensor)[stays if tensor is source else 0 :]:
            ctx.freeze(dim, node, "a Fourier transform over it")
    return (*shape[:stays], *(Fixed(size) for size in sizes[stays:]))


@rule("view_as_complex")
def view_as_complex(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """The last dimension holds the real and the imaginary part."""
    *shape, parts = ctx.shape(args["self"])
    ctx.freeze(parts, node, "the two parts of a complex number")
    return tuple(shape)


@rule("view_as_real")
def view_as_real(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """The real and the imaginary part lie along a new last dimension."""
    return (*ctx.shape(args["self"]), Fixed(2))
