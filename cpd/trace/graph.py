"""The graph of one forward pass, what each of its nodes knows, and its twin at other widths."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import networkx as nx
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from cpd.errors import InputError
from cpd.model.inputs import Call
from cpd.model.outputs import Outputs, names_of, read_by, without_values
from cpd.plan import Cache
from cpd.trace.pointwise import first_name

_TORCH = f"{Path(torch.__file__).parent}{os.sep}"
_CPD = f"{Path(__file__).parents[1]}{os.sep}"
#: Libraries whose ops are called by their names alone.
_KNOWN = ("aten", "torchvision", "cpd")


@dataclass(frozen=True)
class Answer:
    """What a forward was told that asked for a value (`cpd.trace.values`).

    Attributes:
        question: "number", or what has the size that was asked for.
        place: `file:line` of the code that asked.
        value: the number or the size.
        from_inputs: whether it follows from the values of the example inputs, rather than from the model alone.
    """

    question: str
    place: str
    value: Any
    from_inputs: bool


@dataclass(frozen=True, eq=False)
class OperationGraph:
    """The operations of one forward pass.

    Attributes:
        module: the exported `GraphModule`; parameters, buffers and constants are its first placeholders.
        tensors: placeholder name -> name of the parameter or buffer in the model.
        constants: placeholder name -> the tensor that the forward uses without registering it.
        inputs: names of the placeholders that are the user's inputs, in order.
        call: the example inputs; those of each part, where the model cannot be traced whole.
        parts: paths of the submodules that were traced in the model's place, where it cannot be traced whole.
        layout: how what the model returns is put together.
        chosen: the leaves of it that matter, by their places; None: all.
        seconds: wall-clock time that the export took.
        answers: what the forward was told where it asked for a value; a narrower copy is told the same.
        caches: attributes in which the forward kept tensors.
    """

    module: GraphModule
    tensors: dict[str, str]
    constants: dict[str, Tensor]
    inputs: tuple[str, ...]
    call: Call
    parts: tuple[str, ...] = ()
    layout: pytree.TreeSpec | None = None
    chosen: frozenset[int] | None = None
    seconds: float = 0.0
    answers: tuple[Answer, ...] = ()
    caches: tuple[Cache, ...] = ()

    def choosing(self, outputs: Outputs | None) -> OperationGraph:
        """The graph, knowing which parts of its output matter.

        Raises:
            InputError: if the output has no such parts.
        """
        if outputs is None:
            return self
        if self.parts or self.layout is None:
            raise InputError(
                "outputs= needs a model that can be exported as a whole. This one is combed in parts, whose outputs "
                "all matter: leave outputs out."
            )
        return replace(self, chosen=read_by(outputs, self._output_without_values()))

    def _output_without_values(self) -> Any:
        assert self.layout is not None
        values = [item.meta["val"] if isinstance(item, Node) else item for item in self._leaves()]
        return without_values(values, self.layout)

    def _leaves(self) -> list[Any]:
        """What the model returns: nodes, and what is no tensor."""
        (output,) = (node for node in self.module.graph.nodes if node.op == "output")
        every, whole = pytree.tree_leaves(output.args), self.layout
        return every if whole is None else every[len(every) - whole.num_leaves :]

    @property
    def output_names(self) -> dict[int, str]:
        """The name of each tensor that the model returns, by its place; "" where that is all, or it is not known."""
        if self.parts or self.layout is None:
            return {place: "" for place, item in enumerate(self._leaves()) if isinstance(item, Node)}
        return names_of(self._output_without_values())

    def returned(self) -> dict[Node, str]:
        """The nodes whose tensors the model returns and that matter, each with its first name."""
        names, found = self.output_names, dict[Node, str]()
        (output,) = (node for node in self.module.graph.nodes if node.op == "output")
        beside = set(output.all_input_nodes) - {item for item in self._leaves() if isinstance(item, Node)}
        found.update(dict.fromkeys(beside, ""))  # buffers that the forward writes
        for place, item in enumerate(self._leaves()):
            if isinstance(item, Node) and (self.chosen is None or place in self.chosen):
                found.setdefault(item, names.get(place, ""))
        return found

    def runner(self, model: nn.Module) -> nn.Module:
        """What `call` is a call of: `model` itself, or its parts."""
        return Parts(model, self.parts) if self.parts else model

    @property
    def values_read(self) -> tuple[str, ...]:
        """`file:line` of each place where the forward reads a value of its inputs, or of what follows from them."""
        return tuple(dict.fromkeys(answer.place for answer in self.answers if answer.from_inputs))

    @property
    def values_sentence(self) -> str:
        """A sentence for those who read what came of a trace in which values were read."""
        places = ", ".join(self.values_read)
        return f"The forward reads values of tensors ({places}). They are assumed to be those of the example inputs."

    @property
    def nodes(self) -> list[Node]:
        """All nodes in the order of execution."""
        return list(self.module.graph.nodes)

    @property
    def operations(self) -> list[Node]:
        """The nodes that compute something."""
        return [node for node in self.nodes if node.op == "call_function"]

    def constant(self, node: Node) -> Tensor | None:
        """The value of a node that holds one element and follows from constants alone; None for any other."""
        value = node.meta.get("val")
        if node.op == "placeholder":
            found = self.constants.get(node.name)
        elif node.op == "get_attr":
            found = getattr(self.module, str(node.target))
        elif isinstance(value, Tensor) and value.numel() == 1 and callable(node.target) and node.all_input_nodes:
            known = {source: self.constant(source) for source in node.all_input_nodes}
            if any(item is None for item in known.values()):
                return None
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda source: known[source])
            found = node.target(*args, **kwargs)
        else:
            return None
        return found.clone() if isinstance(found, Tensor) and found.numel() == 1 else None

    def digraph(self) -> nx.DiGraph:
        """The graph as `networkx.DiGraph`: a node a name, with `op`, `module`, `shape` and `line`."""
        graph = nx.DiGraph()
        for node in self.nodes:
            name = self.tensors.get(node.name, node.name)
            graph.add_node(name, op=called(node), module=owner(node), shape=shape_of(node), line=line_of(node))
            for source in node.all_input_nodes:
                graph.add_edge(self.tensors.get(source.name, source.name), name)
        return graph


MODEL_PREFIX = "model."


class Parts(nn.Module):
    """Runs some submodules of a model, each on its own inputs: what is exported where the whole cannot be.

    Args:
        model: the model.
        paths: of the submodules.
    """

    def __init__(self, model: nn.Module, paths: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.paths = paths

    def forward(self, *calls: tuple[tuple[Any, ...], dict[str, Any]]) -> list[Any]:
        """The output of each submodule on its own (args, kwargs)."""
        return [
            self.model.get_submodule(path)(*args, **kwargs)
            for path, (args, kwargs) in zip(self.paths, calls, strict=True)
        ]


def is_own_code(filename: str) -> bool:
    """Whether a file belongs to cpd."""
    return filename.startswith(_CPD)


def is_user_code(filename: str) -> bool:
    """Whether a file belongs neither to torch nor to cpd."""
    return not filename.startswith((_TORCH, "<", _CPD))


def op_name(node: Node) -> str:
    """`conv2d` for `aten.conv2d.default`, `mul` for `aten.multiply.Tensor`; a placeholder's or output's kind.

    The name of an op that neither torch nor torchvision has begins with that of its library: it may be anything.
    """
    if isinstance(node.target, OpOverload) and node.target.namespace in _KNOWN:
        return first_name(node.target)
    library = f"{node.target.namespace}." if isinstance(node.target, OpOverload) else ""
    return f"{library}{called(node)}"


def called(node: Node) -> str:
    """The name of the op as it was called: `multiply` for `aten.multiply.Tensor`; a placeholder's or output's kind."""
    if node.op != "call_function":
        return node.op
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet.__name__ if packet is not None else getattr(node.target, "__name__", node.target))


def shape_of(node: Node) -> tuple[int, ...]:
    """The shape of the node's tensor; `()` where it has none."""
    value = node.meta.get("val")
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else ()


def writes_state(node: Node) -> bool:
    """Whether export has added a node at the end of a graph: a buffer takes the value that the forward gave it."""
    return node.name.startswith("copy__default") and not node.users


def owners(node: Node) -> list[str]:
    """Paths of the modules whose forward the node was called in, innermost first; "" is the model."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return paths[::-1] or [""]


def owner(node: Node) -> str:
    """Path of the innermost module that called the node."""
    return owners(node)[0]


def enclosing(path: str) -> Iterator[str]:
    """The path of a module and those of the modules around it, innermost first; the last is "", the model."""
    yield path
    while path:
        path = path.rpartition(".")[0]
        yield path


def line_of(node: Node) -> str:
    """`file:line` of the innermost line of the user's code that called the node."""
    trace_lines = (node.meta.get("stack_trace") or "").splitlines()
    places = []
    for text in trace_lines:
        if text.strip().startswith('File "'):
            filename, number = text.strip().split('"')[1], text.split("line ")[1].split(",")[0]
            places.append((filename, number))
    mine = [place for place in places if is_user_code(place[0])] or places
    return f"{Path(mine[-1][0]).name}:{mine[-1][1]}" if mine else "unknown line"


def _read(nodes: list[Node]) -> list[Node]:
    """Operations whose results are read: outside, by others that are, or by writing to them."""
    found, within = set[Node](), set(nodes)
    for node in reversed(nodes):
        writes = called(node).endswith("_") and not node.users
        if writes or any(user in found or user not in within for user in node.users):
            found.add(node)
    return [node for node in nodes if node in found]


#: Ops that compute nothing: left out where a tensor is laid out so already, which may depend on a width, or kept as
#: the edge of a sub-graph.
_IDLE = {"contiguous", "_set_grad_enabled", "_enter_autocast", "_exit_autocast", "_assert_tensor_metadata"}
#: Those, and the ones that a copy without some operations may have or lack. What a dropout in eval mode gives is its
#: input itself, so that what reads the input later seems to read the dropout.
IDLE = _IDLE | {"clone", "dropout", "feature_dropout", "alpha_dropout"}


def pair(
    old: OperationGraph, new: OperationGraph, gone: Collection[Node] = frozenset()
) -> tuple[dict[Node, Node], Node | None]:
    """Each operation of one graph beside its twin in the graph of the same model at other widths.

    Args:
        old: the one graph.
        new: the other.
        gone: operations of the first that the second is without; then what is read nowhere in it does not count.

    Returns:
        The pairs, and the first operation of `old` that has no twin; None where all have one.
    """
    idle, sides = _IDLE, (old.operations, new.operations)
    if gone:
        idle = IDLE
        sides = _read([node for node in old.operations if node not in gone]), _read(new.operations)
    left, right = ([n for n in side if op_name(n) not in idle and not writes_state(n)] for side in sides)
    pairs: dict[Node, Node] = {}
    for before, after in zip(left, right, strict=False):
        if op_name(before) != op_name(after):
            return pairs, before
        pairs[before] = after
    return pairs, None if len(left) == len(right) else left[min(len(left), len(right)) - 1]
