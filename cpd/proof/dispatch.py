"""The calls that reach torch's dispatcher: of a traced graph run at other widths, and of a narrower copy itself.

Exporting a narrower copy to compare it with the prediction takes as long as the first export. Running both without
values takes a fraction, and says as much: the same kernels in the same order, on the same shapes, with the same
numbers.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._python_dispatch import TorchDispatchMode

from cpd.algebra import axes
from cpd.algebra.axes import Axis
from cpd.errors import let_through
from cpd.model.inputs import as_exported, evaluating
from cpd.model.state import code_memory_preserved
from cpd.model.tensors import every_tensor
from cpd.proof.replay import predicted
from cpd.rules import Context, arguments
from cpd.trace.graph import writes_state
from cpd.trace.quiet import garbage_collection_paused, quiet
from cpd.trace.standins import StandIns, stand_in
from cpd.trace.values import answering

#: One call: the op, its arguments with a shape for each tensor, and the shapes of its results.
Dispatch: TypeAlias = tuple[Any, Any, Any]

_aten = torch.ops.aten
#: Ops that compute nothing; an export leaves some of them out.
_IDLE = {_aten.detach.default, _aten.alias.default, _aten.lift_fresh.default, _aten._assert_tensor_metadata.default}
#: Ops whose first result is laid out like their first argument, and whose kernels without values are slow.
_ALIKE = {_aten.native_batch_norm.default, _aten._native_batch_norm_legit_no_training.default}


class Dispatches(TorchDispatchMode):
    """While active, notes every call that reaches the dispatcher.

    Attributes:
        calls: in the order of execution.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = list[Dispatch]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [_described(arg) for arg in args]  # before the call, which may work in place
        if func in _ALIKE and args[0].is_meta:
            result: Any = (torch.empty_like(args[0]), args[0].new_empty(0), args[0].new_empty(0))
        else:
            result = func(*args, **kwargs)
        moved = func is _aten._to_copy.default and result.dtype == args[0].dtype  # to a device, or nowhere
        if func not in _IDLE and not moved:
            named = [(name, _described(value)) for name, value in kwargs.items() if name != "device"]
            self.calls.append((func, (given, named), _described(result)))
        return result


def _described(value: Any) -> Any:
    """A value, with the shape and type in the place of each tensor."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, (list, tuple)):
        return [_described(item) for item in value]
    return value


def calls_of_model(model: nn.Module, ctx: Context) -> list[Dispatch]:
    """What the forward of a copy on the meta device calls on the inputs of the trace."""
    call = ctx.graph.call.to("meta")
    found = Dispatches()
    told = answering(ctx.graph.answers)
    with code_memory_preserved(model), evaluating(model), as_exported(), quiet(), found, StandIns(), told:
        call.on(ctx.graph.runner(model))
    return found.calls


def calls_as_predicted(model: nn.Module, ctx: Context, counts: Mapping[Axis, int]) -> list[Dispatch] | None:
    """What the traced graph calls when its tensors have these widths; None where a shape is not the predicted one.

    Args:
        model: a copy on the meta device narrowed to `counts`, of which only the tensors are read.
        ctx: the result of the algebra.
        counts: the width of each axis.
    """
    graph, state = ctx.graph, every_tensor(model)
    leaves = iter(torch.utils._pytree.tree_leaves(graph.call.to("meta")))
    widths = {(item.node, item.argument, item.index): predicted(item, counts) for item in ctx.literals}
    narrowed: dict[Node, set[str]] = defaultdict(set)
    for node, argument, _ in widths:
        narrowed[node].add(argument)
    values: dict[Node, Any] = {}

    def given(node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = list(node.args), dict(node.kwargs)
        names = [argument.name for argument in node.target._schema.arguments] if node in narrowed else []  # type: ignore[union-attr]
        for name in narrowed.get(node, ()):
            value, position = arguments(node)[name], names.index(name)
            if isinstance(value, (list, tuple)):
                value = [widths.get((node, name, index), item) for index, item in enumerate(value)]
            else:
                value = widths[node, name, 0]
            if position < len(args):
                args[position] = value
            else:
                kwargs[name] = value
        device = torch.device("meta")
        args = [device if isinstance(item, torch.device) else item for item in args]
        kwargs = {name: device if isinstance(item, torch.device) else item for name, item in kwargs.items()}
        return torch.fx.node.map_arg((tuple(args), kwargs), values.__getitem__)

    found = Dispatches()
    with quiet(), found:
        for node in graph.nodes:
            if node.op == "placeholder":
                if node.name in graph.tensors:
                    values[node] = state[graph.tensors[node.name]]
                elif node.name in graph.constants:
                    values[node] = graph.constants[node.name].to("meta")
                else:
                    values[node] = next(leaves)
            elif node.op == "get_attr":
                values[node] = getattr(graph.module, str(node.target)).to("meta")
            elif node.op == "call_function" and not writes_state(node):
                args, kwargs = given(node)
                values[node] = stand_in(node.target)(*args, **kwargs)
                value, dims = values[node], ctx.values.get(node)
                if isinstance(value, Tensor) and isinstance(dims, tuple):
                    predicted_shape = tuple(axes.count(dim, counts) for dim in dims)
                    if tuple(value.shape) != predicted_shape:
                        return None
    return found.calls


def behaves_as_predicted(model: nn.Module, ctx: Context, counts: Mapping[Axis, int]) -> bool:
    """Whether a copy on the meta device narrowed to `counts` calls exactly what is predicted; False also if unsure."""
    with warnings.catch_warnings(), torch.no_grad(), garbage_collection_paused():
        warnings.simplefilter("ignore")
        try:
            return calls_of_model(model, ctx) == calls_as_predicted(model, ctx, counts)
        except Exception as error:  # the user's forward may raise anything, and not all of them run without values
            let_through(error)
            return False
