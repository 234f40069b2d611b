"""Proof before promise: every group that the comb lists as prunable has been shrunk on a copy and traced again.

The algebra sees operations, not the Python that called them. So narrower copies, without values, are run with
several random widths; where the forward asks for another width than predicted, three remedies are tried, each
accepted only if the forward then agrees:

1. *attribute*: an integer attribute of the calling module (or of one around it) that had the old width;
2. *tie*: the width is computed from another dimension's, so the two must keep equally many positions;
3. *freeze*: the group is not prunable, and the reason says which line asks for which width.

At last a narrower copy is exported again and compared node by node: operations, shapes, integers, constants.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, cycle
from typing import TypeAlias

from torch import Tensor, nn
from torch.fx import Node

from cpd.algebra import axes, ties
from cpd.algebra.axes import Axis, Concat, Dim, Fixed
from cpd.algebra.ties import Tie
from cpd.errors import CPDError, first_line
from cpd.model.skeleton import set_attributes, skeleton
from cpd.plan import Attribute
from cpd.proof.auxiliary import fails_in_train_mode
from cpd.proof.constants import POWERS, Scale, find_scales, formulas, scalars, widths_in_sight
from cpd.proof.dispatch import behaves_as_predicted
from cpd.proof.provenance import Place, integers, trace_integers
from cpd.proof.replay import Observation, culprit, replay
from cpd.rules import Context, Literal, arguments
from cpd.trace.graph import OperationGraph, owner, owners, pair, shape_of
from cpd.trace.quiet import garbage_collection_paused
from cpd.trace.tracer import retrace, retrace_operations

Counts: TypeAlias = Mapping[Axis, int]
Observe: TypeAlias = Callable[[Counts, Mapping["Place", Dim]], Observation]

#: Narrower copies tried; random widths make a coincidence of widths in all of them unlikely.
DRAWS = 4
#: Copies on which an attribute or a tie must hold beyond the one that suggested it.
CONFIRMATIONS = 2
#: Copies traced at most to tell the formulas of a constant apart.
MAX_TRACES = 8
#: Widths drawn to find some that tell formulas apart.
TELLING = 20
#: Random widths drawn to find some that the ties allow, and how deep a draw may cut.
TRIES, DEPTHS = 64, (0.125, 0.25, 0.5)
#: Axes of up to this many positions are whole or narrower by turns: random widths would be alike too often.
SMALL = 8
#: In which two of the four copies after the first a small axis is whole: each of six neighbours is whole once while
#: another one is narrower.
TURNS = list(combinations(range(1, 5), 2))
#: Modules inside the calling one whose attributes are tried.
MAX_INNER = 16
#: Ties tried where a forward checks a width and refuses.
MAX_PAIRS = 32
#: Other widths tried where a copy fails and no integer tells why.
RETRIES = 8
#: Remedies tried in a row before everything still open is frozen.
MAX_ROUNDS = 200


@dataclass
class Proof:
    """State of the proof: what the shrunk copies have confirmed so far.

    Attributes:
        model: the unpruned model; never changed.
        ctx: the result of the algebra; groups are frozen and ties added in place.
        dims: the dimensions of every parameter and buffer.
        in_train_mode: whether to try narrower copies in train mode too, in which more layers run.
        attributes: integers that must follow a width.
        formulas: for each constant that depends on a width, the formulas that explain it in every copy seen.
        seen: the widths of each copy that was exported, and the numbers of the unpruned model beside its own.
    """

    model: nn.Module
    ctx: Context
    dims: dict[str, tuple[Dim, ...]]
    in_train_mode: bool = False
    attributes: dict[Place, Dim] = field(default_factory=dict)
    formulas: dict[tuple[Node, str], list[Scale]] = field(default_factory=dict)
    seen: list[tuple[Counts, dict[tuple[Node, str], tuple[float, float]]]] = field(default_factory=list)
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    @property
    def scales(self) -> list[Scale]:
        """The formula of each constant that depends on a width: the simplest of those that explain it."""

        def simplicity(scale: Scale) -> tuple[int, int]:
            return len(list(axes.leaves(scale.dim))), POWERS.index(scale.power)

        return [min(found, key=simplicity) for found in self.formulas.values()]

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

    def run(self) -> None:
        """Repair or freeze until narrower copies behave as predicted, each open axis among those narrowed."""
        self._adopt_named_attributes()
        self._adopt_attention()
        while True:
            self._settle(self._replay, DRAWS + bool(self.small_axes()))
            self._settle_minimums()
            self._settle_train_mode()
            if self._settle(self._export, 1):
                return

    # ------------------------------------------------------------ observing

    def open_axes(self) -> list[Axis]:
        """Every axis of a parameter that may still shrink, in the order of the parameters."""
        found = [axis for dims in self.dims.values() for dim in dims for axis in axes.leaves(dim)]
        return [axis for axis in dict.fromkeys(found) if axis.frozen is None and axis.size > 1]

    def small_axes(self) -> list[Axis]:
        """The open axes of up to `SMALL` positions."""
        return [axis for axis in self.open_axes() if axis.size <= SMALL]

    def draw(self, unproven: Collection[Axis] = (), done: int | None = None) -> dict[Axis, int]:
        """Random widths that the ties allow; of several such for axes tied to each other, those that narrow most.

        Of a series of copies the first has every axis narrower, but for the ties. In those after it small axes are
        whole by `TURNS`, so that a width that must not be less than another, or must equal it, is found out.

        Args:
            unproven: the axes in question.
            done: number of the copy in a series.
        """
        unproven, counts = set(unproven), dict[Axis, int]()
        whole = {axis for axis, turns in zip(self.small_axes(), cycle(TURNS), strict=False) if done in turns}
        blocks = ties.components(self.open_axes(), self.ctx.ties)
        for trial in range(TRIES):
            depth, alike = self.rng.choice(DEPTHS), dict[int, int]()
            pending = []
            for found, among in blocks:
                least = {axis: int(done == 0 or (done is not None and axis.size <= SMALL)) for axis in found}
                wanted = {axis: axis.size - _cut(self.rng, axis.size, depth, least[axis]) for axis in found}
                wanted.update((axis, axis.size) for axis in found if axis in whole)
                if trial % 2:  # alike axes alike: what ties many layers to one width is met more often
                    wanted = {axis: alike.setdefault(axis.size, kept) for axis, kept in wanted.items()}
                widths = ties.repair(wanted, among)
                asked = unproven.intersection(found)
                if trial == 0 or len(moved(widths, asked)) > len(moved(counts, asked)):
                    counts.update(widths)
                if moved(counts, asked) < asked:
                    pending.append((found, among))
            if not (blocks := pending):
                break
        return counts

    def draw_alike(self) -> dict[Axis, int]:
        """The same share of every width, which passes most checks of a forward: that one divides or equals another.

        Half of the times, only the larger factor of heads x head_dim is narrowed.
        """
        whole: set[Axis] = set()
        for dim in map(axes.resolve, (dim for dims in self.dims.values() for dim in dims)):
            factors = [factor for factor in axes.factors_of(dim) if isinstance(factor, Axis)]
            whole.update(sorted(factors, key=lambda axis: axis.size)[:-1])
        share, inner_only = self.rng.choice((0.5, 0.75, 0.625, 0.875)), self.rng.random() < 0.5
        kept = {
            axis: axis.size if inner_only and axis in whole else max(1, round(axis.size * share))
            for axis in self.open_axes()
        }
        return ties.repair(kept, self.ctx.ties)

    def narrow(self, counts: Counts, extra: Mapping[Place, Dim], *, meta: bool = False) -> nn.Module:
        """A copy of the model with these widths, its attributes set, without values."""
        shapes = {
            name: shape
            for name, dims in self.dims.items()
            if (shape := tuple(axes.count(dim, counts) for dim in dims)) != tuple(dim.size for dim in dims)
        }
        with garbage_collection_paused():
            model = skeleton(self.model, shapes, meta=meta)
        set_attributes(model, edits(self.model, {**self.attributes, **extra}, counts))
        return model

    def _replay(self, counts: Counts, extra: Mapping[Place, Dim]) -> Observation:
        """Run a narrower copy on the meta device; where nothing runs there, with fake tensors, which keep theirs."""
        observation = replay(self.ctx, self.narrow(counts, extra, meta=True), counts, meta=True)
        if observation.error is not None and not self.runs_on_meta:
            observation = replay(self.ctx, self.narrow(counts, extra), counts)
        return observation

    def _export(self, counts: Counts, extra: Mapping[Place, Dim]) -> Observation:
        """Compare a narrower copy with the prediction: what both call, or, where that differs, an export of it."""
        observation = Observation(counts)
        numbers = [key for key in self.formulas if arguments(key[0]).get(key[1]) is not None]
        if not numbers and behaves_as_predicted(self.narrow(counts, extra, meta=True), self.ctx, counts):
            return observation
        model = self.narrow(counts, extra)
        graph = retrace_operations(model, self.ctx.graph)
        if graph is not None:
            twins, odd = pair(self.ctx.graph, graph)
            if odd is None:
                self._compare(twins, graph, observation)
                return observation
        try:
            graph = retrace(model, self.ctx.graph)
        except CPDError as error:
            cause = error.__cause__ or error
            observation.error = error
            observation.culprit = culprit(model, cause)
            return observation
        twins, odd = pair(self.ctx.graph, graph)
        if odd is not None:
            observation.culprit = owner(odd)
            observation.error = CPDError(f"at {odd.name} the forward calls another operation at another width")
            return observation
        self._compare(twins, graph, observation)
        return observation

    def _compare(self, twins: Mapping[Node, Node], graph: OperationGraph, observation: Observation) -> None:
        counts = observation.counts
        for item in self.ctx.literals:
            value = arguments(twins[item.node])[item.argument]
            observation.asked[item] = int(value[item.index] if isinstance(value, (list, tuple)) else value)
        if observation.wrong():
            return
        for node, twin in twins.items():
            value = self.ctx.values.get(node)
            if not isinstance(value, tuple) or not isinstance(node.meta.get("val"), Tensor):
                continue
            if tuple(axes.count(dim, counts) for dim in value) != shape_of(twin):
                why = f"is {list(shape_of(twin))} in a narrower copy, against the prediction"
                self._freeze_node(node, why)
                observation.error = CPDError(f"{node.name} {why}")
                return
        self._compare_constants(twins, graph, observation)

    def _compare_constants(self, twins: Mapping[Node, Node], graph: OperationGraph, observation: Observation) -> None:
        """A number that changed with a width is compensated if one formula explains it in every copy, else frozen."""
        named = {(item.node, item.argument) for item in self.ctx.literals}
        numbers = {
            (node, name): (before, after)
            for node, twin in twins.items()
            for name, before, after in scalars(node, self.ctx.graph, twin, graph)
            if (node, name) not in named
        }
        self.seen.append((observation.counts, numbers))
        for key, (before, after) in numbers.items():
            if before == after and key not in self.formulas:
                continue
            candidates = self.formulas.get(key) or find_scales(self.ctx, key[0])
            self.formulas[key] = [scale for scale in candidates if self._explains(scale, key)]
            if not self.formulas[key]:
                del self.formulas[key]
                why = f"the number {before} depends on this width"
                self._freeze_number(key, why)
                observation.error = CPDError(f"{key[0].name}: {why}")

    def _explains(self, scale: Scale, key: tuple[Node, str]) -> bool:
        """Whether a formula gives the number of every copy seen."""
        return all(scale.explains(*seen[key], widths) for widths, seen in self.seen if key in seen)

    # ------------------------------------------------------------ repairing

    def _settle(self, observe: Observe, draws: int) -> bool:
        """Observe random widths, at least `draws` times and each open axis narrowed once; repair what differs.

        Returns:
            Whether nothing differed.
        """
        clean, done, unproven = True, 0, set(self.open_axes())
        for _ in range(MAX_ROUNDS):
            counts: Counts = self.draw(unproven, done)
            if done >= draws and not moved(counts, unproven):
                telling = self._telling_widths() if observe == self._export and done < MAX_TRACES else None
                if telling is None:
                    for axis in unproven:
                        axis.frozen = "the ties that it takes part in leave no narrower width"
                    return clean
                counts = telling
            open_before = len(self.open_axes())
            observation = observe(counts, {})
            if not observation.wrong() and observation.error is None:
                done, unproven = done + 1, unproven - moved(counts, unproven)
                continue
            clean, done = False, 0
            found = self._where_wrong(observation)
            if wrong := found.wrong():
                first = set(wrong)
                observe = observe if found is observation else self._replay
                found = self._try_attributes(observe, found, self._followed)
                found = self._try_ties(observe, found)
                if first.intersection(found.wrong()):  # what other widths brought up has its own turn
                    found = self._try_unfollowed(observe, found)
                    self._freeze_literals([item for item in found.wrong() if item in first])
            elif len(self.open_axes()) == open_before:
                failing = self._replay(counts, {})
                if not (
                    self._try_attributes_checked(failing)
                    or self._try_ties_checked(failing)
                    or self._try_minimum(failing)
                ):
                    self._freeze_culprit(observation)
            unproven = set(self.open_axes())
        for axis in self.open_axes():
            axis.frozen = "the proof did not come to an end"
        return False

    def _settle_minimums(self) -> None:
        """Try a copy as narrow as the ties allow; where it fails, more positions must stay."""
        while self.open_axes():
            seen = self._replay(ties.repair(dict.fromkeys(self.open_axes(), 1), self.ctx.ties), {})
            if seen.error is None and not seen.wrong():
                return
            if self._try_minimum(seen):
                continue
            narrow = self._narrowest(seen, self._failing(seen))
            for axis in narrow:
                self._raise_minimum(axis, seen)
            if not narrow and seen.error is None:
                self._freeze_literals(seen.wrong())
            elif not narrow:
                self._freeze_culprit(seen)

    def _settle_train_mode(self) -> None:
        """Freeze what the module works on in which a narrower copy fails in train mode."""
        while self.in_train_mode and self.open_axes():
            failure = fails_in_train_mode(self.narrow(self.draw(done=0), {}, meta=True), self.ctx.graph.call)
            if failure is None:
                return
            path, error = failure
            self._freeze_module(path, f"a narrower copy fails in train mode ({first_line(error)})")

    def _try_minimum(self, seen: Observation) -> bool:
        """Where a copy fails: a minimum for one axis, if the forward gets further with twice as many of its positions.

        Of several such axes that the failing module sees it is the one of most positions.

        Returns:
            Whether there is one.
        """

        def gets_further(axis: Axis) -> bool:
            wider = ties.repair({**seen.counts, axis: min(2 * axis.minimum, axis.size)}, self.ctx.ties)
            return self._replay(wider, {}).steps > seen.steps

        if seen.error is None and not seen.wrong():
            return False
        helpful = [axis for axis in self._narrowest(seen, self._failing(seen)) if gets_further(axis)]
        if helpful:
            self._raise_minimum(max(helpful, key=lambda axis: axis.size), seen)
        return bool(helpful)

    def _failing(self, seen: Observation) -> str:
        """The module in which a copy failed, or asked for another width than predicted."""
        return owner(seen.wrong()[0].node) if seen.error is None else seen.culprit

    def _narrowest(self, seen: Observation, path: str) -> list[Axis]:
        """The axes at their minimum that the module at `path` sees, or the next around it that sees any."""
        while True:
            dims = self._widths_of(path) if path else [dim for shape in self.dims.values() for dim in shape]
            found = dict.fromkeys(axis for dim in dims for axis in axes.leaves(dim))
            narrow = [axis for axis in found if seen.counts.get(axis) == axis.minimum < axis.size]
            if narrow or not path:
                return narrow
            path = path.rpartition(".")[0]

    def _raise_minimum(self, axis: Axis, seen: Observation) -> None:
        why = (
            _unexplained(seen.wrong()[0]) if seen.error is None else f"a narrower copy fails ({first_line(seen.error)})"
        )
        axis.minimum = min(2 * axis.minimum, axis.size)
        axis.why_minimum = f"{why} [{self._failing(seen) or 'the model'}]"
        if axis.minimum == axis.size:
            axis.frozen = axis.why_minimum

    def _where_wrong(self, observation: Observation) -> Observation:
        """A run that ended in an error, or one like it which shows an integer that is not as predicted.

        Earlier draws may have had widths alike by chance, or have ended before the place.
        """
        counts, found = observation.counts, observation
        for _ in range(RETRIES):
            if found.wrong():
                return found
            found = self._replay(counts, {})
            counts = self.draw_alike()
        return observation

    def _telling_widths(self) -> Counts | None:
        """Widths at which formulas that explain one constant so far differ most; None where they never do."""

        def kinds(counts: Counts) -> int:
            return sum(len({round(scale.change(counts), 9) for scale in found}) - 1 for found in several)

        several = [found for found in self.formulas.values() if len(found) > 1]
        best = max((self.draw() for _ in range(TELLING if several else 0)), key=kinds, default=None)
        return best if best is not None and kinds(best) else None

    def _try_attributes(
        self, observe: Observe, seen: Observation, candidates: Callable[[Literal], list[tuple[Place, Dim]]]
    ) -> Observation:
        """Try, for each width that a module names, one attribute after the other.

        Args:
            observe: runs a copy.
            seen: a run that shows the literals which need an explanation.
            candidates: for a literal, places of integers and the widths that they may have to follow.

        Returns:
            A run with what was found; its wrong literals are those that no attribute explains.
        """
        tried: set[tuple[Place, Dim]] = set()
        while True:
            trial: dict[tuple[str, Dim], tuple[Place, Dim, Literal]] = {}
            for item in seen.wrong():
                key = (owners(item.node)[0], axes.resolve(item.dim))
                busy = {other for other, _, _ in trial.values()} | set(self.attributes)
                options = ((p, d) for p, d in candidates(item) if (p, d) not in tried and p not in busy)
                choice = next(options, None)
                if choice is not None:
                    trial.setdefault(key, (*choice, item))
            if not trial:
                return seen
            found = observe(seen.counts, {place: dim for place, dim, _ in trial.values()})
            judged = [choice for choice in trial.values() if _judged(choice[2], found)] or list(trial.values())
            tried.update((place, dim) for place, dim, _ in judged)
            adopted = {place: item for place, _, item in judged if found.agrees(item)}
            self.attributes.update({place: dim for place, dim, _ in judged if place in adopted})
            for _ in range(CONFIRMATIONS if adopted else 0):
                found = self._replay(self.draw(_axes_of(seen.wrong())), {})
                for place, item in adopted.items():
                    if item in found.asked and not found.agrees(item):
                        self.attributes.pop(place, None)  # it had the right width by coincidence
            if adopted:
                confirmed = observe == self._replay and self.attributes.keys() >= adopted.keys()
                seen = found if confirmed else observe(seen.counts, {})

    def _try_unfollowed(self, observe: Observe, seen: Observation) -> Observation:
        """Try the integers around a literal that stays what it was at any width: it may have lost its origin."""
        constant = {item for item in seen.wrong() if seen.asked[item] == item.sign * item.dim.size}
        return self._try_attributes(observe, seen, lambda item: self._candidates(item) if item in constant else [])

    def _followed(self, item: Literal) -> list[tuple[Place, Dim]]:
        """The integers that the literal was seen to be computed from, each with the widths that it is as large as."""
        kept = {place: value for path in dict.fromkeys(p.module for p in self.places.get(item, ()))
                for place, value in integers(self.model, path)}  # fmt: skip
        return [
            (place, dim)
            for dim in self._widths_around(item)
            for place in sorted(self.places.get(item, ()))
            if kept[place] == dim.size
        ]

    def _candidates(self, item: Literal) -> list[tuple[Place, Dim]]:
        """Integers that the modules around the literal keep, each with the widths that it is as large as.

        Those named like the op's argument come first, then those of the whole width, then the innermost module's.
        """
        found: list[tuple[Place, Dim]] = []
        kept = [pair for path in self._modules_around(item.node) for pair in integers(self.model, path)]
        for dim in self._widths_around(item):
            found += [(place, dim) for place, value in kept if value == dim.size]
        return sorted(found, key=lambda pair: pair[0].name != item.argument)

    def _widths_around(self, item: Literal) -> list[Dim]:
        """The literal's width, parts of it (`B * self.num_heads`, `self.dim * 3`), and those around (`dim - part`)."""
        around = (dim for node in [*item.node.all_input_nodes, item.node] for dim in self.ctx.dims_of(node))
        removable = (dim for dim in around if any(True for _ in axes.leaves(dim)))
        return list(dict.fromkeys([*_parts_of(item.dim), *removable]))

    def _modules_around(self, node: Node) -> Iterator[str]:
        """The module that calls a node, those inside it (whose methods it may have called), those around it."""
        path, *outer = owners(node)
        yield path
        inner = [name for name, _ in self.model.get_submodule(path).named_modules() if name]
        yield from (f"{path}.{name}" if path else name for name in inner[:MAX_INNER])
        yield from outer

    def _try_attributes_checked(self, observation: Observation) -> bool:
        """Where a forward checks a width and refuses: try the integers that the module, or one around it, keeps.

        Returns:
            Whether one of them let the forward get further.
        """
        for _ in range(RETRIES):
            counts = observation.counts
            path, open_end = observation.culprit, observation.error is not None
            while open_end:
                for place, dim in self._checked_candidates(observation.culprit, path, counts):
                    if self._replay(counts, {place: dim}).steps > observation.steps:
                        self.attributes[place] = dim
                        return True
                open_end, path = bool(path), path.rpartition(".")[0]
            observation = self._replay(self.draw(), {})
        return False

    def _checked_candidates(self, culprit: str, path: str, counts: Counts) -> Iterator[tuple[Place, Dim]]:
        """Integers of the module at `path`, each with the narrower widths that the module `culprit` sees."""
        for dim in self._widths_of(culprit):
            for place, value in integers(self.model, path):
                if value == dim.size != axes.count(dim, counts) and place not in self.attributes:
                    yield place, dim

    def _adopt_attention(self) -> None:
        """What `torch.nn.MultiheadAttention` checks in its forward: heads x head_dim is as wide as its embedding."""
        for path, module in self.model.named_modules():
            if not isinstance(module, nn.MultiheadAttention) or f"{path}.out_proj.weight" not in self.dims:
                continue
            fused = module.in_proj_weight is not None
            embedding = self.dims[f"{path}.{'in_proj_weight' if fused else 'q_proj_weight'}"][1]
            inner = axes.resolve(self.dims[f"{path}.out_proj.weight"][1])
            for width in (inner, *(() if fused else (self.dims[f"{path}.q_proj_weight"][0],))):
                why = f"heads x head_dim is the embedding of a MultiheadAttention [{path}]"
                self.ctx.ties.append(Tie(axes.resolve(width), axes.resolve(embedding), why))
            heads = axes.factors_of(inner)[:1]
            if heads and heads[0].size == module.num_heads:
                self.attributes[Place(path, "num_heads")] = heads[0]

    def _try_ties_checked(self, observation: Observation) -> bool:
        """Where a forward checks a width and refuses: try ties between the widths that the checking module sees.

        Returns:
            Whether one of them let the forward get further, at several widths.
        """
        if observation.error is None:
            return False
        in_sight = [dim for dim in self._widths_of(observation.culprit) if axes.is_open(dim)]
        pairs = [(left, right) for left, right in combinations(in_sight, 2) if left.size == right.size]
        why = f"the forward checks a width [{observation.culprit or 'the model'}]"
        for left, right in pairs[:MAX_PAIRS]:
            tie = Tie(left, right, why)
            self.ctx.ties.append(tie)
            further = 0
            for _ in range(1 + CONFIRMATIONS):
                other = self.draw(tie.axes)
                further += bool(moved(other, tie.axes)) and self._replay(other, {}).steps > observation.steps
            if further > CONFIRMATIONS:
                return True
            self.ctx.ties.remove(tie)
        return False

    def _widths_of(self, path: str) -> list[Dim]:
        """The removable dimensions, and parts of them, of what a module sees and of the parameters that it keeps."""
        nodes = [node for node in self.ctx.graph.operations if owner(node) == path]
        own = [shape for name, shape in self.dims.items() if name.rpartition(".")[0] == path]
        kept = [axes.resolve(dim) for shape in own for dim in shape if any(True for _ in axes.leaves(dim))]
        whole = [*(widths_in_sight(self.ctx, nodes[0]) if nodes else ()), *kept]
        return list(dict.fromkeys(part for dim in whole for part in _parts_of(dim)))

    def _adopt_named_attributes(self) -> None:
        """Attributes that are named like an op's argument and hold its value, as in torch.nn, need no trial."""
        for item in self.ctx.literals:
            if item.argument in ("groups", "num_groups", "normalized_shape"):
                for place, dim in self._candidates(item)[:1]:
                    index_fits = place.index is None or place.index == item.index
                    if place.name == item.argument and index_fits and place.module == owners(item.node)[0]:
                        self.attributes.setdefault(place, dim)

    def _try_ties(self, observe: Observe, seen: Observation) -> Observation:
        """Try, for each module that names a wrong width, one tie after the other.

        Returns:
            A run with what was found; its wrong literals are those that no tie explains.
        """
        trials: Counter[tuple[Dim, Dim]] = Counter()
        while True:
            trial: dict[str, tuple[Tie, Literal]] = {}
            for item in seen.wrong():
                candidates = self._tie_candidates(item, seen)
                tie = next((tie for tie in candidates if trials[tie.left, tie.right] < RETRIES), None)
                if tie is not None:
                    trial.setdefault(owners(item.node)[0], (tie, item))
            if not trial:
                return seen
            tied, before = {axis for tie, _ in trial.values() for axis in tie.axes}, self.ctx.ties
            self.ctx.ties = [*before, *(tie for tie, _ in trial.values())]
            found, kept = observe(self.draw(tied), {}), []
            for tie, item in trial.values():
                told = moved(found.counts, tie.axes) and _judged(item, found)
                trials[tie.left, tie.right] += RETRIES if told else 1
                if told and found.agrees(item):
                    kept.append((tie, item))
            self.ctx.ties = [*before, *(tie for tie, _ in kept)]
            for _ in range(CONFIRMATIONS if kept else 0):
                found = self._replay(self.draw(tied | _axes_of(seen.wrong())), {})
                for tie, item in kept:
                    if tie in self.ctx.ties and item in found.asked and not found.agrees(item):
                        self.ctx.ties.remove(tie)  # the widths were equal by coincidence
            if kept:
                seen = found if observe == self._replay else observe(self.draw(_axes_of(seen.wrong())), {})

    def _tie_candidates(self, item: Literal, seen: Observation) -> list[Tie]:
        """Dimensions in the same module as wide as the literal's, or as a run of its neighbours' product.

        Those come first from whose width the integer follows that the forward asked for.
        """
        counts, asked = seen.counts, seen.asked.get(item)
        module = owners(item.node)[0]
        named = [axes.resolve(dim) for place, dim in self.attributes.items() if place.module == module]
        in_sight = list(dict.fromkeys([*named, *widths_in_sight(self.ctx, item.node)]))
        blocks = list(dict.fromkeys(axes.resolve(dim) for dim in (item.dim, *self._blocks_around(item))))
        found: list[Tie] = []
        for block in blocks:
            for dim in in_sight:
                if dim.size == block.size and dim != block and axes.is_open(dim) and axes.is_open(block):
                    found.append(Tie(block, dim, self.ctx.reason(item.node, "a width is computed from another")))

        def follows(tie: Tie) -> bool:
            rest = axes.count(tie.left, counts) // axes.count(item.dim, counts)
            return asked is not None and rest * asked <= axes.count(tie.right, counts) < rest * (asked + 1)

        return sorted(found, key=lambda tie: not follows(tie))

    def _blocks_around(self, item: Literal) -> Iterator[Dim]:
        """Products of neighbouring dimensions of the literal's node that contain its own."""
        value = self.ctx.values[item.node]
        if not isinstance(value, tuple) or not any(dim is item.dim for dim in value):
            return
        place = next(index for index, dim in enumerate(value) if dim is item.dim)
        for start in range(place, -1, -1):
            for end in range(place + 1, len(value) + 1):
                block = axes.product(value[start:end])
                if end - start > 1 and not any(axis.frozen for axis in axes.leaves(block)):
                    yield block

    # ------------------------------------------------------------ freezing

    def _freeze_literals(self, wrong: list[Literal]) -> None:
        """Freeze the widths that nothing explains; where those are frozen already, ever more around them."""
        if not wrong:
            return
        before = len(self.open_axes())
        for freeze in (self._freeze_width, self._freeze_attributes, self._freeze_caller):
            for item in wrong:
                freeze(item)
            if len(self.open_axes()) < before:
                return
        self._freeze_module(owners(wrong[0].node)[0], _unexplained(wrong[0]), wrong[0].node)

    def _freeze_width(self, item: Literal) -> None:
        self.ctx.freeze(item.dim, item.node, _unexplained(item))

    def _freeze_attributes(self, item: Literal) -> None:
        """The width cannot change, yet an attribute that follows another one names it."""
        for place, dim in self.attributes.items():
            if place.module in owners(item.node):
                self.ctx.freeze(dim, item.node, f"{place.name} also names a width that cannot change")

    def _freeze_caller(self, item: Literal) -> None:
        """The width cannot change, yet the forward computes it from another one that its module works on."""
        for node in self.ctx.graph.operations:
            if owners(node)[0] == owners(item.node)[0]:
                self._freeze_node(node, _unexplained(item), item.node)

    def _freeze_node(self, node: Node, why: str, at: Node | None = None) -> None:
        for source in [node, *node.all_input_nodes]:
            for dim in self.ctx.dims_of(source):
                self.ctx.freeze(dim, at or node, why)

    def _freeze_number(self, key: tuple[Node, str], why: str) -> None:
        """Freeze the widths that explain a number; if none does, all that its module or one around it works on."""
        open_before = len(self.open_axes())
        for scale in formulas(self.ctx, key[0]):
            if self._explains(scale, key):
                self.ctx.freeze(scale.dim, key[0], why)
        if len(self.open_axes()) == open_before:
            self._freeze_module(owners(key[0])[0], why, key[0])

    def _freeze_culprit(self, observation: Observation) -> None:
        """Freeze what the module in which a narrower copy failed works on; if nothing, the modules around it."""
        assert observation.error is not None
        self._freeze_module(observation.culprit, f"a narrower copy fails here ({first_line(observation.error)})")

    def _freeze_module(self, path: str, why: str, at: Node | None = None) -> None:
        """Freeze what a module works on, for a reason found at some node; if nothing of it is open, those around it."""
        open_before = len(self.open_axes())
        while True:
            nodes = [node for node in self.ctx.graph.operations if owners(node)[0] == path or path == ""]
            for node in nodes:
                self._freeze_node(node, why, at)
            for name, shape in self.dims.items() if not nodes else ():  # its methods were called, not its forward
                if name.startswith(f"{path}."):
                    for dim in shape:
                        axes.freeze(dim, f"{why} [{path}]")
            if len(self.open_axes()) < open_before or path == "":
                return
            path = path.rpartition(".")[0]


def _unexplained(item: Literal) -> str:
    return f"the forward names the width {item.dim.size}, and no attribute or other width explains it"


def _axes_of(items: Iterable[Literal]) -> set[Axis]:
    """Every axis of the widths that these literals name."""
    return {axis for item in items for axis in axes.leaves(item.dim)}


def _judged(item: Literal, observation: Observation) -> bool:
    """Whether a run tells about a literal: it was reached, or its module, or one inside, is where the run ended."""
    path = owner(item.node)
    return item in observation.asked or observation.culprit == path or observation.culprit.startswith(f"{path}.")


def _parts_of(dim: Dim) -> Iterator[Dim]:
    """A dimension, its factors but for the fixed ones, and each removable factor and segment of it."""
    dim = axes.resolve(dim)
    yield dim
    factors = [factor for factor in axes.factors_of(dim) if not isinstance(factor, Fixed)]
    if factors:
        yield axes.product(factors)
    for part in (*factors, *(dim.segments if isinstance(dim, Concat) else ())):
        if part != dim and not isinstance(part, Fixed):
            yield from _parts_of(part)


def _cut(rng: random.Random, size: int, depth: float, least: int) -> int:
    """How many positions go: `least`, a few, or any number, so that no two widths are taken for one for long.

    A single position is left of two only: where forwards fail on that is found out apart from all else.
    """
    return rng.choice((least, rng.randint(1, max(1, int(size * depth))), rng.randint(1, max(1, size - 2))))


def moved(counts: Counts, among: Iterable[Axis]) -> set[Axis]:
    """The axes among these that lose positions."""
    return {axis for axis in among if counts.get(axis, axis.size) < axis.size}


def edits(model: nn.Module, attributes: Mapping[Place, Dim], counts: Counts) -> list[Attribute]:
    """The attributes of `model` that change at these widths."""
    values: dict[tuple[str, str], list[int] | int] = {}
    for place, dim in sorted(attributes.items(), key=lambda item: (item[0].module, item[0].name, item[0].index or 0)):
        width, key = axes.count(dim, counts), (place.module, place.name)
        if place.index is None:
            values[key] = width
        else:
            current = values.setdefault(key, list(getattr(model.get_submodule(place.module), place.name)))
            assert isinstance(current, list)
            current[place.index] = width
    found = []
    for (module, name), new in values.items():
        value = getattr(model.get_submodule(module), name)
        old = list(value) if isinstance(value, (tuple, list)) else value
        if old != new:
            found.append(Attribute(module, name, old, new))
    return found
