"""Recurrent layers: all time steps and layers of one `torch.nn` module are a single op."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from cpd.algebra import axes
from cpd.algebra.axes import Dim
from cpd.rules.base import Context, Shape, Value, rule
from cpd.trace.graph import op_name

_MEETS_FIXED = "contracted with a fixed dimension (for example the image's input channels)"
_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """[*, I] to [*, directions x H], and the last states [layers x directions, *, H].

    Of each layer and direction the weights are [gates x H, I] and [gates x H, H], the biases [gates x H], and with a
    projection [P, H]. All layers and directions share H (one `hidden_size`), so their hidden units go together.
    """
    gates, directions = _GATES[op_name(node)], 2 if args["bidirectional"] else 1
    states = args["hx"] if isinstance(args["hx"], (list, tuple)) else [args["hx"]]
    parameters = [ctx.shape(parameter) for parameter in args["params"]]
    each = len(parameters) // (args["num_layers"] * directions)
    projected = each in (3, 5)
    sequence = ctx.shape(args["input"])
    hidden, carried, features = _widths(ctx, node, parameters[:each], gates, projected)
    first = features
    for layer in range(args["num_layers"]):
        source = sequence[-1] if layer == 0 else axes.product([axes.Fixed(directions), carried])
        for direction in range(directions):
            start = (layer * directions + direction) * each
            other, out, features = _widths(ctx, node, parameters[start : start + each], gates, projected)
            hidden = ctx.unify(hidden, other, node, "hidden units of one recurrent layer")
            carried = ctx.unify(carried, out, node, "hidden units of one recurrent layer")
            ctx.unify(source, features, node, _MEETS_FIXED)
            ctx.contract(args["params"][start], 1)
            ctx.contract(args["params"][start + 1], 1)
    ctx.unify(sequence[-1], first, node, _MEETS_FIXED)
    last: list[Shape] = []
    for state, width in zip(states, (carried, hidden), strict=False):
        shape = ctx.shape(state)
        last.append((*shape[:-1], ctx.unify(width, shape[-1], node, "a state of fixed width")))
    return [(*sequence[:-1], axes.product([axes.Fixed(directions), axes.resolve(carried)])), *last]


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def cell(ctx: Context, node: Node, args: dict[str, Any]) -> Value:
    """One step of a recurrent layer: [N, I] and a state [N, H] to the next state; an LSTM's has two parts."""
    parameters = [args[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh") if args.get(name) is not None]
    gates = _GATES[op_name(node).removesuffix("_cell")]
    hidden, _, features = _widths(ctx, node, [ctx.shape(parameter) for parameter in parameters], gates, False)
    batch, width = ctx.shape(args["input"])
    ctx.unify(width, features, node, _MEETS_FIXED)
    for parameter in parameters[:2]:
        ctx.contract(parameter, 1)
    states = args["hx"] if isinstance(args["hx"], (list, tuple)) else [args["hx"]]
    for state in states:
        hidden = ctx.unify(hidden, ctx.shape(state)[-1], node, "a state of fixed width")
    found: list[Shape] = [(batch, hidden) for _ in states]
    return found if isinstance(node.meta["val"], (list, tuple)) else found[0]


def _widths(ctx: Context, node: Node, parameters: list[Shape], gates: int, projected: bool) -> tuple[Dim, Dim, Dim]:
    """Of one layer and direction: hidden units, what is carried to the next step, and the input's features."""
    (rows, features), (again, carried), *rest = parameters
    _, hidden = ctx.split(rows, rows.size // gates, node, "gates of a recurrent layer")
    for dim in [again, *(shape[0] for shape in rest if len(shape) == 1)]:
        gate, inner = ctx.split(dim, dim.size // gates, node, "gates of a recurrent layer")
        ctx.freeze(gate, node, "gates of a recurrent layer")
        hidden = ctx.unify(hidden, inner, node, "hidden units of one recurrent layer")
    ctx.freeze(ctx.split(rows, rows.size // gates, node, "gates")[0], node, "gates of a recurrent layer")
    if projected:
        out, inner = rest[-1]
        hidden = ctx.unify(hidden, inner, node, "hidden units of one recurrent layer")
        carried = ctx.unify(carried, out, node, "projection of one recurrent layer")
    else:
        carried = ctx.unify(carried, hidden, node, "hidden units of one recurrent layer")
    return hidden, carried, features
