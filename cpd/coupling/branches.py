"""Branches: what lies between a value and a sum that it is added to, and can go as a whole.

In `y = x + f(x)`, `f` is a branch: all operations whose results go into one operand of the sum and nowhere else.
Without it that operand is zero and `y` is `x`. Branches are found from the graph alone, whatever modules make them:
residual blocks, attention and MLP of a transformer, the path beside a projection.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile

from torch import nn
from torch.fx import Node

from cpd.algebra.axes import Dim
from cpd.coupling.cost import Cost, CostFigures
from cpd.coupling.exactness import live_nodes
from cpd.coupling.groups import Group
from cpd.coupling.removal import NO_REMOVAL, Found, Removal, Remover, proved
from cpd.errors import PlanError
from cpd.proof.copies import narrower
from cpd.proof.draws import Draws, Widths
from cpd.proof.provenance import Place
from cpd.rules import Context
from cpd.trace.graph import OperationGraph, op_name, owners, shape_of

_ADDING = {"add", "add_"}


@dataclass(frozen=True)
class Branch:
    """Operations that can be removed together: those that alone make up one operand of a sum.

    Attributes:
        name: the module that they are in, with a number where it holds several.
        start: the operations that it reads, by their nodes in `Comb.graph`.
        end: the operation that gives the operand.
        modules: the largest modules that go with it.
        groups: the groups of channels that lie in it alone.
        parameters: how many go with it.
        macs: multiply-accumulates of the example inputs that go with it.
        frozen: None if it can be removed, else the reason why not.
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


def find_branches(ctx: Context) -> Iterator[Found]:
    """Every branch of a graph, in the order of the sums."""
    graph = ctx.graph
    live = live_nodes(graph)
    order = {node: index for index, node in enumerate(graph.nodes) if node in live}
    state = {*graph.tensors, *graph.constants}
    for node in graph.operations:
        if node not in live:
            continue
        operands = [item for item in node.args[:2] if isinstance(item, Node) and shape_of(item) == shape_of(node)]
        if op_name(node) not in _ADDING or node.kwargs.get("alpha", 1) != 1 or len(operands) != 2:
            continue
        for operand, other in (operands, operands[::-1]):
            nodes = _alone(operand, node, order)
            start = tuple(dict.fromkeys(
                source for inner in sorted(nodes, key=order.__getitem__) for source in inner.all_input_nodes
                if source not in nodes and source.name not in state
            ))  # fmt: skip
            if op_name(operand) in _ADDING and any(source in start for source in operand.all_input_nodes):
                continue  # the value itself, with another branch added
            weighs = any(source.name in state for inner in nodes for source in inner.all_input_nodes)
            if weighs and any(source.name not in state for source in _above([other]) & _above(start)):
                yield Found(node, operand, other, frozenset(nodes), start)


def _alone(operand: Node, summed: Node, order: Mapping[Node, int]) -> set[Node]:
    """The operations whose results go into an operand of a sum and nowhere else; none where the operand does.

    Args:
        operand: the operand.
        summed: the sum.
        order: the places of the nodes whose results matter.
    """
    if operand.op != "call_function" or {user for user in operand.users if user in order} != {summed}:
        return set()
    nodes, pending = {operand}, [operand]
    while pending:
        for source in pending.pop().all_input_nodes:
            inside = all(user in nodes for user in source.users if user in order)
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
        self._remover = Remover(ctx, model, narrower(model, dims, attributes, widths), widths)
        found = proved(self._remover, find_branches(ctx))
        removals = [NO_REMOVAL if why else self._completed(self._remover.removal([one])) for one, why in found]
        inside = [[name for group in groups for name in _tensors(group) if item.removes(name)] for item in removals]
        names = _names([one for one, _ in found], inside)
        whole = cost({})
        self.branches = tuple(
            _branch(ctx.graph, name, one, why, removal, whole)
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
            sums = dict[Node, str]()
            for branch in chosen:
                other = sums.setdefault(branch.found.sum, branch.name)
                if other != branch.name:
                    raise PlanError(f"{other} and {branch.name} are both operands of one sum: one of them must stay.")
            found = self._remover.removal([branch.found for branch in chosen])
            self._known[names] = replace(self._completed(found), names=names)
        return self._known[names]

    def _completed(self, removal: Removal | None) -> Removal:
        """A removal with the groups that go, and the cost of what is left."""
        if removal is None:
            raise PlanError("These branches cannot be removed together; remove fewer of them.")
        groups = frozenset(group.name for group in self._groups if all(map(removal.removes, _tensors(group))))
        return replace(removal, groups=groups, cost=self._cost.without(removal.gone, removal.removes))


def _tensors(group: Group) -> list[str]:
    return list(dict.fromkeys(member.tensor for member in group.members))


def _branch(
    graph: OperationGraph, name: str, one: Found, why: str | None, removal: Removal, whole: CostFigures
) -> Branch:
    left = whole if removal.cost is None else removal.cost({})
    start, end = (
        tuple(graph.tensors.get(node.name, node.name) for node in nodes) for nodes in (one.start, [one.operand])
    )
    modules = tuple(item.module for item in removal.replacements)
    parameters, macs = whole.parameters - left.parameters, whole.macs - left.macs
    return Branch(name, start, end[0], modules, tuple(sorted(removal.groups)), parameters, macs, why, one)


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
            name = below.most_common(1)[0][0] if below else place or branch.operand.name
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
