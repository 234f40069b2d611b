"""The graph of the picture: layers and the ops that join them, made of the traced operations.

Nodes are the layers that own parameters and the ops that join several activations; all else is passed through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
from torch import nn
from torch.fx import Node

from cpd.algebra import axes
from cpd.algebra.axes import Dim
from cpd.coupling.comb import Comb
from cpd.rules import arguments
from cpd.trace.graph import op_name, owner, shape_of

_CONVS = {f"conv{rank}d": rank for rank in (1, 2, 3)}
_TRANSPOSED = {f"conv_transpose{rank}d": rank for rank in (1, 2, 3)}
_CHANNEL_1 = {"batch_norm", "group_norm", "instance_norm"}
_LAST = {"linear", "layer_norm", "rms_norm"}
_WEIGHTED = {*_CONVS, *_TRANSPOSED, *_CHANNEL_1, *_LAST, "embedding"}
_PRODUCTS = {"scaled_dot_product_attention", "matmul", "bmm", "mm", "einsum", "baddbmm"}
_KINDS = {"scaled_dot_product_attention": "attention", "bmm": "matmul", "mm": "matmul", "baddbmm": "matmul"}


@dataclass
class Item:
    """A node of the picture: a layer, an op that joins activations, the input or the output.

    Attributes:
        path: the layer's path, or the path of the module that the op belongs to.
        name: how it is called in the picture; "" for an op.
        role: "layer", "op" or "end".
        nodes: the operations it stands for, in order.
        parameters: names of the parameters it reads.
    """

    path: str
    name: str
    role: str
    nodes: list[Node] = field(default_factory=list)
    parameters: dict[str, None] = field(default_factory=dict)
    kind: str = ""
    before: str = ""
    after: str = ""
    groups: tuple[int, ...] = ()

    @property
    def main(self) -> Node:
        """The operation that names the kind and the widths."""
        return next((node for node in self.nodes if _base(node) in _WEIGHTED), self.nodes[-1])

    @property
    def widths(self) -> str:
        """`in → out`, or the one width where both are the same or only one is known."""
        return f"{self.before} → {self.after}" if self.before not in ("", self.after) else self.after


def contract(comb: Comb) -> nx.DiGraph:
    """The graph of the picture: nodes are numbers with an `item`, edges the flow of activations."""
    contraction = _Contraction(comb)
    for node in comb.operations.nodes:
        contraction.add(node)
    _drop_unused(contraction.graph)
    _describe(contraction.graph, comb)
    return contraction.graph


def input_groups(graph: nx.DiGraph, comb: Comb) -> frozenset[int]:
    """The numbers of the groups that are the channels of the model's input: read by the first layers, given by none."""
    ends = (index for index in graph if graph.nodes[index]["item"].role == "end" and not graph.pred[index])
    first = (graph.nodes[after]["item"] for index in ends for after in graph.succ[index])
    read = {name for item in first if item.role == "layer" for name in item.parameters}
    return frozenset(
        number
        for number, group in enumerate(comb.groups)
        if group.frozen is not None and all(member.contracted and member.tensor in read for member in group.members)
    )


class _Contraction:
    """The graph so far, and what became of each operation that was added to it.

    Attributes:
        graph: nodes are numbers with an `item`.
        stands: the node of the graph that an activation comes from.
        reads: the names of the parameters that a value is computed of, for values that are no activations.
        calls: the node of the graph for each call of a layer.
    """

    def __init__(self, comb: Comb) -> None:
        self.comb = comb
        self.graph = nx.DiGraph()
        self.stands: dict[Node, int] = {}
        self.reads: dict[Node, dict[str, None]] = {}
        self.calls: dict[str, int] = {}
        self._parameters = {name for name, _ in comb.model.named_parameters(remove_duplicate=False)}
        self._leaves = {
            path
            for path, module in comb.model.named_modules(remove_duplicate=False)
            if not any(True for _ in module.children()) and any(True for _ in module.parameters())
        }

    def add(self, node: Node) -> None:
        """Add the next operation, in the order of the trace."""
        if node.op == "placeholder":
            self._add_placeholder(node)
            return
        sources = [source for source in dict.fromkeys(node.all_input_nodes) if source in self.stands]
        if node.op == "output":
            shape = _shape_text(sources[0]) if len(sources) == 1 else f"{len(sources)} tensors"
            self._connect(sources, self._new(Item("output", "output", "end", [node], after=shape)))
        else:
            self._add_operation(node, sources)

    def _add_placeholder(self, node: Node) -> None:
        """An input that is used becomes an item; a parameter is remembered for the operation that reads it."""
        operations = self.comb.operations
        if node.name in operations.inputs and node.users:
            item = Item(node.name, f"input {node.name}", "end", [node], after=_shape_text(node))
            self.stands[node] = self._new(item)
        elif operations.tensors.get(node.name) in self._parameters:
            self.reads[node] = {operations.tensors[node.name]: None}

    def _add_operation(self, node: Node, sources: Sequence[Node]) -> None:
        """An operation on activations joins an item or begins one, or is passed through."""
        others = (source for source in node.all_input_nodes if source not in self.stands)
        own = {name: None for source in others for name in self.reads.get(source, ())}
        if not sources:
            self.reads[node] = own
            return
        index = self._item_of(node, sources, own)
        if index is None:
            self.stands[node] = self.stands[sources[0]]
            return
        item: Item = self.graph.nodes[index]["item"]
        item.nodes.append(node)
        item.parameters.update(own)
        self._connect(sources, index)
        self.stands[node] = index

    def _item_of(self, node: Node, sources: Sequence[Node], own: Mapping[str, None]) -> int | None:
        """The item that an operation belongs to, a new one if need be; none for what is passed through."""
        path = owner(node)
        if path in self._leaves:
            return self._call_of(node, sources)
        if own:
            name = _layer_name(node, own, self._leaves)
            return self._new(Item(name, name, "layer"))
        if len({self.stands[source] for source in sources}) > 1 or (_base(node) in _PRODUCTS and len(sources) > 1):
            return self._new(Item(path, "", "op"))
        return None

    def _call_of(self, node: Node, sources: Sequence[Node]) -> int:
        """The item of the layer's call that an operation is part of, unless a circle would come of joining it."""
        call = next(reversed(node.meta.get("nn_module_stack") or {"": None}))
        known = self.calls.get(call)
        reached = {self.stands[source] for source in sources} - {known}
        if known is None or any(nx.has_path(self.graph, known, other) for other in reached):
            path = owner(node)
            known = self.calls[call] = self._new(Item(path, path or type(self.comb.model).__name__, "layer"))
        return known

    def _new(self, item: Item) -> int:
        index = len(self.graph)
        self.graph.add_node(index, item=item)
        return index

    def _connect(self, sources: Sequence[Node], index: int) -> None:
        reached = (self.stands[source] for source in sources)
        self.graph.add_edges_from((other, index) for other in reached if other != index)


def _drop_unused(graph: nx.DiGraph) -> None:
    """Remove ops that lead nowhere, such as a mean of attention weights that nobody reads; layers stay."""
    for index in sorted(graph, reverse=True):
        if graph.nodes[index]["item"].role == "op" and not graph.succ[index]:
            graph.remove_node(index)


def _layer_name(node: Node, own: Mapping[str, None], leaves: set[str]) -> str:
    """The module that owns the parameters; a parameter that a larger module uses directly is named itself."""
    modules = {name.rpartition(".")[0] for name in own}
    if len(modules) == 1 and modules <= leaves and "" not in modules:
        return modules.pop()
    return owner(node) if owner(node) and _base(node) in _WEIGHTED else next(iter(own))


def _base(node: Node) -> str:
    return op_name(node).rstrip("_")


def _shape_text(node: Node) -> str:
    return " × ".join(map(str, shape_of(node)))


def _describe(graph: nx.DiGraph, comb: Comb) -> None:
    """Kind, widths and groups of every item."""
    number = {group.axis: index for index, group in enumerate(comb.groups)}
    modules = dict(comb.model.named_modules(remove_duplicate=False))
    repeats: dict[str, int] = {}
    for index in graph:
        item: Item = graph.nodes[index]["item"]
        if item.role == "end":
            continue
        main, last = item.main, item.nodes[-1]
        item.kind = _kind(item, modules.get(item.path))
        dims = _channels(comb, last, _base(main) if main is last else "", number)
        item.after = _sizes(dims)
        item.groups = tuple(dict.fromkeys(number[axis] for dim in dims for axis in axes.leaves(dim) if axis in number))
        if item.role == "layer":
            source = next((source for source in main.all_input_nodes if source in comb.context.values), None)
            if source is not None:
                item.before = _sizes(_channels(comb, source, _base(main), number))
            repeats[item.name] = repeats.get(item.name, 0) + 1
            if repeats[item.name] > 1:
                item.name += f" ({repeats[item.name]})"


def _channels(comb: Comb, node: Node, op: str, number: Mapping[axes.Axis, int]) -> list[Dim]:
    """The dimensions of a node's tensor that hold its channels."""
    value: Any = comb.context.values.get(node, ())
    if isinstance(value, list):
        value = value[0] if value else ()
    dims = [axes.resolve(dim) for dim in value]
    if op == "scaled_dot_product_attention" and len(dims) == 4:
        return [dims[1], dims[3]]
    space = _CONVS.get(op) or _TRANSPOSED.get(op)
    place = -1 - space if space else 1 if op in _CHANNEL_1 else -1 if op in _LAST else None
    if place is not None and len(dims) >= (place + 1 if place > 0 else -place):
        return [dims[place]]
    grouped = [dim for dim in dims if any(axis in number for axis in axes.leaves(dim))]
    free = [dim for dim in grouped if any(axis in number and axis.frozen is None for axis in axes.leaves(dim))]
    return list(dict.fromkeys(free)) or sorted(grouped, key=lambda dim: -dim.size)[:1]


def _sizes(dims: Sequence[Dim]) -> str:
    return " × ".join(str(dim.size) for dim in dims)


def _kind(item: Item, module: nn.Module | None) -> str:
    """What a layer or op does, in one or two words."""
    op = _base(item.main)
    if op in _CONVS or op in _TRANSPOSED:
        bound = arguments(item.main)
        shape = shape_of(bound["weight"])
        word = "deconv" if op in _TRANSPOSED else "conv"
        if bound.get("groups", 1) > 1:
            word = f"depthwise {word}" if shape[1] == 1 else f"grouped {word}"
        return f"{word} {'×'.join(map(str, shape[2:]))}"
    if item.role == "layer" and op not in _WEIGHTED and len(item.nodes) > 1 and module is not None:
        return type(module).__name__
    return _KINDS.get(op, op.replace("_", " ").strip())
