"""Which groups are exact: removing a position gives what zeroing it gives in the unpruned model.

Every parameter slice of a removed position is zero. Followed through the graph, this says of each tensor for
which axes its removed positions hold zero. An op that mixes over an axis is harmless where those are zero and
it sums (a matrix product), and makes the axis inexact otherwise: statistics of a norm, softmax, means, maxima.
After shrinking those are taken over the kept positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.fx import Node

from cpd.algebra import axes
from cpd.algebra.axes import Axis, Dim
from cpd.rules import Context, arguments
from cpd.rules.base import tensor_inputs
from cpd.rules.reduce import reduced_dims
from cpd.trace.graph import OperationGraph, op_name, shape_of

#: Elementwise and spatial ops with f(0) = 0.
ZERO_PRESERVING = {
    "relu", "relu6", "gelu", "silu", "tanh", "elu", "selu", "celu", "leaky_relu", "hardtanh", "hardswish", "mish",
    "neg", "abs", "sqrt", "square", "sign", "erf", "sin", "prelu", "rrelu", "hardshrink", "softshrink", "softsign",
    "expm1", "log1p", "clone", "alias", "contiguous", "detach", "dropout", "feature_dropout", "to", "_to_copy",
    "type_as", "zeros_like", "positive", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d", "pixel_shuffle",
    "pixel_unshuffle", "view", "reshape", "_unsafe_view", "view_as", "reshape_as", "unflatten", "flatten", "squeeze",
    "unsqueeze", "permute", "transpose", "t", "movedim", "expand", "expand_as", "repeat", "cat", "stack", "select",
    "slice", "narrow", "chunk", "split", "split_with_sizes", "unbind", "getitem", "roll", "flip", "pad",
    "constant_pad_nd", "index",
}  # fmt: skip
NORMS = {"layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm"}
REDUCTIONS = {
    "mean", "amax", "amin", "var", "std", "logsumexp", "prod", "any", "all", "max", "min", "var_mean", "std_mean",
}  # fmt: skip
#: Reductions that a zero adds nothing to.
SUMS = {"sum", "nansum", "norm", "linalg_vector_norm", "frobenius_norm"}
CONTRACTIONS = {"linear", "einsum", "matmul", "bmm", "mm", "mv", "dot", "addmm", "baddbmm"}
_SOFTMAX = {"softmax", "log_softmax", "_softmax", "_log_softmax", "softmin"}
_CONVS = {f"conv{kind}{rank}d" for kind in ("", "_transpose") for rank in (1, 2, 3)}


class Exactness:
    """Follows the zeros of removed positions through a graph.

    Attributes:
        dirty: for each node, the axes whose removed positions may hold something else than zero.
        inexact: the axes that an op mixes over so that removing is not zeroing, and which op.
    """

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.dirty: dict[Node, set[Axis]] = {}
        self.inexact: dict[Axis, str] = {}
        live = _live(ctx.graph)
        for node in ctx.graph.nodes:
            if node.op == "call_function" and node in live:
                self.dirty[node] = self._visit(node)
            else:
                self.dirty[node] = set()

    def _axes(self, node: Node) -> set[Axis]:
        dims = self.ctx.dims_of(node)
        return {axis for dim in dims for axis in axes.leaves(dim) if axis.frozen is None}

    def _zero(self, node: Node, axis: Axis) -> bool:
        """Whether `node` is zero wherever a removed position of `axis` enters it."""
        return axis in self._axes(node) and axis not in self.dirty[node]

    def _mark(self, dims: Iterable[Dim], node: Node, unless_zero_in: Iterable[Node] = ()) -> None:
        sources = list(unless_zero_in)
        for dim in dims:
            for axis in axes.leaves(dim):
                if axis.frozen is None and not any(self._zero(source, axis) for source in sources):
                    self.inexact.setdefault(axis, self.ctx.reason(node, "mixed over"))

    def _visit(self, node: Node) -> set[Axis]:
        name = op_name(node).removesuffix("_")
        bound, inputs, own = arguments(node), tensor_inputs(node), self._axes(node)
        if _shifts(name, bound):
            return own
        if name in ("add", "sub", "maximum", "minimum") or (name in ("max", "min") and "other" in bound):
            return {axis for axis in own if not all(self._zero(source, axis) for source in inputs)}
        if name in ("mul", "masked_fill", "div") and inputs:
            factors = inputs if name == "mul" else inputs[:1]
            return {axis for axis in own if not any(self._zero(source, axis) for source in factors)}
        if name in CONTRACTIONS or name in _CONVS:
            return self._contraction(node, name, bound, own)
        if name == "scaled_dot_product_attention":
            return self._attention(node, bound, own)
        if name in NORMS or name in _SOFTMAX:
            return self._normalisation(node, name, bound, own)
        if name in REDUCTIONS or name in SUMS:
            shape = self.ctx.shape(inputs[0])
            reduced = [shape[index] for index in reduced_dims(bound.get("dim"), len(shape))]
            negative = any(isinstance(bound.get(key), (int, float)) and bound[key] < 0 for key in ("ord", "p"))
            self._mark(reduced, node, unless_zero_in=inputs if name in SUMS and not negative else ())
            return own if name == "logsumexp" else own & self.dirty[inputs[0]]
        if name in ZERO_PRESERVING:
            sources = [s for s in node.all_input_nodes if s in self.dirty]
            return own & set().union(*(self.dirty[source] for source in sources)) if sources else set()
        return own

    def _contraction(self, node: Node, name: str, bound: dict[str, Any], own: set[Axis]) -> set[Axis]:
        """Zero where either factor is zero; the axes summed over must be zero in one of them."""
        inputs = tensor_inputs(node)
        factors = [source for source in inputs if source is not bound.get("bias")]
        if name in ("addmm", "baddbmm"):
            factors = inputs[1:]
        summed = set().union(*(self._axes(source) for source in factors)) - own
        self._mark(summed, node, unless_zero_in=factors)
        added = [source for source in inputs if source not in factors]
        return {
            axis
            for axis in own
            if not any(self._zero(source, axis) for source in factors)
            or not all(self._zero(source, axis) for source in added)
        }

    def _attention(self, node: Node, bound: dict[str, Any], own: set[Axis]) -> set[Axis]:
        query, key, value = (bound[name] for name in ("query", "key", "value"))
        self._mark([self.ctx.shape(query)[-1]], node, unless_zero_in=[query, key])
        self._mark([self.ctx.shape(key)[-2]], node)
        return {axis for axis in own if not self._zero(value, axis)}

    def _normalisation(self, node: Node, name: str, bound: dict[str, Any], own: set[Axis]) -> set[Axis]:
        source = tensor_inputs(node)[0]
        shape = self.ctx.shape(source)
        if name in ("layer_norm", "rms_norm"):
            self._mark(shape[len(shape) - len(bound["normalized_shape"]) :], node)
        elif name == "group_norm":
            _, inner = axes.split(shape[1], shape_of(node)[1] // bound["num_groups"], "group norm")
            self._mark([inner], node)
        elif name in _SOFTMAX:
            self._mark([shape[bound["dim"]]], node)
            return own
        elif name == "batch_norm" and bound["training"]:  # by the statistics of its input: weight standardisation
            self._mark((*shape[:1], *shape[2:]), node)
            return own
        along = [bound[key] for key in ("weight", "bias") if bound.get(key) is not None]
        clean = set.intersection(*({a for a in own if self._zero(p, a)} for p in along)) if along else set()
        return (own - clean) if name != "batch_norm" or along else own & self.dirty[source]


def _live(graph: OperationGraph) -> set[Node]:
    """The nodes that the outputs which matter depend on."""
    live = set(graph.returned())
    for node in reversed(graph.nodes):
        if node.op != "output" and any(user in live for user in node.users):
            live.add(node)
    return live


def _shifts(name: str, bound: dict[str, Any]) -> bool:
    """Whether an op gives a number other than zero where all its tensors are zero: `x + 1`, a padding with ones."""
    if name == "hardtanh":
        return not bound["min_val"] <= 0 <= bound["max_val"]
    argument = {"add": "other", "sub": "other", "masked_fill": "value", "pad": "value", "constant_pad_nd": "value"}
    number = bound.get(argument.get(name, ""))
    return isinstance(number, (int, float)) and number != 0
