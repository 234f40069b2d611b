"""Copies: narrower copies of a model, without values: run alone, or compared with the prediction op by op."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn
from torch.fx import Node

from cpd.algebra import axes
from cpd.algebra.axes import Dim
from cpd.errors import CPDError
from cpd.model import kept
from cpd.model.skeleton import set_attributes, skeleton
from cpd.plan import Attribute
from cpd.proof.constants import Constants, Number, scalars
from cpd.proof.dispatch import behaves_as_predicted
from cpd.proof.draws import Counts, Widths
from cpd.proof.freezing import Freezer
from cpd.proof.provenance import Place, trace_integers
from cpd.proof.replay import Observation, culprit, replay
from cpd.rules import Context, Literal, arguments
from cpd.trace.graph import OperationGraph, op_name, owner, pair, shape_of
from cpd.trace.quiet import garbage_collection_paused
from cpd.trace.tracer import retrace, retrace_operations


class BudgetSpent(Exception):
    """As many copies have been tried, or as much time has passed, as the proof was given."""


@dataclass
class Budget:
    """How many copies a proof may try, and how long.

    Attributes:
        copies: narrower copies.
        seconds: from the start of the proof; None: any number.
        made: copies tried so far.
        start: when the proof began, by `time.perf_counter`.
    """

    copies: int
    seconds: float | None = None
    made: int = 0
    start: float = field(default_factory=time.perf_counter)

    def spend(self) -> None:
        """Note one more copy.

        Raises:
            BudgetSpent: if there have been too many, or too much time has passed.
        """
        self.made += 1
        if self.made > self.copies:
            raise BudgetSpent(f"{self.copies} narrower copies")
        if self.seconds is not None and time.perf_counter() - self.start > self.seconds:
            raise BudgetSpent(f"{self.seconds:g} seconds")

    def reserve(self, copies: int) -> None:
        """Allow some more copies, whatever time they take."""
        self.copies, self.seconds = self.made + copies, None


@dataclass
class Copies:
    """Makes narrower copies of a model, and observes what they do.

    Attributes:
        model: the unpruned model; never changed.
        ctx: the result of the algebra.
        dims: the dimensions of every parameter and buffer.
        attributes: integers that follow a width; every copy has them set.
        constants: the numbers of the copies that were compared.
        freezer: freezes what differs from the prediction in a copy that was compared, and cannot be repaired.
        budget: how many copies may be tried, and how long.
        tentative: integers that may follow a width too; given up where a copy does not call what is predicted.
        confirmed: whether a copy in which those follow has called what is predicted.
    """

    model: nn.Module
    ctx: Context
    dims: Widths
    attributes: dict[Place, Dim]
    constants: Constants
    freezer: Freezer
    budget: Budget
    tentative: Mapping[Place, Dim] = field(default_factory=dict)
    confirmed: bool = False

    @cached_property
    def places(self) -> dict[Literal, frozenset[Place]]:
        """For each literal, where the integers are kept that it is computed from, as far as can be followed."""
        traced = skeleton(self.model, {}, meta=True)
        trace_integers(traced)
        return replay(self.ctx, traced, {}, meta=True).places

    @cached_property
    def runs_on_meta(self) -> bool:
        """Whether the unpruned model runs on the meta device, so that a failure there is one of other widths."""
        return replay(self.ctx, skeleton(self.model, {}, meta=True), {}, meta=True).error is None

    def narrow(self, counts: Counts, extra: Mapping[Place, Dim] | None = None, *, meta: bool = False) -> nn.Module:
        """A copy of the model with these widths, its attributes and some extra ones set, without values."""
        return narrower(self.model, self.dims, {**self.attributes, **(extra or {})}, counts, meta=meta)

    def observe(
        self, counts: Counts, extra: Mapping[Place, Dim] | None = None, *, compare: bool = False
    ) -> Observation:
        """Run a narrower copy, or compare it with the prediction.

        Args:
            counts: the width of each axis.
            extra: integers that follow a width for this copy alone.
            compare: whether to compare it: every op that it calls, beyond the widths that its forward asks for.
        """
        return self.compare(counts, extra) if compare else self.replay(counts, extra)

    def replay(self, counts: Counts, extra: Mapping[Place, Dim] | None = None) -> Observation:
        """Run a narrower copy on the meta device; where nothing runs there, with fake tensors, which keep theirs.

        Raises:
            BudgetSpent: if no further copy may be tried.
        """
        self.budget.spend()
        observation = replay(self.ctx, self.narrow(counts, extra, meta=True), counts, meta=True)
        if observation.error is not None and not self.runs_on_meta:
            observation = replay(self.ctx, self.narrow(counts, extra), counts)
        return observation

    def compare(self, counts: Counts, extra: Mapping[Place, Dim] | None = None) -> Observation:
        """Compare a narrower copy with the prediction: what both call, or, where that differs, an export of it.

        Raises:
            BudgetSpent: if no further copy may be tried.
        """
        self.budget.spend()
        observation = Observation(counts, compared=True)
        if not self.constants.named() and self._calls_as_predicted(counts, extra or {}):
            return observation
        model = self.narrow(counts, extra)
        graph = retrace_operations(model, self.ctx.graph)
        twins, odd = pair(self.ctx.graph, graph) if graph is not None else ({}, None)
        if graph is None or odd is not None:
            try:
                graph = retrace(model, self.ctx.graph)
            except CPDError as error:
                observation.error = error
                observation.culprit = culprit(model, error.__cause__ or error)
                return observation
            twins, odd = pair(self.ctx.graph, graph)
        if odd is not None:
            observation.culprit = owner(odd)
            observation.error = CPDError(f"at {odd.name} the forward calls another operation at another width")
            return observation
        self._compare_literals(twins, observation)
        if not observation.wrong():
            self._compare_shapes(twins, observation)
        if observation.as_predicted():
            self._compare_constants(twins, graph, observation)
        return observation

    def _calls_as_predicted(self, counts: Counts, extra: Mapping[Place, Dim]) -> bool:
        """Whether a copy calls what is predicted, with the tentative integers or, where it does not, without them."""
        if self.tentative:
            narrow = self.narrow(counts, {**self.tentative, **extra}, meta=True)
            self.confirmed = behaves_as_predicted(narrow, self.ctx, counts)
            if self.confirmed:
                return True
            self.tentative = {}
        return behaves_as_predicted(self.narrow(counts, extra, meta=True), self.ctx, counts)

    def _compare_literals(self, twins: Mapping[Node, Node], observation: Observation) -> None:
        """Note the integer that the copy passes for each literal."""
        for item in self.ctx.literals:
            value = arguments(twins[item.node])[item.argument]
            observation.asked[item] = int(value[item.index] if isinstance(value, (list, tuple)) else value)

    def _compare_shapes(self, twins: Mapping[Node, Node], observation: Observation) -> None:
        """Freeze each op whose result has another shape than predicted, unless what it is given has so too."""
        differing: set[Node] = set()
        for node, twin in twins.items():
            value = self.ctx.values.get(node)
            if not isinstance(value, tuple) or not isinstance(node.meta.get("val"), Tensor):
                continue
            if tuple(axes.count(dim, observation.counts) for dim in value) == shape_of(twin):
                continue
            if differing.isdisjoint(node.all_input_nodes):
                why = f"is {list(shape_of(twin))} in a narrower copy, against the prediction"
                self.freezer.freeze_node(node, why)
                observation.error = CPDError(f"{node.name} {why}")
            differing.add(node)

    def _compare_constants(self, twins: Mapping[Node, Node], graph: OperationGraph, observation: Observation) -> None:
        """A number that changed with a width is compensated if one formula explains it in every copy, else frozen."""
        literals = {(item.node, item.argument) for item in self.ctx.literals}
        numbers: dict[Number, tuple[float, float]] = {
            (node, name): (before, after)
            for node, twin in twins.items()
            for name, before, after in scalars(node, self.ctx.graph, twin, graph)
            if (node, name) not in literals and not self._at_the_end(node, name, before, after, observation.counts)
        }
        found = [
            (node, widths, f"the number {numbers[node, name][0]} depends on this width")
            for (node, name), widths in self.constants.note(observation.counts, numbers).items()
        ]
        if found:
            self.freezer.freeze_numbers(found)
            observation.error = CPDError(f"{found[0][0].name}: {found[0][2]}")

    def _at_the_end(self, node: Node, name: str, before: float, after: float, counts: Counts) -> bool:
        """Whether a bound of a slice is the end of its dimension, or beyond, in the model and in a narrower copy."""
        if op_name(node) != "slice" or name not in ("start", "end"):
            return False
        dim = self.ctx.shape(node.all_input_nodes[0])[arguments(node)["dim"]]
        return before >= dim.size and after >= axes.count(dim, counts)


def narrower(
    model: nn.Module, dims: Mapping[str, tuple[Dim, ...]], attributes: Mapping[Place, Dim], counts: Counts, *,
    meta: bool = False,
) -> nn.Module:  # fmt: skip
    """A copy of a model at other widths, without values; tensors of which nothing is left stay as they are.

    Args:
        model: the model; left as it was.
        dims: the dimensions of its parameters and buffers.
        attributes: the integers that follow a width.
        counts: the width of each axis that is not whole.
        meta: put every tensor on the meta device.
    """
    shapes = {
        name: shape
        for name, each in dims.items()
        if (shape := tuple(axes.count(dim, counts) for dim in each)) != tuple(dim.size for dim in each)
        and 0 not in shape
    }
    with garbage_collection_paused():
        copy = skeleton(model, shapes, meta=meta)
    set_attributes(copy, edits(model, attributes, counts))
    return copy


def mismatch(ctx: Context, again: OperationGraph, counts: Counts, gone: Collection[Node] = frozenset()) -> str | None:
    """The first operation of a narrower copy that is not there, or whose result is not as wide as predicted.

    Args:
        ctx: the algebra over the graph of the unpruned model.
        again: the operations of the copy.
        counts: the width of each axis that is not whole.
        gone: operations that the copy is without.

    Returns:
        None where all agree, else a sentence that names the operation.
    """
    pairs, odd = pair(ctx.graph, again, gone)
    if odd is not None:
        return f"{odd.name} has no counterpart in the shrunk model"
    for before, after in pairs.items():
        value, found = ctx.values[before], after.meta.get("val")
        shapes, tensors = (value, list(found or ())) if isinstance(value, list) else ([value], [found])
        for shape, tensor in zip(shapes, tensors, strict=True):
            expected = tuple(axes.count(dim, counts) for dim in shape)
            if isinstance(tensor, Tensor) and expected != tuple(tensor.shape):
                return f"{before.name} is {list(tensor.shape)}; predicted {list(expected)}"
    return None


def edits(model: nn.Module, attributes: Mapping[Place, Dim], counts: Counts) -> list[Attribute]:
    """The attributes of `model` that change at these widths; a tuple or list of integers as a whole."""
    values: dict[tuple[str, str], list[int] | int] = {}
    for place, dim in sorted(attributes.items()):
        width, (name, _, key) = axes.count(dim, counts), place.name.partition(".")
        holder = getattr(model.get_submodule(place.module), name)
        if type(holder) in (tuple, list) and all(type(part) is int for part in holder):
            sizes = values.setdefault((place.module, name), list(holder))
            assert isinstance(sizes, list)
            sizes[int(key)] = width
        else:
            values[place.module, place.name] = width
    found = []
    for (module, name), new in values.items():
        value = kept.get(model.get_submodule(module), name)
        old = list(value) if isinstance(new, list) else value
        if old != new:
            found.append(Attribute(module, name, old, new))
    return found
