"""Freezing: where nothing explains what a narrower copy does, the widths that it may depend on stay as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch.fx import Node

from cpd.algebra import axes
from cpd.algebra.axes import Dim
from cpd.errors import first_line
from cpd.proof.draws import Widths, open_axes
from cpd.proof.provenance import Place
from cpd.proof.replay import Observation
from cpd.rules import Context, Literal
from cpd.trace.graph import enclosing, owner, owners

#: Modules of one class frozen for one reason, after which the others of that class are frozen at once.
ALIKE = 3


@dataclass(frozen=True)
class Freezer:
    """Freezes what a failure may depend on, for a reason that names the line; more and more, until an axis is frozen.

    Attributes:
        ctx: the result of the algebra, whose axes are frozen.
        dims: the dimensions of every parameter and buffer.
        attributes: integers that follow a width, as far as they are known.
        kinds: the class of each module, by its path.
        failures: how often modules of one class were frozen for one reason.
    """

    ctx: Context
    dims: Widths
    attributes: Mapping[Place, Dim]
    kinds: Mapping[str, type]
    failures: Counter[tuple[type | None, str]] = field(default_factory=Counter)

    def freeze_literals(self, wrong: Sequence[Literal]) -> None:
        """Freeze the widths that nothing explains; where those are frozen already, ever more around them."""
        if not wrong:
            return
        before = len(open_axes(self.dims))
        for freeze in (self._freeze_width, self._freeze_attributes, self._freeze_caller):
            for item in wrong:
                freeze(item)
            if len(open_axes(self.dims)) < before:
                return
        self.freeze_module(owner(wrong[0].node), unexplained(wrong[0]), wrong[0].node)

    def _freeze_width(self, item: Literal) -> None:
        self.ctx.freeze(item.dim, item.node, unexplained(item))

    def _freeze_attributes(self, item: Literal) -> None:
        """The width cannot change, yet an attribute that follows another one names it."""
        for place, dim in self.attributes.items():
            if place.module in owners(item.node):
                self.ctx.freeze(dim, item.node, f"{place.name} also names a width that cannot change")

    def _freeze_caller(self, item: Literal) -> None:
        """The width cannot change, yet the forward computes it from another one that its module works on."""
        for node in self.ctx.graph.operations:
            if owner(node) == owner(item.node):
                self.freeze_node(node, unexplained(item), item.node)

    def freeze_node(self, node: Node, why: str, at: Node | None = None) -> None:
        """Freeze what a node gives and is given, for a reason found at some other node, or at itself."""
        for source in [node, *node.all_input_nodes]:
            for dim in self.ctx.dims_of(source):
                self.ctx.freeze(dim, at or node, why)

    def freeze_numbers(self, found: Sequence[tuple[Node, Sequence[Dim], str]]) -> None:
        """Freeze the widths that explain numbers given to nodes; if none is open, what the module of one works on."""
        before = len(open_axes(self.dims))
        for node, widths, why in found:
            for dim in widths:
                self.ctx.freeze(dim, node, why)
        if len(open_axes(self.dims)) == before:
            node, _, why = found[0]
            self.freeze_module(owner(node), why, node)

    def freeze_culprit(self, observation: Observation) -> None:
        """Freeze what the module in which a narrower copy failed works on; if nothing, the modules around it."""
        assert observation.error is not None
        self.freeze_module(observation.culprit, f"a narrower copy fails here ({first_line(observation.error)})")

    def freeze_module(self, path: str, why: str, at: Node | None = None) -> None:
        """Freeze what a module works on, for a reason found at some node; if nothing of it is open, those around it.

        After `ALIKE` modules of one class for one reason, all others of that class follow at once.
        """
        self._freeze_around(path, why, at)
        kind = self.kinds.get(path)
        self.failures[kind, why] += 1
        if self.failures[kind, why] == ALIKE:
            for other, its in self.kinds.items():
                if its is kind and other != path:
                    self._freeze_own(other, f"{why}, as in {path}", None)

    def freeze_blocks(self, path: str, why: str) -> None:
        """Freeze all that a block such as `blocks.3` works on, and others of its class; if none of it is open, all.

        Args:
            path: of a module in the block.
            why: the reason.
        """
        before = len(open_axes(self.dims))
        names = path.split(".")
        block = ".".join(names[: 2 if len(names) > 1 and names[1].isdigit() else 1])
        alike = {other for other, kind in self.kinds.items() if kind is self.kinds.get(block)}
        for blocks in (alike, {""}):
            for node in self.ctx.graph.operations:
                if "" in blocks or not blocks.isdisjoint(owners(node)):
                    self.freeze_node(node, why)
            if len(open_axes(self.dims)) < before:
                return

    def _freeze_around(self, path: str, why: str, at: Node | None) -> None:
        before = len(open_axes(self.dims))
        for around in enclosing(path):
            self._freeze_own(around, why, at)
            if len(open_axes(self.dims)) < before:
                return

    def _freeze_own(self, path: str, why: str, at: Node | None) -> None:
        """Freeze what one module works on itself."""
        nodes = [node for node in self.ctx.graph.operations if path in (owner(node), "")]
        for node in nodes:
            self.freeze_node(node, why, at)
        for name, shape in self.dims.items() if not nodes else ():  # its methods were called, not its forward
            if name.startswith(f"{path}."):
                for dim in shape:
                    axes.freeze(dim, f"{why} [{path}]")


def unexplained(item: Literal) -> str:
    """Why a width is frozen that the forward names."""
    return f"the forward names the width {item.dim.size}, and no attribute or other width explains it"
