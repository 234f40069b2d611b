"""Constants that depend on a width, and how they keep their old effect.

`q * head_dim ** -0.5` and the default scale of `scaled_dot_product_attention` change when head_dim does. A group
would then mean something else after shrinking, so the factor by which the constant changes is taken back from the
rows of the parameter that feeds it: multiplying a tensor by r is multiplying the rows it comes from by r.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import Node

from cpd.algebra import axes
from cpd.algebra.axes import Axis, Dim
from cpd.rules import Context, arguments
from cpd.trace.graph import OperationGraph, op_name, owner, owners

#: A number that is passed to an op: the op and the argument's name.
Number: TypeAlias = tuple[Node, str]

#: Powers of a width that a forward may multiply or divide by.
POWERS = (-0.5, 0.5, -1.0, 1.0, -0.25, 0.25)
#: Ops that only re-lay one tensor: what they give is made of the same rows.
LAYOUT = {
    "view", "reshape", "_unsafe_view", "unflatten", "flatten", "squeeze", "unsqueeze", "permute", "transpose",
    "select", "getitem", "unbind", "chunk", "split", "split_with_sizes", "slice", "contiguous", "alias", "clone",
    "dropout", "detach", "to", "movedim",
}  # fmt: skip
ATTENTION = "scaled_dot_product_attention"
#: Ops whose result is linear in either factor.
PRODUCTS = {"matmul", "bmm", "mm"}
#: Ops whose result is linear in the rows of their weight and bias: dimension of the result along which those lie.
ROWS = {"linear": -1, "conv1d": 1, "conv2d": 1, "conv3d": 1, "layer_norm": -1, "rms_norm": -1, "batch_norm": 1}


@dataclass(frozen=True)
class Scale:
    """A constant proportional to `width ** power`, and the parameter rows that make up for its change.

    Attributes:
        node: the op that applies the constant.
        dim: the dimension whose width the constant depends on.
        power: the constant's power of that width.
        inverse: whether the op divides by the constant.
        rows: (parameter, positions along its dimension 0) that feed the op; none where several layers do. The
            constant then follows the width, and the group is inexact.
    """

    node: Node
    dim: Dim
    power: float
    inverse: bool
    rows: tuple[tuple[str, tuple[int, ...]], ...]

    def change(self, counts: Mapping[Axis, int]) -> float:
        """By what factor the constant changes at these widths."""
        return float((axes.count(self.dim, counts) / self.dim.size) ** self.power)

    def explains(self, before: float, after: float, counts: Mapping[Axis, int]) -> bool:
        """Whether the formula gives the constant that a narrower copy has."""
        return bool(before) and math.isclose(after, before * self.change(counts), rel_tol=1e-6)  # it may be a float32

    def factor(self, counts: Mapping[Axis, int]) -> float:
        """What the rows are multiplied by so that the op gives what it gave."""
        return self.change(counts) if self.inverse else 1 / self.change(counts)


@dataclass(frozen=True)
class Constants:
    """The numbers of every copy compared so far, and the formulas by which some of them follow a width.

    Attributes:
        ctx: the result of the algebra.
        formulas: for each constant that depends on a width, the formulas that explain it in every copy seen.
        seen: the widths of each copy that was compared, and the numbers of the unpruned model beside its own.
    """

    ctx: Context
    formulas: dict[Number, list[Scale]] = field(default_factory=dict)
    seen: list[tuple[Mapping[Axis, int], Mapping[Number, tuple[float, float]]]] = field(default_factory=list)

    @property
    def scales(self) -> list[Scale]:
        """The formula of each constant that depends on a width: the simplest of those that explain it."""

        def simplicity(scale: Scale) -> tuple[int, int]:
            return len(list(axes.leaves(scale.dim))), POWERS.index(scale.power)

        return [min(found, key=simplicity) for found in self.formulas.values()]

    def adopt_attention(self) -> None:
        """The default scale of attention is known to follow its head_dim."""
        self.formulas.update({(scale.node, "scale"): [scale] for scale in attention_scales(self.ctx)})

    def named(self) -> bool:
        """Whether the forward itself gives one of the constants, rather than leave it to an op's default."""
        return any(arguments(node).get(name) is not None for node, name in self.formulas)

    def note(
        self, counts: Mapping[Axis, int], numbers: Mapping[Number, tuple[float, float]]
    ) -> dict[Number, list[Dim]]:
        """Note the numbers of a copy, and keep the formulas that explain them there too.

        Returns:
            Each number that depends on a width in a way that no rows make up for, with the widths that explain it.
        """
        self.seen.append((counts, numbers))
        unexplained: dict[Number, list[Dim]] = {}
        for key, (before, after) in numbers.items():
            if before == after and key not in self.formulas:
                continue
            candidates = self.formulas.get(key) or find_scales(self.ctx, key[0])
            self.formulas[key] = [scale for scale in candidates if self._explains(scale, key)]
            if not self.formulas[key]:
                del self.formulas[key]
                found = formulas(self.ctx, key[0])
                unexplained[key] = [scale.dim for scale in found if self._explains(scale, key)]
        return unexplained

    def _explains(self, scale: Scale, key: Number) -> bool:
        """Whether a formula gives the number of every copy seen."""
        return all(scale.explains(*numbers[key], counts) for counts, numbers in self.seen if key in numbers)

    def telling(self, drawn: Iterable[Mapping[Axis, int]]) -> Mapping[Axis, int] | None:
        """Of some widths those at which the formulas that explain a constant so far differ most; None if they never do.

        Args:
            drawn: the widths; none is drawn where every constant has a single formula.
        """
        several = [found for found in self.formulas.values() if len(found) > 1]

        def kinds(counts: Mapping[Axis, int]) -> int:
            return sum(len({round(scale.change(counts), 9) for scale in found}) - 1 for found in several)

        best = max(drawn if several else (), key=kinds, default=None)
        return best if best is not None and kinds(best) else None


def scalars(
    node: Node, graph: OperationGraph, twin: Node, other_graph: OperationGraph
) -> Iterator[tuple[str, float, float]]:
    """The numbers among the arguments of two nodes, by argument name; tensors of one constant element too."""
    if graph.constant(node) is not None:  # what reads it is asked
        return
    before, after = arguments(node), arguments(twin)
    for name, value in before.items():
        other: Any = after.get(name)
        pairs = zip(value, other, strict=False) if isinstance(value, (list, tuple)) else [(value, other)]
        for pair in pairs:
            old, new = (
                side if constant is None else constant.item()
                for side, constant in zip(
                    pair, (_constant(graph, pair[0]), _constant(other_graph, pair[1])), strict=True
                )
            )
            if isinstance(old, (int, float)) and isinstance(new, (int, float)) and not isinstance(old, bool):
                yield name, float(old), float(new)


def _constant(graph: OperationGraph, value: Any) -> Tensor | None:
    return graph.constant(value) if isinstance(value, Node) else None


def find_scales(ctx: Context, node: Node) -> list[Scale]:
    """Every formula for the constant that `node` multiplies or divides by, with the rows that make up for it."""
    name = op_name(node).removesuffix("_")
    if name == ATTENTION:
        return formulas(ctx, node, rows=_attention_rows(ctx, node))
    scaled = [source for source in node.all_input_nodes if ctx.graph.constant(source) is None]
    if name not in ("mul", "div") or len(scaled) != 1 or (name == "div" and node.args[0] is not scaled[0]):
        return []
    return formulas(ctx, node, name == "div", feeding_rows(ctx, scaled[0], node) or ())


def formulas(
    ctx: Context, node: Node, inverse: bool = False, rows: tuple[tuple[str, tuple[int, ...]], ...] = ()
) -> list[Scale]:
    """Every power of every width that the module of `node` works with."""
    return [Scale(node, dim, power, inverse, rows) for dim in widths_in_sight(ctx, owner(node)) for power in POWERS]


def attention_scales(ctx: Context) -> Iterator[Scale]:
    """For each attention with the default scale E^-0.5 whose E may shrink: the rows of q or k that make up for it."""
    for node in ctx.graph.operations:
        if op_name(node) == ATTENTION and arguments(node).get("scale") is None:
            dim = ctx.shape(node.args[0])[-1]  # type: ignore[arg-type]
            if axes.is_open(dim):
                yield Scale(node, dim, -0.5, False, _attention_rows(ctx, node))


def _attention_rows(ctx: Context, node: Node) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Rows that the query, or else the key, is made of."""
    sides = (feeding_rows(ctx, arguments(node)[name], node) for name in ("query", "key"))
    return next((rows for rows in sides if rows), ())


def widths_in_sight(ctx: Context, module: str) -> list[Dim]:
    """The dimensions with an axis of every tensor that a module is given, passes on or computes."""
    found: list[Dim] = []
    for source in tensors_in_sight(ctx, module):
        value = ctx.values.get(source)
        if isinstance(value, tuple):
            found.extend(dim for dim in map(axes.resolve, value) if any(True for _ in axes.leaves(dim)))
    return list(dict.fromkeys(found))


def tensors_in_sight(ctx: Context, module: str) -> tuple[Node, ...]:
    """The nodes whose results a module's forward sees: its inputs, what its submodules give, what it computes."""
    if module in ctx.in_sight:
        return ctx.in_sight[module]
    if not ctx.inside:
        for node in ctx.graph.operations:
            for path in owners(node):
                ctx.inside.setdefault(path, []).append(node)
    found: dict[Node, None] = {}
    for node in ctx.inside.get(module, ()):
        place = _part_of(node, module)
        if place == module:
            found[node] = None
        found.update(dict.fromkeys(source for source in node.all_input_nodes if _part_of(source, module) != place))
    return ctx.in_sight.setdefault(module, tuple(found))


def _part_of(node: Node, module: str) -> str | None:
    """The submodule called by `module` that a node runs in, `module` itself, or None outside of it."""
    paths = owners(node)
    if node.op != "call_function" or module not in paths:
        return None
    place = paths.index(module)
    return paths[place - 1] if place else module


def feeding_rows(ctx: Context, node: Node, user: Node) -> tuple[tuple[str, tuple[int, ...]], ...] | None:
    """The rows of the one layer that `node` is linear in, if they feed nothing else than `user`; None otherwise."""
    chain = [node]
    while op_name(chain[-1]) in LAYOUT and chain[-1].all_input_nodes:
        chain.append(chain[-1].all_input_nodes[0])
    layer = chain[-1]
    if op_name(layer) in PRODUCTS and all(len(link.users) == 1 for link in chain):
        sides = (feeding_rows(ctx, side, layer) for side in layer.args[:2] if isinstance(side, Node))
        return next((rows for rows in sides if rows is not None), None)
    if op_name(layer) not in ROWS:
        return None
    bound = arguments(layer)
    parameters = [bound[name] for name in ("weight", "bias") if bound.get(name) is not None]
    if not parameters or any(p.name not in ctx.graph.tensors or len(p.users) > 1 for p in parameters):
        return None
    if op_name(layer).endswith("_norm") and any(p.meta["val"].dim() != 1 for p in parameters):
        return None
    marks = _row_marks(layer, chain)
    rows = set(marks[node].reshape(-1).tolist())
    for link in chain:
        for other in link.users:
            if other is not user and other not in chain:
                mark = _follow(other, marks[link]) if op_name(other) in LAYOUT else marks[link]
                if mark is None or rows & set(_flat(mark)):
                    return None
    return tuple((ctx.graph.tensors[p.name], tuple(sorted(rows))) for p in parameters)


def _row_marks(layer: Node, chain: list[Node]) -> dict[Node, Any]:
    """For every link of a chain of re-layings, which row of `layer` each element comes from."""
    shape = layer.meta["val"].shape
    dim = ROWS[op_name(layer)] % len(shape)
    mark = torch.arange(shape[dim]).reshape([-1 if index == dim else 1 for index in range(len(shape))])
    marks: dict[Node, Any] = {layer: mark.expand(shape).contiguous()}
    for link in reversed(chain[:-1]):
        marks[link] = _follow(link, marks[link.all_input_nodes[0]])
    return marks


def _follow(node: Node, mark: Any) -> Any:
    """Apply one re-laying to the marks."""
    args = [mark if isinstance(arg, Node) else arg for arg in node.args]
    assert callable(node.target)
    return node.target(*args, **{key: value for key, value in node.kwargs.items() if key != "dtype"})


def _flat(mark: Any) -> list[int]:
    parts = mark if isinstance(mark, (tuple, list)) else [mark]
    return [value for part in parts if isinstance(part, Tensor) for value in torch.unique(part).tolist()]
