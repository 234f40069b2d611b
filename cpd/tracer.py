"""Trace: a model and its example inputs become an `OperationGraph`, an ATen-level FX graph with known shapes.

`torch.export` is used rather than `torch.fx.symbolic_trace`: it follows every Python forward that ends in
tensor operations, gives each node its shape, each parameter its name, and each node its module and line.
"""

from __future__ import annotations

import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node

from cpd.errors import InputError, TraceError
from cpd.inputs import Call, as_call, check_model, evaluating, plain_attention

_TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True, eq=False)
class OperationGraph:
    """The operations of one forward pass.

    Attributes:
        module: the exported `GraphModule`; parameters, buffers and constants are its first placeholders.
        tensors: placeholder name -> name of the parameter or buffer in the model.
        constants: placeholder name -> the tensor that the forward uses without registering it.
        inputs: names of the placeholders that are the user's inputs, in order.
        call: the example inputs.
        parts: paths of the submodules that were traced in the model's place, where it cannot be traced whole.
        seconds: wall-clock time that the export took.
    """

    module: GraphModule
    tensors: dict[str, str]
    constants: dict[str, Tensor]
    inputs: tuple[str, ...]
    call: Call
    parts: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def nodes(self) -> list[Node]:
        """All nodes in the order of execution."""
        return list(self.module.graph.nodes)

    @property
    def operations(self) -> list[Node]:
        """The nodes that compute something."""
        return [node for node in self.nodes if node.op == "call_function"]

    def digraph(self) -> nx.DiGraph:
        """The graph as `networkx.DiGraph`: a node a name, with `op`, `module`, `shape` and `line`."""
        graph = nx.DiGraph()
        for node in self.nodes:
            name = self.tensors.get(node.name, node.name)
            graph.add_node(name, op=op_name(node), module=owner(node), shape=shape_of(node), line=line_of(node))
            for source in node.all_input_nodes:
                graph.add_edge(self.tensors.get(source.name, source.name), name)
        return graph


def trace(model: nn.Module, example_inputs: Any) -> OperationGraph:
    """Export `model` (in eval mode; its modes are left as found) on `example_inputs`.

    Args:
        model: the model.
        example_inputs: a tensor, a tuple, or `(tuple, dict)`.

    Raises:
        InputError: if `model` is no module, or itself fails on `example_inputs`.
        TraceError: if the model runs but cannot be exported; the message names the line.
    """
    check_model(model)
    call = as_call(example_inputs)
    start = time.perf_counter()
    with evaluating(model), warnings.catch_warnings(), plain_attention():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(model, call.args, call.kwargs, strict=False)
        except Exception as error:  # the user's forward may raise anything
            raise _explain(model, call, error) from error
    kinds = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    tensors = {
        name: spec.target
        for name, spec in kinds.items()
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target is not None
    }
    constants = {
        name: program.constants[spec.target]
        for name, spec in kinds.items()
        if spec.kind is InputKind.CONSTANT_TENSOR and spec.target is not None
    }
    inputs = tuple(name for name, spec in kinds.items() if spec.kind is InputKind.USER_INPUT)
    _inline_regions(program.graph_module)
    seconds = time.perf_counter() - start
    return OperationGraph(program.graph_module, tensors, constants, inputs, call, seconds=seconds)


def _inline_regions(module: GraphModule) -> None:
    """Put regions that export keeps as sub-graphs (under `no_grad`, `autocast`) in the place of their call.

    Checks that export adds at their edges go with them.
    """
    for node in list(module.graph.nodes):
        if node.op != "call_function" or not str(node.target).startswith("wrap_with_"):
            continue
        place = next(index for index, arg in enumerate(node.args) if isinstance(arg, Node) and arg.op == "get_attr")
        region = getattr(module, str(node.args[place].target))
        _inline_regions(region)
        inputs = [inner for inner in region.graph.nodes if inner.op == "placeholder"]
        values = dict(zip(inputs, node.args[place + 1 :], strict=True))
        with module.graph.inserting_before(node):
            result = module.graph.graph_copy(region.graph, values)
        for user in list(node.users):
            if not isinstance(result, Node):  # several results, each read by a getitem
                user.replace_all_uses_with(result[user.args[1]])
                module.graph.erase_node(user)
        if isinstance(result, Node):
            node.replace_all_uses_with(result)
        module.graph.erase_node(node)
    for node in list(module.graph.nodes):
        if op_name(node).startswith("_assert_") and not node.users:
            module.graph.erase_node(node)
    module.recompile()


def _explain(model: nn.Module, call: Call, error: Exception) -> InputError | TraceError:
    """Tell a model that does not run on its inputs from one that cannot be exported."""
    shapes = [tuple(leaf.shape) for leaf in torch.utils._pytree.tree_leaves(call) if isinstance(leaf, Tensor)]
    try:
        with torch.no_grad():
            call.on(model)
    except Exception as own:
        return InputError(
            f"The model fails on the example inputs of shape {shapes}: {type(own).__name__}: {own}. "
            "Pass example_inputs=(…) on which model(*example_inputs) runs."
        )
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_user_code(frame.filename)]
    line = f" at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""
    return TraceError(
        f"torch.export cannot trace {type(model).__name__}{line}: {str(error).strip().splitlines()[0]} "
        "Comb a submodule that can be traced instead, e.g. cpd.comb(model.backbone, …)."
    )


def _is_user_code(filename: str) -> bool:
    return not filename.startswith((_TORCH, "<", str(Path(__file__).parent)))


# ---------------------------------------------------------------- what a node knows about itself


def op_name(node: Node) -> str:
    """`conv2d` for `aten.conv2d.default`; the node's kind for placeholders and outputs."""
    if node.op != "call_function":
        return node.op
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet.__name__ if packet is not None else getattr(node.target, "__name__", node.target))


def shape_of(node: Node) -> tuple[int, ...]:
    """The shape of the node's tensor; `()` where it has none."""
    value = node.meta.get("val")
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else ()


def owners(node: Node) -> list[str]:
    """Paths of the modules whose forward the node was called in, innermost first; "" is the model."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(path).split("@")[0] for path, _ in stack.values()]
    return paths[::-1] or [""]


def owner(node: Node) -> str:
    """Path of the innermost module that called the node."""
    return owners(node)[0]


def line_of(node: Node) -> str:
    """`file:line` of the innermost line of the user's code that called the node."""
    trace_lines = (node.meta.get("stack_trace") or "").splitlines()
    places = []
    for text in trace_lines:
        if text.strip().startswith('File "'):
            filename, number = text.strip().split('"')[1], text.split("line ")[1].split(",")[0]
            places.append((filename, number))
    mine = [place for place in places if _is_user_code(place[0])] or places
    return f"{Path(mine[-1][0]).name}:{mine[-1][1]}" if mine else "unknown line"
