"""Integers that equal a width and that the forward does not ask for: another method may read them (an exporter, say).

Nothing that a forward does tells what such an integer is for, so it follows a width only on evidence:

- the module itself cuts that width out (`chunk`, `view`), or modules of its class keep an integer of that name at
  several widths, each the width there;
- no other dimension that the module sees is as large, but for those that always keep equally many positions;
- a narrower copy in which it follows calls exactly what one calls in which it does not.

All others are left alone, and noted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
from torch import nn
from torch.fx import Node

from cpd.algebra import axes
from cpd.algebra.axes import Dim
from cpd.errors import let_through
from cpd.proof.candidates import Candidates, parts_of
from cpd.proof.constants import tensors_in_sight
from cpd.proof.dispatch import Dispatch, calls_of_model
from cpd.proof.draws import Counts
from cpd.proof.provenance import Place
from cpd.trace.graph import op_name, owner

#: Smaller integers are kernels, strides and numbers of layers more often than widths.
LEAST = 8
#: Copies tried at most to tell the integers that may follow from those that the forward reads for something else.
MAX_TRIALS = 16
#: Ops that cut a width out, as the forward could by naming it.
CUTS = {
    "chunk", "split", "split_with_sizes", "unsafe_split", "slice", "narrow", "view", "reshape", "_unsafe_view",
    "unflatten",
}  # fmt: skip


@dataclass
class Unread:
    """Tells which of the integers that equal a width follow it.

    Attributes:
        candidates: the integers that modules keep, and the copies to try them on.
    """

    candidates: Candidates

    def following(self) -> dict[Place, Dim]:
        """The integers that follow a width, as far as can be told without a copy in which they do."""
        found = {}
        for place, (cut, seen) in self.equal.items():
            dim = self._only_one(cut or seen)
            if dim is not None and (cut or self._at_several_widths(place)):
                found[place] = dim
        return found

    def left_alone(self) -> dict[Place, tuple[Dim, ...]]:
        """The integers that equal a width and follow none, each with the widths that it equals."""
        attributes = self.candidates.copies.attributes
        return {
            place: tuple(dim for dim in [*cut, *seen] if axes.is_open(dim))
            for place, (cut, seen) in self.equal.items()
            if place not in attributes
        }

    @cached_property
    def equal(self) -> dict[Place, tuple[list[Dim], list[Dim]]]:
        """Each integer with the dimensions of its size that its module cuts out, and those that it sees."""
        copies = self.candidates.copies
        cuts: dict[str, list[Node]] = defaultdict(list)
        for node in copies.ctx.graph.operations:
            if op_name(node) in CUTS:
                cuts[owner(node)].append(node)
        found = {}
        for path, module in copies.model.named_modules():
            kept = [
                (place, value)
                for place, value in self.candidates.kept(path)
                if value >= LEAST and "." not in place.name and place not in copies.attributes
            ]
            if not kept or _is_of_torch(module):
                continue
            cut, seen = self._dims_of(cuts[path]), self._dims_of(tensors_in_sight(copies.ctx, path))
            for place, value in kept:
                both = tuple([dim for dim in dims if dim.size == value] for dims in (cut, seen))
                if any(axes.is_open(dim) for dim in both[1]):
                    found[place] = (both[0], both[1])
        return found

    def _dims_of(self, nodes: Iterable[Node]) -> list[Dim]:
        """The dimensions of what some nodes give, and their parts."""
        whole = (dim for node in nodes for dim in self.candidates.copies.ctx.dims_of(node))
        return list(dict.fromkeys(part for dim in dict.fromkeys(whole) for part in parts_of(dim)))

    def _only_one(self, dims: list[Dim]) -> Dim | None:
        """The first of some dimensions, where all can shrink and always keep equally many positions."""
        if not dims or not all(map(axes.is_open, dims)):
            return None
        graph: nx.Graph = nx.Graph()
        graph.add_nodes_from(dims)
        for tie in self.candidates.copies.ctx.ties:
            if tie.slack == 0:
                graph.add_edge(axes.resolve(tie.left), axes.resolve(tie.right))
        return dims[0] if set(dims) <= nx.node_connected_component(graph, dims[0]) else None

    def _at_several_widths(self, place: Place) -> bool:
        """Whether each module of a class keeps an integer of this name that equals a width, at several values."""
        model = self.candidates.copies.model
        kind = type(model.get_submodule(place.module))
        alike = [path for path, module in model.named_modules() if type(module) is kind]
        values = {value for path in alike for other, value in self.candidates.kept(path) if other.name == place.name}
        return len(values) > 1 and all(Place(path, place.name) in self.equal for path in alike)

    def harmless(self, follow: dict[Place, Dim], counts: Counts) -> dict[Place, Dim]:
        """Those of some integers with which a narrower copy calls what it calls without them; in halves if need be.

        Args:
            follow: the integers and what they are to follow.
            counts: the widths of the copy.
        """
        copies = self.candidates.copies
        found: dict[Place, Dim] = {}

        def calls(extra: Mapping[Place, Dim]) -> list[Dispatch] | None:
            try:
                return calls_of_model(copies.narrow(counts, extra, meta=True), copies.ctx)
            except Exception as error:  # the user's forward may raise anything, and not all of them run without values
                let_through(error)
                return None

        plain, pending = calls({}) if follow else None, [follow]
        for _ in range(MAX_TRIALS):
            if plain is None or not pending:
                break
            some = pending.pop()
            if calls(some) == plain:
                found.update(some)
            elif len(some) > 1:
                items = list(some.items())
                pending += [dict(items[: len(items) // 2]), dict(items[len(items) // 2 :])]
        return found


def _is_of_torch(module: nn.Module) -> bool:
    """Whether a module is one of torch's layers, or of a class made from one: those widths are brought in line."""
    plain = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return any(base.__module__.startswith("torch.nn.") for base in type(module).__mro__ if base not in plain)
