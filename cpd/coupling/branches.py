"""Branches: what lies between a value and a sum that it is added to, and can go as a whole.

In `y = x + f(x)`, `f` is a branch: all operations whose results go into one operand of the sum and nowhere else.
Without it that operand is zero and `y` is `x`. Branches are found from the graph alone, whatever modules make them:
residual blocks, attention and MLP of a transformer, the path beside a projection. So are the arms of a concatenation,
whose channels go with them, and the gate of `y = x * g(x)`, which becomes one where a layer reads `y` that can take
up what the gate gave on the average.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile

from torch import nn
from torch.fx import Node

from cpd.algebra import axes
from cpd.algebra.axes import Axis, Dim
from cpd.coupling.cost import Cost, CostFigures
from cpd.coupling.exactness import live_nodes
from cpd.coupling.groups import Group
from cpd.coupling.removal import NO_REMOVAL, Found, Removal, Remover, proved, vanishes
from cpd.errors import PlanError
from cpd.proof.copies import narrower
from cpd.proof.draws import Draws, Widths
from cpd.proof.provenance import Place
from cpd.rules import Context
from cpd.trace.graph import IDLE, OperationGraph, op_name, owners, shape_of

_ADDING, _MULTIPLYING = {"add", "add_"}, {"mul", "mul_"}
_JOINING = {"cat", "concat", "concatenate"}
#: What mixes the channels that it reads.
_LAYERS = {"linear", "conv1d", "conv2d", "conv3d"}


@dataclass(frozen=True)
class Branch:
    """A part of the model that can be removed as a whole: the operations that only compute one operand.

    Without the branch, a sum becomes its other operand, a concatenation becomes narrower, and a product becomes its
    other factor.

    Attributes:
        name: Name of the module that holds the operations, followed by a number if it holds several branches.
        start: The operations whose results the branch reads, by their nodes in `Comb.graph`.
        end: The operation that computes the operand.
        modules: The largest modules that are removed with the branch.
        groups: The groups whose channels are only inside the branch.
        parameters: Number of parameters that are removed with the branch.
        macs: Multiply-accumulates (MACs) on the example inputs that are removed with it.
        frozen: None if the branch can be removed, else the reason why it cannot.
        rivals: Sets of other branches, such as the other operands of a sum or a concatenation. If all branches of one
            set are removed, this one must be kept.
    """

    name: str
    start: tuple[str, ...]
    end: str
    modules: tuple[str, ...]
    groups: tuple[str, ...]
    parameters: int
    macs: int
    frozen: str | None
    found: Found = field(repr=False, compare=False)
    rivals: tuple[frozenset[str], ...] = ()


def may_follow(branch: Branch, gone: Collection[str]) -> bool:
    """Whether a branch may go when others have gone."""
    return not any(names.issubset(gone) for names in branch.rivals)


class _Finder:
    """Finds the branches of a graph.

    Args:
        ctx: the algebra over it.
    """

    def __init__(self, ctx: Context) -> None:
        self.ctx, graph = ctx, ctx.graph
        live = live_nodes(graph)
        self.order = {node: index for index, node in enumerate(graph.nodes) if node in live}
        self.state = {*graph.tensors, *graph.constants}

    def branches(self) -> Iterator[Found]:
        """Every branch, in the order of the operations that they are left out of."""
        arms = set[frozenset[Axis]]()
        for node in self.ctx.graph.operations:
            if node not in self.order:
                continue
            if op_name(node) in _ADDING and node.kwargs.get("alpha", 1) == 1:
                yield from self._of_sum(node)
            elif op_name(node) in _MULTIPLYING:
                yield from self._of_product(node)
            elif op_name(node) in _JOINING:
                yield from self._of_concatenation(node, arms)

    def _of_sum(self, node: Node) -> Iterator[Found]:
        """The operands of `x + f(x)` that can be left out."""
        operands = [item for item in node.args[:2] if isinstance(item, Node) and shape_of(item) == shape_of(node)]
        for operand, other in (operands, operands[::-1]) if len(operands) == 2 else ():
            nodes = self._alone(operand, node)
            start = self._start(nodes)
            if op_name(operand) in _ADDING and any(source in start for source in operand.all_input_nodes):
                continue  # the value itself, with another branch added
            if self._weighs(nodes) and self._share([other], start):
                yield Found("nothing", node, (operand,), other, frozenset(nodes), start)

    def _of_product(self, node: Node) -> Iterator[Found]:
        """The gate of `x * g(x)`, where it is smaller than `x`, and layers read the product that can take it up."""
        operands = [item for item in node.args[:2] if isinstance(item, Node)]
        for gate, other in (operands, operands[::-1]) if len(operands) == 2 else ():
            if shape_of(other) != shape_of(node) or math.prod(shape_of(gate)) >= math.prod(shape_of(other)):
                continue
            nodes = self._alone(gate, node)
            start = self._start(nodes)
            if self._weighs(nodes) and self._share([other], start) and self._absorbed(node, shape_of(gate)):
                yield Found("one", node, (gate,), other, frozenset(nodes), start)

    def _absorbed(self, node: Node, gate: tuple[int, ...]) -> bool:
        """Whether layers alone read a product, along the one dimension in which its gate varies within an image."""
        varies = {dim + len(shape_of(node)) - len(gate) for dim, size in enumerate(gate) if size > 1} - {0}
        users = [user for user in node.users if user in self.order]
        for user in users:
            if op_name(user) in IDLE and self._absorbed(user, gate):
                continue
            mixed = len(shape_of(node)) - 1 if op_name(user) == "linear" else 1
            if op_name(user) not in _LAYERS or user.args[0] is not node or varies != {mixed}:
                return False
        return bool(users)

    def _of_concatenation(self, node: Node, known: set[frozenset[Axis]]) -> Iterator[Found]:
        """The operands that can be left out of this concatenation, and of all others that read them."""
        for operand in dict.fromkeys(node.all_input_nodes):
            leaves = [frozenset(axes.leaves(dim)) for dim in self.ctx.dims_of(operand)]
            empty = next((found for found in leaves if found and vanishes(self.ctx, operand, found)), frozenset[Axis]())
            if not empty or empty in known or any(axis.frozen is not None for axis in empty):
                continue
            known.add(empty)
            found = None if any(not empty.isdisjoint(tie.axes) for tie in self.ctx.ties) else self._arm(empty)
            if found is not None:
                yield found

    def _arm(self, empty: frozenset[Axis]) -> Found | None:
        """What makes some channels, if concatenations alone read them."""
        gone = {node for node in self.order if vanishes(self.ctx, node, empty)}
        read = {(user, node) for node in gone for user in node.users if user in self.order and user not in gone}
        nodes = self._with_sources({node for node in gone if node.op == "call_function"})
        start = self._start(nodes)
        if not read or any(op_name(user) not in _JOINING for user, _ in read) or not start or not self._weighs(nodes):
            return None
        joint = min((join for join, _ in read), key=self.order.__getitem__)
        operands = sorted({node for _, node in read}, key=self.order.__getitem__)
        return Found("empty", joint, tuple(operands), None, frozenset(nodes), start, frozenset(read), empty)

    def _start(self, nodes: Collection[Node]) -> tuple[Node, ...]:
        """What some operations read that is neither theirs nor the model's."""
        read = [source for node in sorted(nodes, key=self.order.__getitem__) for source in node.all_input_nodes]
        return tuple(dict.fromkeys(node for node in read if node not in nodes and node.name not in self.state))

    def _weighs(self, nodes: Collection[Node]) -> bool:
        """Whether some operations read a parameter."""
        return any(source.name in self.state for node in nodes for source in node.all_input_nodes)

    def _share(self, left: Iterable[Node], right: Iterable[Node]) -> bool:
        """Whether some values come of an input that others come of too."""
        return any(source.name not in self.state for source in _above(left) & _above(right))

    def _alone(self, operand: Node, joint: Node) -> set[Node]:
        """The operations whose results go into an operand and nowhere else; none where the operand does."""
        if operand.op != "call_function" or {user for user in operand.users if user in self.order} != {joint}:
            return set()
        return self._with_sources({operand})

    def _with_sources(self, nodes: set[Node]) -> set[Node]:
        """Some operations, and all whose results only they read."""
        nodes, pending = set(nodes), list(nodes)
        while pending:
            for source in pending.pop().all_input_nodes:
                inside = all(user in nodes for user in source.users if user in self.order)
                if inside and source not in nodes and source.op == "call_function":
                    nodes.add(source)
                    pending.append(source)
        return nodes


def _above(nodes: Iterable[Node]) -> set[Node]:
    """Nodes and all that they are computed from."""
    found = set(nodes)
    pending = list(found)
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                pending.append(source)
    return found


class Removable:
    """The branches of a model, and what goes with any of them.

    Args:
        ctx: the algebra over the graph.
        model: the unpruned model.
        dims: the dimensions of its parameters and buffers.
        attributes: its integers that follow a width.
        groups: its groups.
        cost: its cost.

    Attributes:
        branches: every one, in the order of the sums.
    """

    def __init__(
        self, ctx: Context, model: nn.Module, dims: Mapping[str, tuple[Dim, ...]], attributes: Mapping[Place, Dim],
        groups: Sequence[Group], cost: Cost,
    ) -> None:  # fmt: skip
        self._groups, self._cost = groups, cost
        self._known: dict[frozenset[str], Removal] = {}
        widths = Draws(ctx, Widths(dims)).draw(done=0)
        self._remover = Remover(ctx, model, partial(narrower, model, dims, attributes), widths)
        found = proved(self._remover, _Finder(ctx).branches())
        removals = [NO_REMOVAL if why else self._completed(self._remover.removal([one])) for one, why in found]
        inside = [[name for group in groups for name in _tensors(group) if item.removes(name)] for item in removals]
        names = _names([one for one, _ in found], inside)
        whole = cost({})
        rivals = _rivals({name: one for name, (one, why) in zip(names, found, strict=True) if why is None})
        self.branches = tuple(
            replace(_branch(ctx.graph, name, one, why, removal, whole), rivals=rivals.get(name, ()))
            for name, (one, why), removal in zip(names, found, removals, strict=True)
        )
        self._named = {branch.name: branch for branch in self.branches}

    def removal(self, names: frozenset[str]) -> Removal:
        """What goes with the branches of these names.

        Raises:
            PlanError: a branch is unknown or frozen, or both operands of a sum would go.
        """
        if names not in self._known:
            unknown = sorted(names - self._named.keys())
            if unknown:
                raise PlanError(f"Unknown branches {unknown}; comb.branches lists the names.")
            chosen = [branch for branch in self.branches if branch.name in names]
            frozen = next((branch for branch in chosen if branch.frozen is not None), None)
            if frozen is not None:
                raise PlanError(f"{frozen.name} cannot be removed: {frozen.frozen}.")
            for branch in chosen:
                if not may_follow(branch, names):
                    others = next(rivals for rivals in branch.rivals if rivals <= names)
                    told = ", ".join(sorted({branch.name, *others}))
                    raise PlanError(f"{told} are all that one sum or concatenation has: one of them must stay.")
            found = self._remover.removal([branch.found for branch in chosen])
            self._known[names] = replace(self._completed(found), names=names)
        return self._known[names]

    def _completed(self, removal: Removal | None) -> Removal:
        """A removal with the groups that go, and the cost of what is left."""
        if removal is None:
            raise PlanError("These branches cannot be removed together; remove fewer of them.")
        groups = frozenset(
            group.name
            for group in self._groups
            if group.axis in removal.empty or all(map(removal.removes, _tensors(group)))
        )
        cost = self._cost.without(removal.gone, removal.removes, removal.empty)
        return replace(removal, groups=groups, cost=cost)


def _tensors(group: Group) -> list[str]:
    return list(dict.fromkeys(member.tensor for member in group.members))


def _branch(
    graph: OperationGraph, name: str, one: Found, why: str | None, removal: Removal, whole: CostFigures
) -> Branch:
    left = whole if removal.cost is None else removal.cost({})
    start, end = (
        tuple(graph.tensors.get(node.name, node.name) for node in nodes) for nodes in (one.start, one.operands[:1])
    )
    modules = tuple(item.module for item in removal.replacements)
    parameters, macs = whole.parameters - left.parameters, whole.macs - left.macs
    return Branch(name, start, end[0], modules, tuple(sorted(removal.groups)), parameters, macs, why, one)


def _rivals(named: Mapping[str, Found]) -> dict[str, tuple[frozenset[str], ...]]:
    """For each branch the sets of others that may not all go with it: the rest of what one operation has."""
    by_operand: dict[tuple[Node, Node], list[str]] = {}
    for name, found in named.items():
        pairs = found.left_out or {(found.joint, operand) for operand in found.operands if found.kind == "nothing"}
        for pair in pairs:
            by_operand.setdefault(pair, []).append(name)
    result = dict[str, tuple[frozenset[str], ...]]()
    for joint in dict.fromkeys(joint for joint, _ in by_operand):
        each = [by_operand.get((joint, operand), []) for operand in dict.fromkeys(joint.all_input_nodes)]
        if all(each):
            for name in (name for names in each for name in names):
                others = frozenset(names[0] for names in each if name not in names)
                result[name] = (*result.get(name, ()), others)
    return result


def _names(branches: Sequence[Found], inside: Sequence[Collection[str]]) -> list[str]:
    """A name for each branch: the module that its parameters lie in; where that holds several, the largest inside.

    Args:
        branches: the branches.
        inside: for each the parameters that go with it.
    """
    places = [
        _common([tensor.rpartition(".")[0] for tensor in tensors] or [owners(node)[0] for node in branch.nodes])
        for branch, tensors in zip(branches, inside, strict=True)
    ]
    found, taken = list[str](), Counter[str]()
    for branch, place, tensors in zip(branches, places, inside, strict=True):
        name = place
        if places.count(place) > 1 or not place:
            below = Counter(_child(tensor, place) for tensor in tensors)
            name = below.most_common(1)[0][0] if below else place or branch.operands[0].name
        taken[name] += 1
        found.append(name if taken[name] == 1 else f"{name}#{taken[name]}")
    return found


def _common(paths: Sequence[str]) -> str:
    """The path that all paths begin with."""
    parts = [path.split(".") for path in paths]
    same = takewhile(lambda names: len(set(names)) == 1, zip(*parts, strict=False))
    return ".".join(names[0] for names in same)


def _child(tensor: str, path: str) -> str:
    """The submodule of a module that a tensor lies in."""
    rest = tensor.removeprefix(f"{path}.") if path else tensor
    return f"{path}.{rest.split('.')[0]}" if path else rest.split(".")[0]
