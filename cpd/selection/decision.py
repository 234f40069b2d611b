"""Decide: which channels stay at each shrink of a run, so that the last one meets the target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from glob import escape
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cpd.algebra.axes import Axis
from cpd.coupling.comb import Comb
from cpd.coupling.cost import CostFigures, unused_sentence
from cpd.deploy.kernels import KernelTimes
from cpd.deploy.latency import LatencyProbe
from cpd.deploy.latency_model import LatencyModel
from cpd.errors import TargetError
from cpd.model.inputs import Call
from cpd.plan import Plan
from cpd.selection.obstacles import obstacles
from cpd.selection.search import Search
from cpd.selection.selector import Selector
from cpd.selection.weighing import Normalization, Scope, Weighing, by_capacity

if TYPE_CHECKING:
    from cpd.selection.limits import Limits
    from cpd.selection.target import Target

Keep = dict[str, tuple[int, ...]]
Stage = Callable[[str], AbstractContextManager[None]]
#: Groups that a note names.
NAMED = 8


@dataclass(frozen=True)
class Decision:
    """What stays after one shrink.

    Attributes:
        keep: {group name: channels that stay}.
        scopes: the scopes that are still in question.
        goal: the figure that the schedule runs in, at the target.
        notes: what a user should know of it.
    """

    keep: Keep
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
        threads: of ONNX Runtime when timing.
        others: further inputs that a measured target holds for.
        error_of: the error of the logits once a plan has been applied and recovered from, without training; None
            where there is no data.
        stage: a context manager for each stage by name.

    Attributes:
        scopes: those still in question.
        goal: the figure that the schedule runs in, at the target; None before the first decision.
        search: one dict a measured candidate (scope, macs_ratio, predicted, speedup).
        probe: times candidates beside the unpruned model; None until something is timed.
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
        threads: int,
        others: tuple[Call, ...],
        error_of: Callable[[Plan], float] | None,
        stage: Stage,
    ) -> None:
        self.comb, self.target, self.limits = comb, target, limits
        self.tolerance, self.threads, self._others = tolerance, threads, others
        by_default: Normalization = ("latency" if target.is_measured else "none") if data_free else "macs"
        self.normalization: Normalization = normalization or by_default
        self._exponent, self._by_capacity = exponent, data_free and self.normalization == "latency"
        several: tuple[Scope, ...] = ("global", "group") if target.is_measured and not data_free else ("global",)
        self.scopes: tuple[Scope, ...] = (scope,) if scope else several
        self.goal: float | None = None
        self.search: list[dict[str, Any]] = []
        self.probe: LatencyProbe | None = None
        self._error_of, self._stage = error_of, stage
        self._weighing: Weighing | None = None
        self._latency_model: LatencyModel | None = None
        self._latency_models: dict[Scope, LatencyModel] = {}
        self._unpruned_ms: float | None = None

    def decide(
        self,
        scores: Mapping[str, Tensor],
        kept: Mapping[str, tuple[int, ...]],
        share: float,
        untrusted: Mapping[str, str] = MappingProxyType({}),
    ) -> Decision:
        """What stays after this shrink: of the way to the target as much as the schedule says.

        Args:
            scores: {group name: Tensor[size]}, -inf where a channel has gone.
            kept: {group name: channels that are left}.
            share: of what is to go, how much has gone after this shrink.
            untrusted: {group name: why its scores say too little}: these stay whole, where the target allows it.

        Raises:
            TargetError: the target is out of reach.
        """
        scores = by_capacity(self.comb, scores) if self._by_capacity else scores
        if not untrusted:
            return self._decided(scores, kept, share, self.limits)
        told = [f"{name}: {why}" for name, why in untrusted.items()]
        named = "; ".join([*told[:NAMED], *([f"and {len(told) - NAMED} more"] if len(told) > NAMED else [])])
        whole = {escape(name): 0.0 for name in untrusted if len(kept[name]) == len(scores[name])}
        try:
            found = self._decided(scores, kept, share, replace(self.limits, ratios={**self.limits.ratios, **whole}))
            note = f"Left whole, for their scores say too little ({named}). More images help."
        except TargetError:
            found = self._decided(scores, kept, share, self.limits)
            note = f"Scores that say too little were used, since the target needs it ({named}). More images help."
        return replace(found, notes=(note, *found.notes))

    def _decided(
        self, scores: Mapping[str, Tensor], kept: Mapping[str, tuple[int, ...]], share: float, limits: Limits
    ) -> Decision:
        weighing, start = self._weigh(), {name: len(channels) for name, channels in kept.items()}
        selectors = {scope: Selector(self.comb, scores, limits, scope, weighing, start) for scope in self.scopes}
        scopes, goal = self.scopes, self.goal
        if goal is None or share == 1:
            scope, keep, notes = self._at_target(selectors)
            scopes, goal = (scope,), self._figure(self.comb.cost(self.counts(keep)))
            if share == 1:
                return Decision(keep, scopes, goal, notes)
        (selector,) = (selectors[scope] for scope in scopes)
        full = self._figure(self.comb.cost({}))
        plan = selector.plan(selector.meet(self._figure, full - (full - goal) * share))
        return Decision(dict(plan.groups), scopes, goal)

    def counts(self, keep: Mapping[str, tuple[int, ...]]) -> dict[Axis, int]:
        """The width of each axis."""
        return {group.axis: len(keep[group.name]) for group in self.comb.groups}

    def _figure(self, cost: CostFigures) -> float:
        """What the schedule runs in: the target's figure of a cost, MACs for a measured target."""
        return float(cost.macs) if self.target.is_measured else self.target.of(cost)

    # ------------------------------------------------------------------------------ measured once

    def _weigh(self) -> Weighing:
        """What a removed channel is weighed against."""
        if self._weighing is None:
            latency = self._latency() if self.normalization == "latency" else None
            self._weighing = Weighing(self.normalization, self._exponent, latency)
        return self._weighing

    def _probe(self) -> LatencyProbe:
        """Times candidates beside the unpruned model."""
        if self.probe is None:
            with self._stage("export"):
                call = self.comb.operations.call
                self.probe = LatencyProbe(self.comb.model, call, threads=self.threads, others=self._others)
        return self.probe

    def _latency(self, scope: Scope | None = None) -> LatencyModel:
        """Predicts the latency of any widths, corrected by what was measured of one scope's candidates."""
        if self._latency_model is None:
            probe = self._probe()
            with self._stage("profile"):
                self._latency_model = LatencyModel(self.comb, probe.profile(), KernelTimes(self.threads))
        if scope is None:
            return self._latency_model
        return self._latency_models.setdefault(scope, self._latency_model.unobserved())

    def _original_ms(self) -> float:
        """The latency of the unpruned model."""
        if self._unpruned_ms is None:
            self._unpruned_ms = self._probe().original_ms()
        return self._unpruned_ms

    # ------------------------------------------------------------------------------ at the target

    def _at_target(self, selectors: Mapping[Scope, Selector]) -> tuple[Scope, Keep, tuple[str, ...]]:
        """The scope, the channels kept at the target, and what a user should know of it."""
        if not self.target.is_measured:
            ((chosen, selector),) = selectors.items()
            plan, notes = self._computed(selector), list[str]()
        else:
            chosen, plan, notes = self._measured(selectors)
        notes += self._floor_note(selectors[chosen], plan)
        return chosen, dict(plan.groups), (*notes, *plan.adjusted)

    def _measured(self, selectors: Mapping[Scope, Selector]) -> tuple[Scope, Plan, list[str]]:
        """The scope, the plan that is as fast as it should be, and a note of the scopes.

        Of two scopes the one is gone on with whose plan comes nearer to the model as it is, without training; what the
        prediction lacks differs between them, so each is measured once before they are compared.
        """
        searches = {
            scope: Search(
                self.comb.model, selector, self._probe(), self._latency(scope), self.target, self._original_ms(),
                self.tolerance,
            )
            for scope, selector in selectors.items()
        }  # fmt: skip
        try:
            chosen, told = self._nearest(searches)
            try:
                plan = searches[chosen].finish().plan
            except TargetError:
                if len(searches) == 1:
                    raise
                (chosen,) = (scope for scope in searches if scope != chosen)  # the prediction was wrong about it
                plan = searches[chosen].finish().plan
            return chosen, plan, [f"Ranking scope: {chosen} (what should be on target: {told})."] if told else []
        finally:
            self.search += [
                {"scope": scope, "macs_ratio": t.macs_ratio, "predicted": t.predicted, "speedup": t.speedup}
                for scope, search in searches.items()
                for t in search.tried
            ]

    def _nearest(self, searches: Mapping[Scope, Search]) -> tuple[Scope, str]:
        """The scope whose logits come nearest to those of the model as it is, without training; what each keeps."""
        if len(searches) == 1 or self._error_of is None:
            return next(iter(searches)), ""
        errors, shares = dict[Scope, float](), list[str]()
        for scope, search in searches.items():
            search.step()
            plan = search.plan()
            errors[scope] = self._error_of(plan)
            left = self.comb.cost(self.counts(plan.groups)).macs / max(self.comb.cost({}).macs, 1)
            shares.append(f"{scope} keeps {left:.1%} of the MACs, relative error of the logits {errors[scope]:.3g}")
        return min(errors, key=lambda scope: errors[scope]), "; ".join(shares)

    def _floor_note(self, selector: Selector, plan: Plan) -> list[str]:
        floored = selector.at_floor(self.counts(plan.groups))
        if not floored:
            return []
        return [
            f"{len(floored)} of {len(self.comb.open)} groups are as narrow as the limits allow "
            f"(max_ratio={self.limits.max_ratio:g}, min_width={self.limits.min_width}): {', '.join(floored[:NAMED])}"
            f"{', …' if len(floored) > NAMED else '.'}"
        ]

    def _computed(self, selector: Selector) -> Plan:
        full, least = self.comb.cost({}), self.comb.cost(selector.least())
        goal = self.target.absolute(full)
        if self.target.of(least) > goal:
            shares = "parameters" if self.target.name == "target_params" else "macs"
            never = sum(self.comb.unused.values()) if shares == "parameters" else 0
            stands = obstacles(
                selector, lambda counts: self.target.of(self.comb.cost(counts)),
                {"is of parameters that the forward never uses": never}, shares,
            )  # fmt: skip
            raise TargetError(
                f"{self.target.name}={self.target.value:g} cannot be reached: the narrowest widths allowed leave "
                f"{self.target.of(least):,.0f} of {self.target.of(full):,.0f}. What stands in the way: {stands}"
                + (f" {unused_sentence(self.comb.unused)}" if self.comb.unused else "")
            )
        return selector.plan(selector.meet(self.target.of, goal))
