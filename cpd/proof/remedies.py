"""Remedies: what is tried where a narrower copy does not behave as predicted; each is kept only if the forward agrees.

- *attribute*: an integer attribute of the calling module (or of one around it) that had the old width follows it;
- *tie*: the width is computed from another dimension's, so the two must keep equally many positions;
- *minimum*: the forward fails at a width of one, say, and gets further with twice as many positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

from torch import nn

from cpd.algebra import axes, ties
from cpd.algebra.axes import Axis, Dim
from cpd.algebra.ties import Tie
from cpd.errors import first_line
from cpd.proof.candidates import Candidates
from cpd.proof.copies import Copies
from cpd.proof.draws import Draws, moved
from cpd.proof.freezing import unexplained
from cpd.proof.provenance import Place
from cpd.proof.replay import Observation
from cpd.rules import Literal
from cpd.trace.graph import enclosing, owner

Attributes: TypeAlias = list[tuple[Place, Dim]]
#: The module that names a width, and the width.
Asked: TypeAlias = tuple[str, Dim]

#: Copies on which an attribute or a tie must hold beyond the one that suggested it.
CONFIRMATIONS = 2
#: Other widths tried where a copy fails and no integer tells why.
RETRIES = 8


class Remedies:
    """Tries what may explain a width, on copies of other widths.

    Attributes and ties that hold are entered where `copies` keeps them, and minimums into the axes.

    Args:
        copies: the copies to try a remedy on.
        draws: other widths to confirm it at.
    """

    def __init__(self, copies: Copies, draws: Draws) -> None:
        self.copies, self.draws = copies, draws
        self.model, self.ctx, self.dims, self.attributes = copies.model, copies.ctx, copies.dims, copies.attributes
        self.candidates = Candidates(copies)

    # ------------------------------------------------------------ known beforehand

    def adopt_named_attributes(self) -> None:
        """Attributes that are named like an op's argument and hold its value, as in torch.nn, need no trial."""
        for item in self.ctx.literals:
            if item.argument in ("groups", "num_groups", "normalized_shape"):
                for place, dim in self.candidates.around(item)[:1]:
                    if place.name in item.names() and place.module == owner(item.node):
                        self.attributes.setdefault(place, dim)

    def adopt_attention(self) -> None:
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

    # ------------------------------------------------------------ the forward names a width

    def try_followed(self, seen: Observation) -> Observation:
        """Try the integers that the wrong literals were seen to be computed from; see `_try_attributes`."""
        return self._try_attributes(seen, self.candidates.followed)

    def try_unfollowed(self, seen: Observation) -> Observation:
        """Try the integers around a literal that stays what it was at any width: it may have lost its origin."""
        constant = set(filter(seen.is_constant, seen.wrong()))
        return self._try_attributes(seen, lambda item: self.candidates.around(item) if item in constant else [])

    def _try_attributes(self, seen: Observation, candidates: Callable[[Literal], Attributes]) -> Observation:
        """Try, for each width that a module names, one attribute after the other.

        Args:
            seen: what a copy did, which shows the literals that need an explanation.
            candidates: for a literal, places of integers and the widths that they may have to follow.

        Returns:
            What a copy does with what was found; its wrong literals are those that no attribute explains.
        """
        tried: set[tuple[Asked, Place, Dim]] = set()
        while trial := self._next_attributes(seen, candidates, tried):
            extra = {place: dim for place, dim, _ in trial}
            found = self.copies.observe(seen.counts, extra, compare=seen.compared)
            judged = [choice for choice in trial if _judged(choice[2], found)] or trial
            tried.update((_asked(item), place, dim) for place, dim, item in judged)
            adopted = {
                place: item
                for place, _, item in judged
                if found.agrees(item) and self._explains(place, item, extra, seen)
            }
            self.attributes.update({place: dim for place, dim, _ in judged if place in adopted})
            for _ in range(CONFIRMATIONS if adopted else 0):
                found = self.copies.replay(self.draws.draw(_axes_of(seen.wrong())))
                for place, item in adopted.items():
                    if item in found.asked and not found.agrees(item):
                        self.attributes.pop(place, None)  # it had the right width by coincidence
            if adopted:
                confirmed = not seen.compared and self.attributes.keys() >= adopted.keys()
                seen = found if confirmed else self.copies.observe(seen.counts, compare=seen.compared)
        return seen

    def _next_attributes(
        self, seen: Observation, candidates: Callable[[Literal], Attributes], tried: set[tuple[Asked, Place, Dim]]
    ) -> list[tuple[Place, Dim, Literal]]:
        """For each width that a module names wrongly, the first attribute not tried yet, and the literal it is for."""
        trial: dict[Asked, tuple[Place, Dim, Literal]] = {}
        for item in seen.wrong():
            busy = {place for place, _, _ in trial.values()} | set(self.attributes)
            options = ((p, d) for p, d in candidates(item) if (_asked(item), p, d) not in tried and p not in busy)
            choice = next(options, None)
            if choice is not None:
                trial.setdefault(_asked(item), (*choice, item))
        return list(trial.values())

    def _explains(self, place: Place, item: Literal, trial: Mapping[Place, Dim], seen: Observation) -> bool:
        """Whether a literal is as predicted by this attribute, and not by others of the same trial.

        Taken for granted of what the module itself keeps that names the width.
        """
        if place.module == owner(item.node) or len(trial) == 1:
            return True
        others = {other: dim for other, dim in trial.items() if other != place}
        return not self.copies.observe(seen.counts, others, compare=seen.compared).agrees(item)

    def try_ties(self, seen: Observation) -> Observation:
        """Try, for each module that names a wrong width, one tie after the other.

        Returns:
            What a copy does with what was found; its wrong literals are those that no tie explains.
        """
        trials: Counter[tuple[Dim, Dim]] = Counter()
        while trial := self._next_ties(seen, trials):
            tied, before = {axis for tie, _ in trial for axis in tie.axes}, self.ctx.ties
            self.ctx.ties = [*before, *(tie for tie, _ in trial)]
            found, kept = self.copies.observe(self.draws.draw(tied), compare=seen.compared), []
            for tie, item in trial:
                told = moved(found.counts, axes.leaves(item.dim)) and _judged(item, found)
                trials[tie.left, tie.right] += RETRIES if told else 1
                if told and found.agrees(item):
                    kept.append((tie, item))
            self.ctx.ties = [*before, *(tie for tie, _ in kept)]
            for _ in range(CONFIRMATIONS if kept else 0):
                found = self.copies.replay(self.draws.draw(tied | _axes_of(seen.wrong())))
                for tie, item in kept:
                    if tie in self.ctx.ties and item in found.asked and not found.agrees(item):
                        self.ctx.ties.remove(tie)  # the widths were equal by coincidence
            if kept:
                seen = self.copies.compare(self.draws.draw(_axes_of(seen.wrong()))) if seen.compared else found
        return seen

    def _next_ties(self, seen: Observation, trials: Counter[tuple[Dim, Dim]]) -> list[tuple[Tie, Literal]]:
        """For each module that names a wrong width, the first tie with trials left, and the literal it is for."""
        trial: dict[str, tuple[Tie, Literal]] = {}
        known = {frozenset((tie.left, tie.right)) for tie in self.ctx.ties}  # they hold already, and explain nothing
        for item in seen.wrong():
            candidates = (tie for tie in self.candidates.ties(item, seen) if {tie.left, tie.right} not in known)
            tie = next((tie for tie in candidates if trials[tie.left, tie.right] < RETRIES), None)
            if tie is not None:
                trial.setdefault(owner(item.node), (tie, item))
        return list(trial.values())

    def try_ratios(self, wrong: Iterable[Literal]) -> bool:
        """Try integers that a wrong literal is computed from, each with a width that it is in a ratio to (`4 * dim`).

        Returns:
            Whether there is one; the integer then follows that width, and the two widths are tied.
        """
        for item in wrong:
            for tie, place, dim in self.candidates.in_ratio(item):
                self.ctx.ties.append(tie)
                self.attributes[place] = dim
                if self._agrees(item, {*axes.leaves(item.dim)}):
                    return True
                self.ctx.ties.remove(tie)
                del self.attributes[place]
        return False

    def try_whole(self, wrong: Iterable[Literal]) -> bool:
        """For wrong literals of several widths: freeze the one alone that must stay whole for the others to go.

        A forward that does otherwise where keys are repeated once, say, names a wrong number of heads there alone.

        Returns:
            Whether there is one.
        """
        for item in self._one_a_kind(wrong):
            among = [axis for axis in dict.fromkeys(axes.leaves(item.dim)) if axis.frozen is None]
            for axis in sorted(among, key=lambda axis: axis.size) if len(among) > 1 else ():
                if self._agrees(item, {*among} - {axis}, {axis: axis.size}):
                    axis.frozen = self.ctx.reason(item.node, f"{unexplained(item)} where fewer than {axis.size} stay")
                    return True
        return False

    def _one_a_kind(self, wrong: Iterable[Literal]) -> Iterable[Literal]:
        """Of literals alike in modules of one class the first: what does not help there helps in none of them."""
        found: dict[tuple[object, ...], Literal] = {}
        for item in wrong:
            sizes = tuple(axis.size for axis in axes.leaves(item.dim))
            kind = type(self.model.get_submodule(owner(item.node)))
            found.setdefault((kind, item.argument, item.index, sizes), item)
        return found.values()

    def _agrees(self, item: Literal, among: set[Axis], given: Mapping[Axis, int] | None = None) -> bool:
        """Whether a literal is as predicted at several widths of these axes, some others being given."""
        told = 0
        for _ in range(RETRIES):
            counts = ties.repair({**self.draws.draw(among), **(given or {})}, self.ctx.ties)
            if moved(counts, among):
                if not self.copies.replay(counts).agrees(item):
                    return False
                told += 1
            if told > CONFIRMATIONS:
                return True
        return False

    # ------------------------------------------------------------ the forward checks a width and refuses

    def try_checked_attributes(self, failed: Observation) -> bool:
        """Where a forward checks a width and refuses: try the integers that the module, or one around it, keeps.

        Returns:
            Whether one of them let the forward get further.
        """
        for tried in range(RETRIES):
            for path in enclosing(failed.culprit) if failed.error is not None else ():
                for trial in self.candidates.checked(failed.culprit, path, failed.counts):
                    if self._gets_further(failed, trial):
                        for place in list(trial) if len(trial) > 1 else ():  # those alone that the check is about
                            rest = {other: dim for other, dim in trial.items() if other != place}
                            trial = rest if self._gets_further(failed, rest) else trial
                        self.attributes.update(trial)
                        return True
            failed = self.copies.replay(self.draws.draw() if tried else self.draws.draw_alike(0.5))
        return False

    def _gets_further(self, failed: Observation, extra: Mapping[Place, Dim]) -> bool:
        """Whether the forward gets further, at the widths at which it failed, where these integers follow."""
        return self.copies.replay(failed.counts, extra).steps > failed.steps

    def try_checked_ties(self, failed: Observation) -> bool:
        """Where a forward checks a width and refuses: try ties between the widths that the checking module sees.

        Returns:
            Whether one of them let the forward get further, at several widths.
        """
        for tie in self.candidates.checked_ties(failed.culprit) if failed.error is not None else ():
            self.ctx.ties.append(tie)
            further = 0
            for _ in range(1 + CONFIRMATIONS):
                other = self.draws.draw(tie.axes)
                further += bool(moved(other, tie.axes)) and self.copies.replay(other).steps > failed.steps
            if further > CONFIRMATIONS:
                return True
            self.ctx.ties.remove(tie)
        return False

    # ------------------------------------------------------------ the forward fails at a small width

    def try_minimum(self, failed: Observation) -> bool:
        """Where a copy fails: a minimum for one axis, if the forward gets further with twice as many of its positions.

        Of several such axes that the failing module sees it is the one of most positions.

        Returns:
            Whether there is one.
        """

        def gets_further(axis: Axis) -> bool:
            wider = ties.repair({**failed.counts, axis: min(2 * axis.minimum, axis.size)}, self.ctx.ties)
            return self.copies.replay(wider).steps > failed.steps

        helpful = [axis for axis in self._narrowest(failed) if gets_further(axis)]
        if helpful:
            _raise_minimum(max(helpful, key=lambda axis: axis.size), failed)
        return bool(helpful)

    def raise_minimums(self, failed: Observation) -> bool:
        """Double the minimum of every axis that the failing module, or the next around it, sees at its minimum.

        Returns:
            Whether there is one.
        """
        narrow = self._narrowest(failed)
        for axis in narrow:
            _raise_minimum(axis, failed)
        return bool(narrow)

    def _narrowest(self, failed: Observation) -> list[Axis]:
        """The axes at their minimum that the module sees in which a copy failed, or the next around it sees any."""
        if failed.as_predicted():
            return []
        for path in enclosing(failed.failing()):
            dims = self.candidates.widths_of(path) if path else [dim for shape in self.dims.values() for dim in shape]
            found = dict.fromkeys(axis for dim in dims for axis in axes.leaves(dim))
            narrow = [axis for axis in found if failed.counts.get(axis) == axis.minimum < axis.size]
            if narrow:
                return narrow
        return []


def _raise_minimum(axis: Axis, failed: Observation) -> None:
    """Demand twice as many positions of an axis; where those are all, freeze it."""
    error = failed.error
    why = unexplained(failed.wrong()[0]) if error is None else f"a narrower copy fails ({first_line(error)})"
    axis.minimum = min(2 * axis.minimum, axis.size)
    axis.why_minimum = f"{why} [{failed.failing() or 'the model'}]"
    if axis.minimum == axis.size:
        axis.frozen = axis.why_minimum


def _asked(item: Literal) -> Asked:
    return owner(item.node), axes.resolve(item.dim)


def _axes_of(items: Iterable[Literal]) -> set[Axis]:
    """Every axis of the widths that these literals name."""
    return {axis for item in items for axis in axes.leaves(item.dim)}


def _judged(item: Literal, observation: Observation) -> bool:
    """Whether a run tells about a literal: it was reached, or its module, or one inside, is where the run ended."""
    path = owner(item.node)
    return item in observation.asked or observation.culprit == path or observation.culprit.startswith(f"{path}.")
