"""Decide: which channels stay at each shrink of a run, so that the last one meets the target."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from glob import escape
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cpd.algebra.axes import Axis
from cpd.coupling.comb import Comb
from cpd.coupling.cost import CostFigures, unused_sentence
from cpd.deploy.latency import LatencyComparison, LatencyProbe
from cpd.deploy.latency_model import LatencyModel
from cpd.deploy.runtimes.catalogue import runtimes_of
from cpd.deploy.several import SlowestModel, latency_model
from cpd.errors import TargetError, some
from cpd.model.inputs import Call
from cpd.plan import Plan
from cpd.selection.bounds import Bounds
from cpd.selection.branching import Candidate, best_number, chosen_number, in_order, removable_branches
from cpd.selection.common import Found
from cpd.selection.obstacles import obstacles
from cpd.selection.search import Search, told_of
from cpd.selection.selector import Selector
from cpd.selection.weighing import Normalization, Scope, Weighing

if TYPE_CHECKING:
    from cpd.selection.limits import Limits
    from cpd.selection.target import Target

Keep = dict[str, tuple[int, ...]]
Stage = Callable[[str], AbstractContextManager[None]]
#: Groups that a note names.
NAMED = 8
#: A scope whose error is more than so many times the least is not measured.
ABOUT = 1.15


@dataclass(frozen=True)
class Decision:
    """What stays after one shrink.

    Attributes:
        keep: {group name: channels that stay}.
        removed: the branches that have gone.
        leaving: those that go until the target is reached, in their order.
        scopes: the scopes that are still in question.
        goal: the figure that the schedule runs in, at the target.
        notes: what a user should know of it.
    """

    keep: Keep
    removed: tuple[str, ...]
    leaving: tuple[str, ...]
    scopes: tuple[Scope, ...]
    goal: float
    notes: tuple[str, ...] = ()


class Decider:
    """Decides what stays, given scores; keeps what had to be measured for it.

    Args:
        comb: the comb of the unpruned model.
        target: what has to be reached.
        limits: what may be done to a group.
        normalization: what scores are divided by; None: the default for the criterion and the target.
        exponent: of the saving.
        scope: among what scores are compared; None: the default.
        data_free: whether the scores come from the weights alone.
        tolerance: how far from a measured target the search may end, as a fraction.
        runtime: what latency is measured in, one or several.
        threads: of a runtime given by name.
        file_mb: MB of the file that is run, at most.
        memory_mb: MB of weights and tensors alive at once, at most.
        calibration: batches that give the ranges of 8-bit integers; None: the example inputs do.
        others: further inputs that a measured target holds for.
        error_of: the error of the logits once a plan has been applied and recovered from, without training, or roughly
            that; None where there is no data.
        error_without: the error of the logits without each of some branches; None where branches stay.
        stage: a context manager for each stage by name.
        found: what is measured of the unpruned model, by others too; None: nothing yet.

    Attributes:
        is_by_capacity: whether scores have to be those of `by_capacity`.
        scopes: those still in question.
        goal: the figure that the schedule runs in, at the target; None before the first decision.
        leaving: the branches that go until the target is reached, in their order; None before the first decision.
        search: one dict a measured candidate (scope, macs_ratio, predicted, speedup, attained, verdict).
    """

    def __init__(
        self,
        comb: Comb,
        target: Target,
        limits: Limits,
        *,
        normalization: Normalization | None,
        exponent: float,
        scope: Scope | None,
        data_free: bool,
        tolerance: float,
        runtime: Any,
        threads: int,
        file_mb: float | None,
        memory_mb: float | None,
        calibration: Iterable[Any] | None,
        others: tuple[Call, ...],
        error_of: Callable[[Plan, bool], float] | None,
        error_without: Callable[[list[str]], Mapping[str, float]] | None,
        stage: Stage,
        found: Found | None = None,
    ) -> None:
        self.comb, self.target, self.limits = comb, target, limits
        self.tolerance, self._others = tolerance, others
        self._runtime, self._threads, self._calibration = runtime, threads, calibration
        by_default: Normalization = ("latency" if target.is_measured else "none") if data_free else "macs"
        self.normalization: Normalization = normalization or by_default
        self._exponent, self.is_by_capacity = exponent, data_free and self.normalization == "latency"
        several: tuple[Scope, ...] = ("global", "group") if target.is_measured and not data_free else ("global",)
        self.scopes: tuple[Scope, ...] = (scope,) if scope else several
        self.goal: float | None = None
        self.search: list[dict[str, Any]] = []
        self._found = found or Found()
        self.leaving: tuple[str, ...] | None = () if error_without is None else None
        self._error_of, self._error_without, self._stage = error_of, error_without, stage
        self._errors: dict[str, float] = {}
        self._stay: Collection[str] = ()
        self._timed: tuple[dict[Axis, int], LatencyComparison] | None = None
        self.bounds = Bounds(
            comb, file_mb, memory_mb, [each.precision for each in runtimes_of(runtime, threads)],
            lambda: self._probe().bytes_of(self._probe().original),
        )  # fmt: skip

    @property
    def probe(self) -> LatencyProbe | None:
        """Times candidates beside the unpruned model; None until something is timed."""
        return self._found.probe

    @property
    def removes_branches(self) -> bool:
        """Whether branches may go."""
        return self._error_without is not None and bool(self.limits.max_removed)

    def decide(
        self,
        scores: Mapping[str, Tensor],
        kept: Mapping[str, tuple[int, ...]],
        share: float,
        untrusted: Mapping[str, str] = MappingProxyType({}),
        gone: Sequence[str] = (),
        stay: Collection[str] = (),
    ) -> Decision:
        """What stays after this shrink: of the way to the target as much as the schedule says.

        Args:
            scores: {group name: Tensor[size]}, -inf where a channel has gone, inf where it must stay.
            kept: {group name: channels that are left}.
            share: of what is to go, how much has gone after this shrink.
            untrusted: {group name: why its scores say too little}: these stay whole, where the target allows it.
            gone: branches that have gone before the first decision.
            stay: branches that must stay.

        Raises:
            TargetError: the target is out of reach.
        """
        self._stay = stay
        self._errors = {}
        if not untrusted:
            return self._decided(scores, kept, share, self.limits, gone)
        named = some((f"{name}: {why}" for name, why in untrusted.items()), NAMED, separator="; ")
        whole = {escape(name): 0.0 for name in untrusted if len(kept[name]) == len(scores[name])}
        try:
            limits = replace(self.limits, ratios={**self.limits.ratios, **whole})
            found = self._decided(scores, kept, share, limits, gone)
            note = f"These groups are not pruned, because their scores are not reliable ({named}). More images help."
        except TargetError:
            found = self._decided(scores, kept, share, self.limits, gone)
            note = (
                f"Scores that are not reliable were used, because the target requires it ({named}). More images help."
            )
        return replace(found, notes=(note, *found.notes))

    def _decided(
        self, scores: Mapping[str, Tensor], kept: Mapping[str, tuple[int, ...]], share: float, limits: Limits,
        gone: Sequence[str],
    ) -> Decision:  # fmt: skip
        def selector(scope: Scope, removed: Sequence[str]) -> Selector:
            comb = self.comb.without(removed)
            return Selector(comb, scores, limits, scope, self._weigh(comb), start)

        start, told = {name: len(channels) for name, channels in kept.items()}, tuple[str, ...]()
        if self.leaving is None:
            self.leaving, told = self._branches(selector, scores, limits, gone)
        if self.leaving:
            self.scopes = self.scopes[:1]
        elif len(self.scopes) > 1:
            self.scopes = self._near(selector)
        leaving = self.leaving[: math.ceil(share * len(self.leaving))]
        scopes, goal = self.scopes, self.goal
        if goal is None or share == 1:
            at_target = {scope: selector(scope, self.leaving) for scope in self.scopes}
            scope, keep, notes = self._at_target(at_target)
            scopes, goal = (scope,), self._figure(at_target[scope].comb.cost(self.counts(keep)))
            if share == 1:
                return Decision(keep, leaving, self.leaving, scopes, goal, (*told, *notes))
        chosen, full = selector(scopes[0], leaving), self._figure(self.comb.cost({}))
        plan = chosen.plan(chosen.meet(self._figure, full - (full - goal) * share))
        return Decision(dict(plan.groups), leaving, self.leaving, scopes, goal, told)

    def counts(self, keep: Mapping[str, tuple[int, ...]]) -> dict[Axis, int]:
        """The width of each axis."""
        return {group.axis: len(keep[group.name]) for group in self.comb.groups}

    def saw(self, plan: Plan, found: LatencyComparison) -> None:
        """Let the search go on from how fast a plan turned out to be."""
        self._timed = self.counts(plan.groups), found

    def would_meet(
        self, scores: Mapping[str, Tensor], kept: Mapping[str, tuple[int, ...]], removed: Sequence[str]
    ) -> Plan | None:
        """The plan that should be on target, by what was seen of another one; None where that is out of reach.

        Args:
            scores: as `decide` was given them last.
            kept: likewise.
            removed: the branches that have gone.
        """
        start, comb = {name: len(channels) for name, channels in kept.items()}, self.comb.without(removed)
        return self._expected(Selector(comb, scores, self.limits, self.scopes[0], self._weigh(comb), start))

    def _figure(self, cost: CostFigures) -> float:
        """What the schedule runs in: the target's figure of a cost, MACs for a measured target."""
        return float(cost.macs) if self.target.is_measured else self.target.of(cost)

    # ------------------------------------------------------------------------------ measured once

    def _weigh(self, comb: Comb) -> Weighing:
        """What a removed channel is weighed against."""
        latency = self._latency(comb) if self.normalization == "latency" else None
        return Weighing(self.normalization, self._exponent, latency)

    def _probe(self) -> LatencyProbe:
        """Times candidates beside the unpruned model."""
        found = self._found
        if found.probe is None:
            with self._stage("export"):
                call = self.comb.operations.call
                found.probe = LatencyProbe(
                    self.comb.model, call, threads=self._threads, others=self._others, runtime=self._runtime,
                    calibration=self._calibration,
                )  # fmt: skip
                found.spread = found.probe.spread()
        return found.probe

    def _latency(self, comb: Comb) -> LatencyModel | SlowestModel:
        """Predicts the latency of any widths of what is left of the model."""
        if self._found.latency is None:
            probe = self._probe()
            with self._stage("profile"):
                self._found.latency = latency_model(self.comb, probe)
        removal = self.comb.removal(comb.removed)
        return self._found.latency.without(removal.gone, removal.empty)

    def _original_ms(self) -> float:
        """The latency of the unpruned model."""
        if self._found.original_ms is None:
            self._found.original_ms = self._probe().original_ms()
        return self._found.original_ms

    # ------------------------------------------------------------------------------ branches

    def _branches(
        self, selector: Callable[[Scope, Sequence[str]], Selector], scores: Mapping[str, Tensor], limits: Limits,
        gone: Sequence[str],
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:  # fmt: skip
        """The branches that go until the target is reached, in their order, and what a user should know of it."""
        names = removable_branches(self.comb, limits) if limits.max_removed else []
        if not names or self._error_without is None:
            return tuple(gone), ()
        known = self._found.without
        known.update(self._error_without([name for name in names if name not in known]))
        errors, saved = {name: known[name] for name in names}, {name: self._saved(name) for name in names}
        order = in_order(self.comb, errors, saved, limits.max_removed, gone, self._stay)

        def candidate(number: int) -> Candidate | None:
            chosen = selector(self.scopes[0], order[: len(gone) + number])
            plan = self._expected(chosen)
            return None if plan is None else Candidate(_gone(chosen, scores, plan), lambda: self._roughly(plan))

        further = best_number([errors[name] for name in order[len(gone) :]], candidate)
        tried = {len(gone) + number: error for number, error in further.items()}
        best = len(gone) + chosen_number(further)
        told = ", ".join(f"{number}: {tried[number]:.3g}" for number in sorted(tried))
        named = f": {some(order[:best], NAMED)}" if best else ""
        by_number = f"Relative error of the logits at the target, by the number of branches removed: {told}."
        return tuple(order[:best]), (f"Branches removed: {best} of {len(names)}{named}. {by_number}",)

    def _near(self, selector: Callable[[Scope, Sequence[str]], Selector]) -> tuple[Scope, ...]:
        """The scopes that are worth being measured: whose error is about the least."""
        errors = dict[Scope, float]()
        for scope in self.scopes:
            plan = self._expected(selector(scope, ()))
            errors[scope] = math.inf if plan is None else self._roughly(plan)
        return tuple(scope for scope in self.scopes if errors[scope] <= ABOUT * min(errors.values()))

    def _roughly(self, plan: Plan) -> float:
        """About the error of the logits once a plan has been applied and recovered from; found once a decision."""
        if self._error_of is None:
            return 0.0
        if plan.digest not in self._errors:
            self._errors[plan.digest] = self._error_of(plan, True)
        return self._errors[plan.digest]

    def _saved(self, name: str) -> float:
        """What the target's figure loses without a branch."""
        without = self.comb.without([name])
        if self.target.is_measured:
            return self._latency(self.comb).milliseconds({}) - self._latency(without).milliseconds({})
        return self.target.of(self.comb.cost({})) - self.target.of(without.cost({}))

    def _expected(self, selector: Selector) -> Plan | None:
        """The plan that should be on target; None where that is out of reach."""
        if self.target.is_measured:
            search = self._search_of(selector)
            return search.plan() if search.is_in_reach() else None
        if self.target.of(selector.comb.cost(selector.least())) > self.target.absolute(self.comb.cost({})):
            return None
        return self._computed(selector)

    # ------------------------------------------------------------------------------ at the target

    def _at_target(self, selectors: Mapping[Scope, Selector]) -> tuple[Scope, Keep, tuple[str, ...]]:
        """The scope, the channels kept at the target, and what a user should know of it."""
        if not self.target.is_measured:
            ((chosen, selector),) = selectors.items()
            plan, notes = self._computed(selector), list[str]()
        else:
            chosen, plan, notes = self._measured(selectors)
        counts = self.counts(plan.groups)
        notes += [*_floor_note(selectors[chosen], counts), *self.bounds.notes(selectors[chosen].comb, counts)]
        return chosen, dict(plan.groups), (*notes, *plan.adjusted)

    def _measured(self, selectors: Mapping[Scope, Selector]) -> tuple[Scope, Plan, list[str]]:
        """The scope, the plan that is as fast as it should be, and a note of the scopes.

        Of two scopes the one is gone on with whose plan comes nearer to the model as it is, without training; what the
        prediction lacks differs between them, so each is measured once before they are compared.
        """
        searches = {scope: self._search_of(selector) for scope, selector in selectors.items()}
        plan: Plan | None = None
        try:
            chosen, told = self._nearest(searches)
            try:
                plan = searches[chosen].finish().plan
            except TargetError:
                if len(searches) == 1:
                    raise
                (chosen,) = (scope for scope in searches if scope != chosen)  # the prediction was wrong about it
                plan = searches[chosen].finish().plan
            notes = [f"Ranking scope: {chosen} (what should be on target: {told})."] if told else []
            if self._found.spread is not None:
                notes.append(
                    f"The device disagrees with itself by {self._found.spread:.1%} on one and the same model: no "
                    "target is met more closely than that."
                )
            return chosen, plan, notes
        finally:
            self.search = told_of(self.search, searches, plan)

    def _search_of(self, selector: Selector) -> Search:
        """A search for the widths whose speed is the one asked for, what is measured correcting its own predictions."""
        latency = self._latency(selector.comb)
        return Search(
            self.comb.model, selector, self._probe(), latency, self.target, self._original_ms(),
            self.tolerance, self.comb.cost({}).macs, self._timed, self.bounds,
        )  # fmt: skip

    def _nearest(self, searches: Mapping[Scope, Search]) -> tuple[Scope, str]:
        """The scope whose logits come nearest to those of the model as it is, without training; what each keeps."""
        if len(searches) == 1 or self._error_of is None:
            return next(iter(searches)), ""
        errors, shares = dict[Scope, float](), list[str]()
        for scope, search in searches.items():
            search.step()
            plan = search.plan()
            errors[scope] = self._error_of(plan, False)
            left = search.selector.comb.cost(self.counts(plan.groups)).macs / max(self.comb.cost({}).macs, 1)
            shares.append(f"{scope} keeps {left:.1%} of the MACs, relative error of the logits {errors[scope]:.3g}")
        return min(errors, key=lambda scope: errors[scope]), "; ".join(shares)

    def _computed(self, selector: Selector) -> Plan:
        full, least_widths = self.comb.cost({}), selector.least()
        least, goal = selector.comb.cost(least_widths), self.target.absolute(full)
        if self.target.of(least) > goal:
            shares = "parameters" if self.target.name == "target_params" else "macs"
            never = sum(self.comb.unused.values()) if shares == "parameters" else 0
            stands = obstacles(
                selector, lambda counts: self.target.of(selector.comb.cost(counts)),
                {"belongs to parameters that the forward never uses": never}, shares,
            )  # fmt: skip
            raise TargetError(
                f"{self.target.name}={self.target.value:g} cannot be reached: the narrowest widths allowed leave "
                f"{self.target.of(least):,.0f} of {self.target.of(full):,.0f}. What stands in the way: {stands}"
                + (f" {unused_sentence(self.comb.unused)}" if self.comb.unused else "")
            )
        self.bounds.check(selector.comb, least_widths)
        excess = partial(self.bounds.excess, selector.comb)
        return selector.plan(selector.meet(self.target.of, goal, excess if self.bounds.asked else None))


def _gone(selector: Selector, scores: Mapping[str, Tensor], plan: Plan) -> float:
    """The sum of the scores of the channels that go, beside those that have gone."""
    total = 0.0
    for group in selector.comb.open:
        found = scores[group.name].clone()
        found[list(plan.groups[group.name])] = 0.0
        total += float(found[found.isfinite()].sum())
    return total


def _floor_note(selector: Selector, counts: Mapping[Axis, int]) -> list[str]:
    """That some groups are as narrow as they may be, where there are any."""
    floored, limits = selector.at_floor(counts), selector.limits
    if not floored:
        return []
    return [
        f"{len(floored)} of {len(selector.comb.open)} groups are as narrow as the limits allow "
        f"(max_ratio={limits.max_ratio:g}, min_width={limits.min_width}): {some(floored, NAMED)}."
    ]
