"""Ops that work element by element: coupling operations where they take several tensors."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Node

from cpd.algebra.axes import Axis, Fixed
from cpd.rules.base import Context, Shape, Value, broadcast, fixed, rule, tensor_inputs
from cpd.trace.graph import op_name, shape_of


@rule(
    "pointwise",
    "prelu",
    "floor_divide",
    "copy",
    "fill",
    "zero",
    "masked_fill",
    "hardswish",
    "log_sigmoid",
    "_prelu_kernel",
    "complex",
    "polar",
    "real",
    "imag",
    "conj",
    "_conj",
    "_neg_view",
    "isreal",
)
def pointwise(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """All tensors broadcast; each dimension of the result is the common dimension of the inputs."""
    inputs = tensor_inputs(node)
    if not inputs:
        return fixed(node)
    return broadcast(ctx, node, [_aligned(ctx, node, source) for source in inputs])


def _aligned(ctx: Context, node: Node, source: Node) -> Shape:
    """The dimensions of an input; PReLU's one weight a channel lies along dimension 1, not along the last."""
    shape, first = ctx.shape(source), ctx.shape(tensor_inputs(node)[0])
    if "prelu" in op_name(node) and len(shape) == 1 and shape[0].size > 1 and len(first) > 2:
        return (shape[0], *first[2:])
    return shape


@rule(
    "alias", "clone", "contiguous", "detach", "detach_", "dropout", "feature_dropout", "alpha_dropout",
    "to", "_to_copy", "type_as", "resolve_conj", "resolve_neg", "pin_memory", "zeros_like", "ones_like", "full_like",
    "empty_like", "rand_like", "randn_like", "randint_like", "positive", "bernoulli", "uniform_", "normal_", "random_",
    "exponential_", "poisson", "renorm",
    "_safe_softmax", "softmax", "log_softmax", "_softmax", "_log_softmax", "softmin", "special_softmax",
    "special_log_softmax", "feature_alpha_dropout", "rrelu_with_noise", "fake_quantize_per_tensor_affine",
)  # fmt: skip
def same_shape(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """The dimensions of the first tensor."""
    return ctx.shape(tensor_inputs(node)[0])


@rule("getitem")
def getitem(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """One of the tensors of an op that gives several."""
    assert node.target is operator.getitem
    source, index = node.args
    assert isinstance(source, Node)
    assert isinstance(index, int)
    value = ctx.values[source]
    assert isinstance(value, list)
    return value[index]


@rule("arange", "linspace", "eye", "scalar_tensor", "tril_indices", "triu_indices", "_assert_tensor_metadata",
      "sym_size", "lift_fresh", "one_hot", "meshgrid", "logspace", "range", "randperm", "hann_window", "hamming_window",
      "blackman_window", "bartlett_window", "kaiser_window", "fft_fftfreq", "fft_rfftfreq", "affine_grid_generator",
      "read_value", "nonzero_static", "empty_strided", "new_empty_strided")  # fmt: skip
def numbered(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """A tensor made in the forward whose positions differ: nothing of it is removed, nor of what is read as numbers."""
    for source in tensor_inputs(node):
        for dim in ctx.shape(source):
            ctx.freeze(dim, node, "used as an index")
    return fixed(node)


@rule(
    "zeros",
    "ones",
    "full",
    "empty",
    "rand",
    "randn",
    "randint",
    "normal",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
)
def filled(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """A tensor made in the forward whose positions are alike: as wide as what it meets; the forward names its sizes."""
    sizes = shape_of(node)
    shape = tuple(Axis(size) if size > 1 else Fixed(size) for size in sizes)
    for index, dim in enumerate(shape):
        ctx.literal(node, "size", index, dim)
    return shape
