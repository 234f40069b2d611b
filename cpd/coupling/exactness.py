"""Which groups are exact: removing a position gives what zeroing it gives in the unpruned model.

Every parameter slice of a removed position is zero. Followed through the graph, this says of each tensor for
which axes its removed positions hold zero. An op that mixes over an axis is harmless where those are zero and
it sums (a matrix product), and makes the axis inexact otherwise: statistics of a norm, softmax, means, maxima.
After shrinking those are taken over the kept positions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from cpd.algebra import axes
from cpd.algebra.axes import Axis, Dim
from cpd.rules import Context, arguments
from cpd.rules.base import find, tensor_inputs
from cpd.rules.fourier import TRANSFORMS
from cpd.rules.pointwise import pointwise
from cpd.rules.reduce import reduced_dims
from cpd.trace.graph import OperationGraph, op_name, shape_of
from cpd.trace.values import READ

#: Ops of space, of layout and along other dimensions that give zeros for zeros; elementwise ops are tried.
ZERO_PRESERVING = {
    "contiguous", "clone", "alias", "detach", "to", "_to_copy", "type_as", "positive", "lift_fresh", "resolve_conj",
    "resolve_neg", "dropout", "feature_dropout", "native_dropout", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d",
    "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d",
    "grid_sampler", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "view", "reshape",
    "_unsafe_view", "view_as", "reshape_as", "unflatten", "flatten", "squeeze", "unsqueeze", "permute", "transpose",
    "t", "movedim", "swapaxes", "swapdims", "moveaxis", "expand", "expand_as", "broadcast_to", "repeat", "tile",
    "repeat_interleave", "cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "column_stack",
    "row_stack", "select", "slice", "narrow", "chunk", "unsafe_chunk", "split", "split_with_sizes", "unsafe_split",
    "unbind", "getitem", "roll", "flip", "fliplr", "flipud", "rot90", "pad", "constant_pad_nd", "index", "index_select",
    "cumsum", "diff", "im2col", "col2im", "unfold", "tril", "triu", "diagonal", "gather", "take_along_dim", "renorm",
    "view_as_complex", "view_as_real", "stft", "istft", "roi_align", "max_unpool2d", "max_unpool3d", *TRANSFORMS,
}  # fmt: skip
#: Those of them that read the first tensor, at places or in a shape that others tell.
READS = {
    "gather", "take_along_dim", "index", "index_select", "grid_sampler", "roi_align", "stft", "istft", "expand_as",
    "view_as", "reshape_as", "type_as",
}  # fmt: skip
NORMS = {"layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm"}
REDUCTIONS = {
    "mean", "amax", "amin", "var", "std", "logsumexp", "special_logsumexp", "prod", "any", "all", "max", "min",
    "var_mean", "std_mean", "nanmean", "aminmax",
}  # fmt: skip
#: Reductions that a zero adds nothing to.
SUMS = {
    "sum", "nansum", "norm", "linalg_vector_norm", "frobenius_norm", "linalg_norm", "linalg_matrix_norm",
    "nuclear_norm", "count_nonzero",
}  # fmt: skip
CONTRACTIONS = {
    "linear", "einsum", "matmul", "linalg_matmul", "bmm", "mm", "mv", "dot", "vdot", "addmm", "baddbmm", "addmv",
    "outer", "ger", "kron", "tensordot", "inner", "linalg_vecdot", "bilinear", "conv_tbc", "deform_conv2d",
}  # fmt: skip
SOFTMAX = {
    "softmax", "log_softmax", "_softmax", "_log_softmax", "softmin", "_safe_softmax", "special_softmax",
    "special_log_softmax",
}  # fmt: skip
#: Sums over what two tensors differ in, or are alike in.
DISTANCES = {"cosine_similarity", "pairwise_distance", "cosine_embedding_loss", "triplet_margin_loss", "dist", "cdist"}
WEIGHT_NORMS = {"_weight_norm", "_weight_norm_interface"}
#: Ops that write into one tensor what another holds: zero where both are.
_WRITES = {
    "scatter", "scatter_add", "index_add", "index_copy", "slice_scatter", "select_scatter", "diagonal_scatter",
    "index_put",
}  # fmt: skip
CONVOLUTIONS = {f"conv{kind}{rank}d" for kind in ("", "_transpose") for rank in (1, 2, 3)}
#: Tensors of zeros, whatever they are made like.
_ZEROS = {"zeros", "zeros_like", "new_zeros", "zero"}


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
        self._memory: dict[Node, Node] = {}
        self._open: dict[Node, set[Axis]] = {}
        live = live_nodes(ctx.graph)
        for node in ctx.graph.nodes:
            if node.op == "call_function" and node in live:
                self.dirty[node] = self._visit(node)
                self._share_memory(node)
            else:
                self.dirty[node] = set()

    def _share_memory(self, node: Node) -> None:
        """What is written to a view is written to all that share its memory: `out[:, :6] = x` changes `out`."""
        for source, written in shares(node):
            memory = self._memory[node] = self._memory.get(source, source)
            for other in self.dirty if written else ():
                if self._memory.get(other, other) is memory:
                    self.dirty[other] |= self.dirty[node] & self._axes(other)

    def _axes(self, node: Node) -> set[Axis]:
        if node not in self._open:
            dims = self.ctx.dims_of(node)
            self._open[node] = {axis for dim in dims for axis in axes.leaves(dim) if axis.frozen is None}
        return self._open[node]

    def _zero(self, node: Node, axis: Axis) -> bool:
        """Whether `node` is zero wherever a removed position of `axis` enters it."""
        return axis in self._axes(node) and axis not in self.dirty[node]

    def _mark(
        self, dims: Iterable[Dim], node: Node, unless_zero_in: Iterable[Node] = (), why: str = "mixed over"
    ) -> None:
        sources = list(unless_zero_in)
        for dim in dims:
            for axis in axes.leaves(dim):
                if axis.frozen is None and not any(self._zero(source, axis) for source in sources):
                    self.inexact.setdefault(axis, self.ctx.reason(node, why))

    def _visit(self, node: Node) -> set[Axis]:
        name = op_name(node).removesuffix("_")
        bound, inputs, own = arguments(node), tensor_inputs(node), self._axes(node)
        if name in _ZEROS:
            return set()
        if name in CONTRACTIONS or name in CONVOLUTIONS:
            return self._contraction(node, name, bound, own)
        if name == "scaled_dot_product_attention":
            return self._attention(node, bound, own)
        if name in NORMS or name in SOFTMAX:
            return self._normalisation(node, name, bound, own)
        if (name in REDUCTIONS or name in SUMS) and "other" not in bound:
            return self._reduction(node, name, bound, own)
        if find(node) is pointwise or name in ("max", "min"):
            zero = {axis: frozenset(source for source in inputs if self._zero(source, axis)) for axis in own}
            kinds = {sources: gives_zero(node, sources) for sources in set(zero.values())}
            return {axis for axis, sources in zero.items() if not kinds[sources]}
        if name in DISTANCES:
            shifted = name in ("pairwise_distance", "triplet_margin_loss") and bound["eps"] != 0
            for axis in set().union(*map(self._axes, inputs)) - own:
                if shifted or not all(self._zero(source, axis) for source in inputs if axis in self._axes(source)):
                    self._mark([axis], node)
        if name in WEIGHT_NORMS:
            rows = [self.ctx.shape(bound["v"])[bound["dim"]]] if bound["dim"] >= 0 else []
            self._mark(rows, node, why="divided by the norm of what is removed, zero")
            return own - {axis for axis in own if self._zero(bound["v"], axis)}
        if name in _WRITES:
            written = [bound[key] for key in ("self", "src", "source", "values") if isinstance(bound.get(key), Node)]
            return {axis for axis in own if bound.get("value") or not all(self._zero(s, axis) for s in written)}
        if name in ZERO_PRESERVING and bound.get("value") in (None, 0):
            sources = inputs[:1] if name in READS else node.all_input_nodes
            carried = set().union(*map(self._axes, sources))
            return own - carried | own & set().union(*(self.dirty[source] for source in sources))
        return own

    def _reduction(self, node: Node, name: str, bound: dict[str, Any], own: set[Axis]) -> set[Axis]:
        source = tensor_inputs(node)[0]
        shape = self.ctx.shape(source)
        reduced = [shape[index] for index in reduced_dims(bound.get("dim"), len(shape))]
        negative = any(isinstance(bound.get(key), (int, float)) and bound[key] < 0 for key in ("ord", "p"))
        self._mark(reduced, node, unless_zero_in=[source] if name in SUMS and not negative else ())
        return own if name.endswith("logsumexp") else own & self.dirty[source]

    def _contraction(self, node: Node, name: str, bound: dict[str, Any], own: set[Axis]) -> set[Axis]:
        """Zero where either factor is zero; the axes summed over must be zero in one of them."""
        inputs = tensor_inputs(node)
        factors = [source for source in inputs if source is not bound.get("bias")]
        if name in ("addmm", "baddbmm", "addmv"):
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
        elif name in SOFTMAX:
            self._mark([shape[bound["dim"]]], node)
            return own
        elif name == "batch_norm" and bound["training"]:  # by the statistics of its input: weight standardisation
            self._mark((*shape[:1], *shape[2:]), node)
            return own
        along = [bound[key] for key in ("weight", "bias") if bound.get(key) is not None]
        clean = set.intersection(*({a for a in own if self._zero(p, a)} for p in along)) if along else set()
        return (own - clean) if name != "batch_norm" or along else own & self.dirty[source]


def shares(node: Node) -> Iterator[tuple[Node, bool]]:
    """The tensors whose memory an op's result shares, and whether it writes to it."""
    schema = getattr(node.target, "_schema", None)
    arguments = schema.arguments if schema is not None else ()
    for argument, source in zip(arguments, node.args, strict=False):
        if argument.alias_info is not None and isinstance(source, Node):
            yield source, argument.alias_info.is_write
    if op_name(node) == "getitem":
        yield node.all_input_nodes[0], False


def memory_of(node: Node) -> Node:
    """The node whose memory a node's result lies in."""
    while (source := next((source for source, _ in shares(node)), None)) is not None:
        node = source
    return node


def live_nodes(
    graph: OperationGraph,
    instead: Mapping[Node, Node] = MappingProxyType({}),
    apart: Collection[Node] = frozenset(),
    left_out: Collection[tuple[Node, Node]] = frozenset(),
) -> set[Node]:
    """The nodes that an output which matters depends on, or a number that is read, and writes that show.

    A write shows where the tensor is one of the model or of its caller, or is read later.

    Args:
        graph: the operations.
        instead: nodes that only pass another on, which is read in their place.
        apart: nodes that write to nothing but what only they read.
        left_out: concatenations, each with an operand that is left out of it.
    """
    live = set(graph.returned())
    memory = {memory_of(node) for node in live}
    for node in reversed(graph.nodes):
        alone = node in instead or node in apart
        written = not alone and (op_name(node) == READ or any(_kept(source, memory) for source in _written_to(node)))
        if node.op == "output" or not (written or node in live):
            continue
        read = [instead[node]] if node in instead else node.all_input_nodes
        found = {node, *(source for source in read if (node, source) not in left_out)}
        live |= found
        memory |= {memory_of(source) for source in found}
    return live


def _written_to(node: Node) -> list[Node]:
    return [memory_of(source) for source, changed in shares(node) if changed]


def _kept(root: Node, memory: Collection[Node]) -> bool:
    """Whether it shows what is written to a tensor: it is one of the model or of its caller, or is read later on."""
    return root.op != "call_function" or root in memory


@torch.no_grad()
def gives_zero(node: Node, zero: frozenset[Node]) -> bool:
    """Whether an elementwise op gives zero where some of its tensors are zero and the others are anything.

    `x * y` does where one of them is, `x + y` where both are, `x + 1` never.
    """
    if op_name(node) == "prelu":  # its weights are not of the shape of its input
        return node.args[0] in zero

    def example(source: Node) -> Any:
        value = source.meta.get("val")
        if not isinstance(value, Tensor):
            return value
        numbers = torch.tensor([True, False, True, False] if value.dtype == torch.bool else [1.3, -2.7, 1.0, -31.0])
        return (numbers * 0 if source in zero else numbers).to(value.dtype)

    args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), example)
    assert callable(node.target)
    try:
        found = node.target(*args, **kwargs)
    except Exception:  # an op may refuse what it is given for any reason
        return False
    return isinstance(found, Tensor) and not found.any()
