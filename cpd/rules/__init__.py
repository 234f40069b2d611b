"""Op rules: for each ATen op, how the dimensions of its result follow from those of its inputs.

One file a family; each rule is a small function entered into one table under the ops it covers. An op that no
rule covers freezes what it touches and is named in `Context.unknown`.
"""

from __future__ import annotations

from torch.fx import Node

from cpd.rules import contraction, fourier, indexing, layout, norm, pointwise, recurrent, reduce, vision
from cpd.rules.base import RULES, Context, Literal, Shape, Value, arguments, find, fixed, tensor_inputs
from cpd.trace.graph import op_name

__all__ = ["RULES", "Context", "Literal", "Shape", "Value", "arguments", "infer"]

FAMILIES = (pointwise, layout, indexing, contraction, norm, recurrent, reduce, fourier, vision)


def infer(ctx: Context, node: Node) -> Value:
    """The dimensions of a node's result, from its rule; without one, everything it touches is frozen."""
    function = find(node)
    if function is not None:
        return function(ctx, node, arguments(node))
    for source in tensor_inputs(node):
        for dim in ctx.shape(source):
            ctx.freeze(dim, node, f"no rule for {node.target}")
    ctx.unknown.setdefault(str(node.target), op_name(node))
    return fixed(node)
