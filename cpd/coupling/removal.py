"""Removal: what goes when some branches do, and which modules are replaced.

The user's forward stays as it is. Where a whole module gives its input then, `torch.nn.Identity` takes its place. Else
the modules of the branch are replaced by ones that give nothing (`cpd.model.removed`). A copy without the branches is
traced, and must do what is predicted; a branch with which it does not stays.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from cpd.algebra import axes
from cpd.algebra.axes import Axis
from cpd.coupling.cost import Cost
from cpd.coupling.exactness import READS, ZERO_PRESERVING, gives_zero, live_nodes, memory_of, shares
from cpd.model.inputs import evaluating
from cpd.model.removed import put_in_place, replacement
from cpd.model.state import preserved
from cpd.plan import Replacement, removes
from cpd.proof.copies import mismatch
from cpd.proof.draws import Counts
from cpd.rules import Context, arguments
from cpd.rules.base import find, tensor_inputs
from cpd.rules.pointwise import pointwise
from cpd.trace.graph import IDLE, OperationGraph, op_name, owners, shape_of
from cpd.trace.tracer import retrace_operations
from cpd.trace.values import answering

#: Ops whose results lie where all that they are given lies: what was at least 0 still is.
_PASSING = {
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_max_pool2d", "clone", "contiguous", "view", "reshape", "flatten", "permute",
    "transpose", "cat", "slice", "select", "unsqueeze", "squeeze", "alias", "detach",
}  # fmt: skip
#: Functions that change nothing of what they gave themselves.
_IDEMPOTENT = {"relu", "hardtanh", "relu6", "clamp"}
#: Ops whose results are at least 0.
_POSITIVE = {"relu", "relu6", "sigmoid", "softmax", "abs", "exp", "square", "softplus", "hardsigmoid"}
NO_MODULE = "no module gives this operand and nothing else"
#: Copies that are traced at most to tell which branches can go.
MOST_COPIES = 64


@dataclass(frozen=True, eq=False)
class Found:
    """A branch in the graph.

    Attributes:
        kind: what it gives is left out of a sum ("nothing"), of concatenations ("empty") or of a product ("one").
        joint: that operation; of several concatenations the first.
        operands: what it gives to that: one value, or, to concatenations, one or more.
        other: the other operand of a sum or product.
        nodes: the operations of the branch.
        start: the nodes that it reads.
        left_out: concatenations, each with the operand that is left out of it.
        empty: the axes of which no position is left then.
    """

    kind: Literal["nothing", "empty", "one"]
    joint: Node
    operands: tuple[Node, ...]
    other: Node | None
    nodes: frozenset[Node]
    start: tuple[Node, ...]
    left_out: frozenset[tuple[Node, Node]] = frozenset()
    empty: frozenset[Axis] = frozenset()


@dataclass(frozen=True, eq=False)
class Removal:
    """What goes when some branches do.

    Attributes:
        names: of the branches.
        instead: each sum that is passed over -> the operand that is left.
        gone: every operation that is not there any more, the sums included.
        empty: the axes of which no position is left, while others are concatenated with them.
        replacements: the modules to be replaced.
        groups: names of the groups that go.
        cost: of what is left; None where nothing goes.
    """

    names: frozenset[str] = frozenset()
    instead: Mapping[Node, Node] = field(default_factory=dict)
    gone: frozenset[Node] = frozenset()
    empty: frozenset[Axis] = frozenset()
    replacements: tuple[Replacement, ...] = ()
    groups: frozenset[str] = frozenset()
    cost: Cost | None = None

    def removes(self, name: str) -> bool:
        """Whether a module, parameter or buffer goes with the module that it lies in."""
        return removes(self.replacements, name)


NO_REMOVAL = Removal()


class Remover:
    """Tells what goes, and which modules are replaced, when some branches do.

    Args:
        ctx: the algebra over the graph.
        model: the unpruned model; left as it was.
        narrow: gives a copy of it at other widths, without values.
        widths: those at which a removal is tried.
    """

    def __init__(self, ctx: Context, model: nn.Module, narrow: Callable[[Counts], nn.Module], widths: Counts) -> None:
        self.ctx, self.graph, self.narrow, self.widths = ctx, ctx.graph, narrow, widths
        self.calls = _calls(model, self.graph)
        self.inside: dict[str, list[Node]] = {}
        for node in self.graph.operations:
            for path in dict.fromkeys(owners(node)):
                self.inside.setdefault(path, []).append(node)

    def hindrance(self, branch: Found) -> str | None:
        """Why a branch cannot be removed, as far as the graph tells."""
        for node in branch.nodes:
            if any(changed for _, changed in shares(node)) and memory_of(node) not in branch.nodes:
                return self.ctx.reason(node, "it writes to a tensor that others read")
        found = self.removal([branch])
        if found is None:
            return self.ctx.reason(branch.operands[0], NO_MODULE)
        beside = next((name for name in self._along(branch.empty) if not found.removes(name)), None)
        if beside is not None:
            return self.ctx.reason(branch.operands[0], f"{beside} lies beside the modules of this branch")
        return None

    def _along(self, empty: Collection[Axis]) -> list[str]:
        """The parameters and buffers of which nothing is left without some axes."""
        nodes = [node for node in self.graph.nodes if empty and node.name in self.graph.tensors]
        return [self.graph.tensors[node.name] for node in nodes if vanishes(self.ctx, node, empty)]

    def removal(self, branches: Iterable[Found]) -> Removal | None:
        """What goes with some branches; None where no modules can be replaced for it."""
        branches = list(branches)
        instead = {branch.joint: branch.other for branch in branches if branch.other is not None}
        apart = {node for branch in branches for node in branch.nodes}
        left_out = frozenset(pair for branch in branches for pair in branch.left_out)
        live = live_nodes(self.graph, instead, apart, left_out)
        joins = {join for join, _ in left_out if join in live}
        if any(all((join, source) in left_out for source in join.all_input_nodes) for join in joins):
            return None
        whole = dict[str, Node]()
        for path in dict.fromkeys(path for node in instead if node in live for path in owners(node)):
            if path and not any(inner.startswith(f"{path}.") for inner in whole):
                passes = self._passes(path, instead, apart, left_out)
                if passes is not None:
                    instead, whole = {**instead, **passes}, {**whole, path: next(iter(passes))}
                    live = live_nodes(self.graph, instead, apart, left_out)
        gone = {node for node in self.graph.operations if node not in live}
        passed = {node for node in instead if node in live}
        dead = {path for path, nodes in self.inside.items() if path and _goes(nodes, gone)} - whole.keys()
        ends, zero, left = dict[str, tuple[Found, bool]](), _Known(self._ends), _Known(self._sources)
        for branch in branches:
            if any(branch.joint in self.inside[path] for path in whole):
                continue
            joints = {branch.joint} | {join for join, _ in branch.left_out}
            for operand in branch.operands if joints & live else ():
                found = (zero if branch.kind == "nothing" else left)(operand, dead)
                if found is None or any(path in ends and ends[path][0].kind != branch.kind for path in found):
                    return None
                copied = branch.other is not None and _written(branch.joint)
                ends |= {path: (branch, copied or (path in ends and ends[path][1])) for path in found}
        replacements = [Replacement(path, "identity") for path in whole]
        for path in sorted(dead, key=lambda path: (path.count("."), path)):
            if not self.calls.get(path) or any(path.startswith(f"{item.module}.") for item in replacements):
                continue
            if any(end.startswith(f"{path}.") for end in ends):
                continue
            shaped = self.calls[path].keeps and self._keeps_widths(path)
            kind, copied = (ends[path][0].kind, ends[path][1]) if path in ends else ("nothing", False)
            replacements.append(Replacement(path, kind, copied, shaped, self.calls[path].outputs))
        empty = frozenset(axis for branch in branches for axis in branch.empty)
        return Removal(frozenset(), instead, frozenset(gone | passed), empty, tuple(replacements))

    def _keeps_widths(self, path: str) -> bool:
        """Whether what a module gives is as wide as what it is given of the same shape, at all widths."""
        nodes = self.inside[path]
        out = next((node for node in nodes if not set(nodes).issuperset(node.users)), nodes[-1])
        given = {source for node in nodes for source in node.all_input_nodes if source.name not in self.graph.tensors}
        alike = [source for source in given.difference(nodes) if shape_of(source) == shape_of(out)]
        return all(self.ctx.dims_of(source) == self.ctx.dims_of(out) for source in alike)

    def _passes(
        self, path: str, instead: Mapping[Node, Node], apart: Collection[Node], left_out: Collection[tuple[Node, Node]]
    ) -> dict[Node, Node] | None:
        """What to read in the place of a module's results where it gives what it was given; None where it does not."""
        nodes, passed, roots = set(self.inside[path]), dict[Node, Node](), set[Node]()
        for out in self.inside[path]:
            if nodes.issuperset(out.users):
                continue
            if _written(out):
                return None
            node = out
            while node in nodes:
                below = instead.get(node) or self._unchanged(node, instead)
                if below is None:
                    return None
                passed[node] = node = below
            roots.add(node)
        call = self.calls.get(path, NEVER)
        if len(roots) != 1 or (call.times, call.args, call.kwargs, call.outputs) != (1, 1, 0, None):
            return None
        live = live_nodes(self.graph, {**instead, **passed}, apart, left_out)
        return passed if live.isdisjoint(nodes - passed.keys()) else None

    def _unchanged(self, node: Node, instead: Mapping[Node, Node]) -> Node | None:
        """The operand of an op that changes nothing of it, as relu does not of what relu has given."""
        if op_name(node).removesuffix("_") not in _IDEMPOTENT or not isinstance(node.args[0], Node):
            return None
        return node.args[0] if _within(node.args[0], node, instead) else None

    def _sources(self, node: Node, dead: Collection[str], known: _Known) -> set[str] | None:
        """The modules that all of a value comes from, if all of them go."""
        path = self._outermost(node, dead)
        if path is not None:
            return {path}
        sources = [source for source in tensor_inputs(node) if source.name not in self.graph.tensors]
        each = [known(source, dead) for source in sources if node.op == "call_function"]
        return None if not each or any(item is None for item in each) else set().union(*(item or () for item in each))

    def _outermost(self, node: Node, dead: Collection[str]) -> str | None:
        """The largest module that goes which a node is called in."""
        paths = owners(node) if node.op == "call_function" else []
        return next((path for path in reversed(paths) if path in dead and self.calls.get(path)), None)

    def _ends(self, node: Node, dead: Collection[str], known: _Known) -> set[str] | None:
        """The modules that make a value zero once they give nothing; None where there are none."""
        if node.op != "call_function":
            return None
        path = self._outermost(node, dead)
        if path is not None:
            return {path}
        name, sources = op_name(node).removesuffix("_"), tensor_inputs(node)
        if find(node) is pointwise:
            found = {source: known(source, dead) for source in sources}
            removed = [source for source in sources if found[source] is not None]
            for some in (*([source] for source in removed), removed):
                if some and gives_zero(node, frozenset(some)):
                    return set().union(*(found[source] or () for source in some))
        elif name in ZERO_PRESERVING and arguments(node).get("value") in (None, 0):
            each = [known(source, dead) for source in (sources[:1] if name in READS else node.all_input_nodes)]
            if each and all(item is not None for item in each):
                return set().union(*(item or () for item in each))
        return None


class _Known:
    """A question that is asked once of each node: the paths back from one may be too many to walk.

    Args:
        ask: what answers it, given the node, the modules that go, and this.
    """

    def __init__(self, ask: Callable[[Node, Collection[str], _Known], set[str] | None]) -> None:
        self.ask, self.answers = ask, dict[Node, set[str] | None]()

    def __call__(self, node: Node, dead: Collection[str]) -> set[str] | None:
        if node not in self.answers:
            self.answers[node] = self.ask(node, dead, self)
        return self.answers[node]


def vanishes(ctx: Context, node: Node, empty: Collection[Axis]) -> bool:
    """Whether nothing is left of a node's tensor, or of one of them, without some axes."""
    counts = dict.fromkeys(empty, 0)
    return any(dim.size and not axes.count(dim, counts) for dim in ctx.dims_of(node))


@dataclass(frozen=True)
class Called:
    """How a module is called.

    Attributes:
        times: how often in a forward.
        args: arguments by position.
        kwargs: arguments by name.
        outputs: how many it returns in a tuple; None where it is none.
        keeps: whether what it gives, or the first of it, has the shape of the first tensor that it is given.
    """

    times: int
    args: int
    kwargs: int
    outputs: int | None
    keeps: bool


NEVER = Called(0, 0, 0, None, False)


@torch.no_grad()
def _calls(model: nn.Module, graph: OperationGraph) -> dict[str, Called]:
    """How each module is called in one forward."""
    found: dict[str, Called] = {}

    def note(path: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = found.get(path, Called(0, 0, 0, None, True))
        first, given = (next(filter(torch.is_tensor, tree_leaves(item)), None) for item in (output, (args, kwargs)))
        keeps = before.keeps and first is not None and given is not None and first.shape == given.shape
        outputs = len(output) if type(output) is tuple else None
        found[path] = Called(before.times + 1, len(args), len(kwargs), outputs, keeps)

    handles = [
        module.register_forward_hook(
            lambda _, args, kwargs, output, path=path: note(path, args, kwargs, output), with_kwargs=True
        )
        for path, module in model.named_modules()
    ]
    try:
        with preserved(model), evaluating(model), answering(graph.answers):
            graph.call.on(graph.runner(model))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _goes(nodes: Iterable[Node], gone: Collection[Node]) -> bool:
    """Whether all that computes something goes."""
    working = [node for node in nodes if op_name(node) not in IDLE]
    return bool(working) and all(node in gone for node in working)


def _written(node: Node) -> bool:
    """Whether something is written to a node's result later."""
    for user in node.users:
        for source, changed in shares(user):
            if source is node and (changed or _written(user)):
                return True
    return False


def _within(node: Node, function: Node, instead: Mapping[Node, Node]) -> bool:
    """Whether a value lies where an idempotent function changes nothing."""
    if node in instead:
        return _within(instead[node], function, instead)
    name, wanted = (op_name(item).removesuffix("_") for item in (node, function))
    if name == wanted and node.args[1:] == function.args[1:] and node.kwargs == function.kwargs:
        return True
    if wanted == "relu" and (name in _POSITIVE or (name == "hardtanh" and node.args[1:2] == (0.0,))):
        return True
    if name in _PASSING or (name == "add" and wanted == "relu" and len(tensor_inputs(node)) == 2):
        return all(_within(source, function, instead) for source in tensor_inputs(node))
    return False


# ---------------------------------------------------------------------------------- proof


def proved(remover: Remover, branches: Iterable[Found]) -> list[tuple[Found, str | None]]:
    """Every branch of a model with the reason why it cannot be removed, if it cannot; tried on copies.

    Of each sum one branch at most is removed at a time, and of each module, and none that lies within another; then of
    all modules at once.
    """
    reasons = {branch: remover.hindrance(branch) for branch in branches}
    rounds: list[dict[str, Found]] = []
    together = dict[Node, Found]()
    for branch in (branch for branch, reason in reasons.items() if reason is None):
        together.setdefault(branch.joint, branch)
        around = owners(branch.joint)[0]
        free = next((some for some in rounds if around not in some and not _nested(branch, some.values())), None)
        if free is None:
            rounds.append(free := {})
        free[around] = branch
    left = MOST_COPIES
    pending: list[list[Found]] = [*(list(some.values()) for some in rounds), list(together.values())]
    while pending:
        some = [branch for branch in pending.pop(0) if reasons[branch] is None]
        if not some:
            continue
        left -= 1
        wrong = _differs(remover, some) if left >= 0 else "not proved within the copies that are tried"
        if wrong is None:
            continue
        if len(some) == 1 or left < 0:
            reasons |= {branch: remover.ctx.reason(branch.joint, wrong) for branch in some}
        else:
            middle = len(some) // 2
            pending[:0] = [some[:middle], some[middle:]]
    return list(reasons.items())


def _nested(branch: Found, others: Iterable[Found]) -> bool:
    """Whether a branch lies within one of some others, or one of those within it: with the outer the inner goes too."""
    return any(branch.joint in other.nodes or other.joint in branch.nodes for other in others)


def _differs(remover: Remover, branches: Sequence[Found]) -> str | None:
    """What a copy without some branches does otherwise than predicted; None where it does what is predicted."""
    removal = remover.removal(branches)
    if removal is None:
        return NO_MODULE
    widths = {**remover.widths, **dict.fromkeys(removal.empty, 0)}
    copy = remover.narrow(widths)
    put_in_place(copy, {item.module: replacement(item) for item in removal.replacements})
    again = retrace_operations(copy, remover.graph)
    if again is None:
        return "the forward fails without this branch"
    if mismatch(remover.ctx, again, widths, removal.gone) is not None:
        return "the forward does something else without this branch"
    return None
