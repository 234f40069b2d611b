"""What an op rule works with: the table of rules, and the context that a rule reads and writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import Node

from cpd.algebra import axes
from cpd.algebra.axes import Dim, Fixed
from cpd.algebra.ties import Tie
from cpd.trace.graph import OperationGraph, line_of, op_name, owner, shape_of

Shape: TypeAlias = tuple[Dim, ...]
#: What a node gives: the dimensions of one tensor, or of several.
Value: TypeAlias = Shape | list[Shape]
Rule: TypeAlias = Callable[["Context", Node, dict[str, Any]], Value]

RULES: dict[str, Rule] = {}


@dataclass(frozen=True)
class Literal:
    """An integer that the user's forward passes to an op, and the dimension whose width it must equal.

    Attributes:
        node: the op, e.g. a reshape.
        argument: name of the op's argument in the ATen schema, e.g. "shape" or "groups".
        index: position in the argument where that is a list, else 0.
        dim: the dimension whose number of kept positions the integer must be.
        sign: -1 where the integer counts from the end.
    """

    node: Node
    argument: str
    index: int
    dim: Dim
    sign: int = 1


@dataclass
class Context:
    """State of one comb: the dimensions of every node so far, and the demands met on the way.

    `in_sight` keeps, for each module asked about, the nodes whose results its forward sees (`cpd.proof.constants`).
    """

    graph: OperationGraph
    values: dict[Node, Value] = field(default_factory=dict)
    literals: list[Literal] = field(default_factory=list)
    ties: list[Tie] = field(default_factory=list)
    contracted: set[tuple[str, int]] = field(default_factory=set)
    unknown: dict[str, str] = field(default_factory=dict)
    in_sight: dict[str, tuple[Node, ...]] = field(default_factory=dict)

    def dims_of(self, node: Node) -> list[Dim]:
        """The dimensions of all tensors that a node gives, in normal form; none for a node not visited."""
        value = self.values.get(node, ())
        return [axes.resolve(dim) for shape in (value if isinstance(value, list) else [value]) for dim in shape]

    def shape(self, node: Node) -> Shape:
        """The dimensions of a node's tensor, in normal form."""
        value = self.values[node]
        assert isinstance(value, tuple), f"{node} gives several tensors"
        return tuple(axes.resolve(dim) for dim in value)

    def unify(self, left: Dim, right: Dim, node: Node, why: str) -> Dim:
        """Demand that two dimensions lose the same positions, for a reason that names the node and line."""
        return axes.unify(left, right, self.reason(node, why))

    def split(self, dim: Dim, inner: int, node: Node, why: str) -> tuple[Dim, Dim]:
        """Split a dimension into (outer, inner)."""
        return axes.split(dim, inner, self.reason(node, why))

    def freeze(self, dim: Dim, node: Node, why: str) -> None:
        """Forbid removing anything from `dim`."""
        axes.freeze(dim, self.reason(node, why))

    def reason(self, node: Node, why: str) -> str:
        """`why`, with the op, the module and the line."""
        module = owner(node)
        return f"{why} [{op_name(node)} in {module or 'the model'}, {line_of(node)}]"

    def literal(self, node: Node, argument: str, index: int, dim: Dim, sign: int = 1) -> None:
        """Note that an integer argument of `node` must equal the width of `dim`."""
        if any(True for _ in axes.leaves(dim)):
            self.literals.append(Literal(node, argument, index, dim, sign))

    def contract(self, weight: object, dim: int) -> None:
        """Note that `dim` of a parameter, also below a mask, is summed over: the consumer's side of a group."""
        if not isinstance(weight, Node):
            return
        masked = op_name(weight) == "mul" and all(map(self._stored, weight.all_input_nodes))
        for source in weight.all_input_nodes if masked else [weight]:
            if source.name in self.graph.tensors and shape_of(source) == shape_of(weight):
                self.contracted.add((self.graph.tensors[source.name], dim))

    def _stored(self, node: Node) -> bool:
        """Whether a node is a parameter or a buffer, perhaps in another type."""
        below = node.all_input_nodes if op_name(node) in ("to", "_to_copy") else [node]
        return all(source.name in self.graph.tensors for source in below)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a rule into the table under the names of the ATen ops (without overload) that it covers."""

    def enter(function: Rule) -> Rule:
        for name in names:
            assert name not in RULES, f"two rules for {name}"
            RULES[name] = function
        return function

    return enter


def find(node: Node) -> Rule | None:
    """The rule for a node: by name, by the name of its out-of-place twin, or by ATen's own pointwise tag."""
    name = op_name(node)
    for candidate in (name, name.removesuffix("_")):
        if candidate in RULES:
            return RULES[candidate]
    for candidate in (name, name.removesuffix("_")):
        packet = getattr(torch.ops.aten, candidate, None)
        overloads = packet.overloads() if packet is not None else []
        if any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in overloads):
            return RULES["pointwise"]
    return None


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of a node by the names of its schema, defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {"args": node.args}
    bound = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    bound.update(zip((argument.name for argument in schema.arguments), node.args, strict=False))
    bound.update(node.kwargs)
    return bound


def fixed(node: Node) -> Value:
    """Fixed dimensions of the shapes that the trace found."""
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)):
        return [_fixed_shape(item.shape) if isinstance(item, Tensor) else () for item in value]
    return _fixed_shape(shape_of(node))


def _fixed_shape(sizes: Sequence[int]) -> Shape:
    return tuple(Fixed(int(size)) for size in sizes)


def tensor_inputs(node: Node) -> list[Node]:
    """The input nodes that hold a tensor."""
    return [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), Tensor)]


def broadcast(ctx: Context, node: Node, shapes: Sequence[Shape]) -> Shape:
    """The common shape of several: dimensions aligned from the last, those of size 1 repeated, others unified."""
    rank = max((len(shape) for shape in shapes), default=0)
    result: list[Dim] = [Fixed(1)] * rank
    for shape in shapes:
        for offset in range(1, len(shape) + 1):
            ours, theirs = axes.resolve(result[-offset]), axes.resolve(shape[-offset])
            if ours.size == theirs.size:
                result[-offset] = ctx.unify(ours, theirs, node, "coupled elementwise with a dimension that is fixed")
                continue
            single, wide = (ours, theirs) if ours.size == 1 else (theirs, ours)
            ctx.freeze(single, node, "a single channel is broadcast")
            result[-offset] = wide
    return tuple(result)
