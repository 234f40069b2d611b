"""Prune: score, select, shrink and make up for what went, at once or a little at a time while a model is trained.

`cpd.compress` drives a `Pruner` from its own training loop; another loop calls `step()` after each optimizer step:

    pruner = cpd.Pruner(model, images, target_macs=0.5, optimizer=optimizer, steps=epochs * len(loader))
    for epoch in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss(model(images), labels).backward()
            optimizer.step()
            pruner.step()
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cpd import processes
from cpd.algebra.axes import Axis
from cpd.coupling.comb import Comb
from cpd.coupling.comb import comb as comb_model
from cpd.coupling.cost import CostFigures
from cpd.criteria import CRITERIA, DATA_FREE, TARGET_FREE, Criterion
from cpd.criteria.gates import Gates
from cpd.criteria.score import score
from cpd.deploy.kernels import KernelTimes
from cpd.deploy.latency import LatencyProbe
from cpd.deploy.latency_model import LatencyModel
from cpd.errors import CheckpointError, InputError, NothingToPruneError, PlanError, TargetError
from cpd.model.inputs import batches, check_model, device_of
from cpd.model.skeleton import skeleton
from cpd.model.task_loss import LossFunction
from cpd.model.tensors import copy_of, named_tensors
from cpd.plan import Plan
from cpd.randomness import random_states_kept, seeded
from cpd.selection.limits import check_limits, check_ratios
from cpd.selection.schedule import Schedule
from cpd.selection.search import predicted, reach
from cpd.selection.selector import Scope, Selector
from cpd.selection.target import check_target
from cpd.selection.weighing import Normalization, Weighing, by_capacity
from cpd.surgery.masked import masked_error
from cpd.surgery.optimizer_state import narrow_state, narrowed_state
from cpd.surgery.recovery import Recovery, recover
from cpd.surgery.shrink import shrink

log = logging.getLogger("cpd")

Stage = Callable[[str], AbstractContextManager[None]]
#: Two plans leave as much if the MACs of one are at least this share of the other's.
AS_MUCH = 0.9
#: Added to the seed for the order of the data on which scores are taken, to tell it from that of an epoch.
SCORING = 1 << 20
#: The criterion that is read off the gradients of a training, at no cost.
FROM_TRAINING = "taylor"


@dataclass(frozen=True)
class Shrink:
    """One shrink of a model.

    Attributes:
        step: optimizer steps before it.
        share: of what is to go, how much has gone with it.
        macs: multiply-accumulates of one pass over the example inputs that are left.
        parameters: parameters that are left.
        plan_hash: SHA-256 of all positions kept by now, the same in every process and every run of one seed.
    """

    step: int
    share: float
    macs: int
    parameters: int
    plan_hash: str


class Pruner:
    """Shrinks a model in place, on a schedule, while it is trained.

    Parameters stay the same objects and the optimizer's state is sliced with them, so that training goes on. Under
    `torch.distributed` every process makes a `Pruner` of the unwrapped model and calls it alike; after a shrink drop
    the `DistributedDataParallel` (`del`, `gc.collect()`) and wrap the model anew, for it knows the old shapes.

    Args:
        model: the model that is trained; shrunk in place.
        example_inputs: a tensor, a tuple, or (tuple, dict), as for `cpd.comb`.
        target_speedup: as `cpd.compress` takes it; this or exactly one of the next four.
        target_latency_ms: likewise.
        target_macs: likewise.
        target_params: likewise.
        target_memory: likewise.
        steps: optimizer steps of the whole training, of which the schedule takes its shares.
        schedule: a `Schedule` or its kind, "one-shot", "linear" or "cubic".
        optimizer: whose state is sliced; None if there is none yet.
        data: batches that scores and compensation are taken over; None: scores are read off the gradients that the
            training leaves in `parameter.grad` (so call `step` before `zero_grad`), and nothing is compensated.
        loss: `loss(output, target) -> scalar`, for scores; cross-entropy is inferred for class targets.
        criterion: a name in `cpd.criteria.CRITERIA` or a callable; None: "obs" with data, "taylor" without, which is
            always read off the training's gradients where there are any.
        normalization: what scores are divided by what is saved of; None: "macs", for criteria without data "latency"
            where the target is measured and "none" elsewhere.
        exponent: score / saved^exponent.
        scope: among what scores are compared; None: "global", and for a measured speed-up "group" too, of which the
            better is kept.
        compensation: whether what was removed is made up for in closed form.
        score_batches: batches of `data` that are used at most.
        round_to: widths are kept to multiples of this.
        max_ratio: the largest share of a group that may go.
        min_width: the fewest positions that a group may keep.
        ratios: {pattern of group names: share that goes}, for groups that you decide on.
        tolerance: how far from a target speed-up the search may end, as a fraction.
        threads: ONNX Runtime's threads when timing.
        latency_inputs: further batches that a measured target holds for: the slowest counts.
        seed: of the scores.
        comb: the comb of `model`, if there is one already.
        stage: a context manager for each stage by name, to time or show it.

    Attributes:
        plan: what is kept of the model as it was given, so far.
        shrinks: what has been done.
        comb: the comb of the model as it was given.
        steps_taken: calls of `step` so far.
        notes: what a user should know of it, sentence by sentence.

    Raises:
        InputError: an unusable argument.
        TraceError: the model cannot be exported.
        NothingToPruneError: no group can be pruned; the message says why, group by group.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        target_speedup: float | None = None,
        target_latency_ms: float | None = None,
        target_macs: float | None = None,
        target_params: float | None = None,
        target_memory: float | None = None,
        steps: int,
        schedule: Schedule | str = "cubic",
        optimizer: torch.optim.Optimizer | None = None,
        data: Iterable[Any] | None = None,
        loss: LossFunction | None = None,
        criterion: str | Criterion | None = None,
        normalization: Normalization | None = None,
        exponent: float = 1.0,
        scope: Scope | None = None,
        compensation: bool = True,
        score_batches: int = 16,
        round_to: int = 8,
        max_ratio: float = 0.9,
        min_width: int = 1,
        ratios: Mapping[str, float] | None = None,
        tolerance: float = 0.05,
        threads: int = 1,
        latency_inputs: Sequence[Any] = (),
        seed: int = 0,
        comb: Comb | None = None,
        stage: Stage | None = None,
    ) -> None:
        self.model, self.optimizer = check_model(model), optimizer
        self.target = check_target(target_speedup, target_latency_ms, target_macs, target_params, target_memory)
        self.limits = check_limits(round_to, max_ratio, min_width, ratios or {}, tolerance, threads, score_batches)
        self._stage = stage or (lambda _: nullcontext())
        self._events = Schedule.of(schedule).events(steps)
        self.data = None if data is None else processes.Share(data, score_batches)
        self.loss, self.score_batches, self.compensation = loss, score_batches, compensation
        self.tolerance, self.threads, self.seed = tolerance, threads, seed
        if comb is None:
            with self._stage("comb"):
                comb = comb_model(skeleton(model, {}), example_inputs)  # the model itself will not stay as it is
        self.comb = comb
        if not self.comb.open:
            reasons = "\n".join(f"  {group.name} ({group.size}): {group.frozen}" for group in self.comb.groups)
            raise NothingToPruneError(f"No group of {type(model).__name__} can be pruned:\n{reasons}")
        check_ratios(self.comb, self.limits)
        self.criterion, self.why = self._choose_criterion(criterion)
        self._exponent, self._normalization = exponent, normalization
        several = self.target.is_measured and self.criterion not in DATA_FREE
        self._scopes: tuple[Scope, ...] = (scope,) if scope else ("global", "group") if several else ("global",)
        self._weighing: Weighing | None = None
        self._goal: float | None = None
        self.probe: LatencyProbe | None = None
        self._latency_model: LatencyModel | None = None
        self._unpruned_ms: float | None = None
        self._latency_inputs = tuple(latency_inputs)
        self.plan = self.comb.plan({})
        self.steps_taken = 0
        self.shrinks: list[Shrink] = []
        self.notes: list[str] = []
        self.search: list[dict[str, Any]] = []
        self.checks: dict[str, float] = {}
        self._restart_sums()

    # ------------------------------------------------------------------------------ when

    @property
    def done(self) -> bool:
        """Whether the last shrink is behind."""
        return len(self.shrinks) == len(self._events)

    @property
    def due(self) -> bool:
        """Whether a shrink is due after the steps taken so far."""
        return not self.done and self._events[len(self.shrinks)][0] <= self.steps_taken

    def step(self) -> bool:
        """Note one optimizer step, with the gradients it was taken on; shrink if it is time. True if it shrank.

        Raises:
            TargetError: the target is out of reach.
            TrainingError: scores are not finite, the optimizer's state cannot be sliced, or processes disagree.
                The model is then as it was.
        """
        if self.done:
            return False
        self.steps_taken += 1
        if self._accumulates:
            self._accumulate()
        if not self.due:
            return False
        self.prune()
        return True

    def prune(self, between: Callable[[], None] | None = None) -> Shrink:
        """Make the next shrink now.

        Args:
            between: called between the shrink and what makes up for it.
        """
        share = self._events[len(self.shrinks)][1]
        with random_states_kept(), seeded(self.data, self.seed + SCORING + len(self.shrinks)):
            with self._stage("score"):
                scores = self._scores()
            with self._stage("select"):
                plan = self._select(scores, share)
            processes.check_same(plan.digest, "plan")
            left = self.comb.cost(self._counts(plan))
            self._shrink(plan, between)
        self.shrinks.append(Shrink(self.steps_taken, share, left.macs, left.parameters, plan.digest))
        log.info(
            "Shrink %d of %d: %s MACs and %s parameters left",
            len(self.shrinks), len(self._events), f"{left.macs:,}", f"{left.parameters:,}",
        )  # fmt: skip
        self._restart_sums()
        return self.shrinks[-1]

    # ------------------------------------------------------------------------------ score

    def _choose_criterion(self, criterion: str | Criterion | None) -> tuple[str | Criterion, str]:
        """The criterion, and why this one."""
        if criterion is None and self.data is None:
            return FROM_TRAINING, "it is read off the gradients of the training."
        if criterion is None:
            return "obs", "data was given, so what removal costs once the rest is refitted can be estimated."
        if isinstance(criterion, str) and criterion not in CRITERIA:
            raise InputError(f"Unknown criterion {criterion!r}; known are {', '.join(CRITERIA)}.")
        if criterion in DATA_FREE or criterion == FROM_TRAINING or (self.data is None and callable(criterion)):
            return criterion, "as asked for."
        if self.data is None:
            raise InputError(f"criterion={criterion!r} needs data: pass data=loader, or take {FROM_TRAINING!r}.")
        if criterion not in TARGET_FREE and self.loss is None and next(batches(self.data, 1)).target is None:
            raise InputError(f"criterion={criterion!r} needs targets or a loss, and the data has none: pass loss=….")
        return criterion, "as asked for."

    @property
    def criterion_name(self) -> str:
        """What the scores are."""
        given = self.criterion
        return given if isinstance(given, str) else getattr(given, "__name__", type(given).__name__)

    @property
    def normalization(self) -> Normalization:
        """What scores are divided by what is saved of."""
        if self._normalization is not None:
            return self._normalization
        if self.criterion in DATA_FREE:
            return "latency" if self.target.is_measured else "none"
        return "macs"

    @property
    def _accumulates(self) -> bool:
        """Whether scores are read off the training's gradients."""
        return self.criterion == FROM_TRAINING

    def _restart_sums(self) -> None:
        self._gates = Gates(self.comb.narrowed(self.model, self.plan)) if self._accumulates else None
        self._sums = [] if self._gates is None else [torch.zeros(site.size) for site in self._gates.sites]
        self._count = 0

    @torch.no_grad()
    def _accumulate(self) -> None:
        """Add (dL/dm_u)^2 of this step's gradients, as `cpd.criteria.first_order.taylor` does batch by batch."""
        assert self._gates is not None
        weights = named_tensors(self.model)
        found = self._gates.reduce(lambda name: None if (g := weights[name].grad) is None else g * weights[name])
        self._sums = [sums.to(value.device) + value.square() for sums, value in zip(self._sums, found, strict=True)]
        self._count += 1

    def _scores(self) -> dict[str, Tensor]:
        """{group: Tensor[size in the unpruned model]}; -inf where a position has gone."""
        if self._gates is not None and self._count:
            found = self._gates.sum([sums / self._count for sums in self._sums])
        elif self._accumulates and self.data is None:
            raise InputError(
                "Nothing is known of the gradients yet: call step() after backward() and before zero_grad(), or "
                "pass data=loader."
            )
        else:
            found = score(
                self.model, self.comb.narrowed(self.model, self.plan), self.data, self.loss, criterion=self.criterion,
                limit=self.score_batches, seed=self.seed + len(self.shrinks), total=processes.total,
            )  # fmt: skip
        whole = {}
        for group in self.comb.open:
            whole[group.name] = torch.full((group.size,), -math.inf, dtype=torch.float64)
            whole[group.name][list(self.plan.groups[group.name])] = found[group.name].to("cpu", torch.float64)
        by_weight = self.criterion in DATA_FREE and self.normalization == "latency"
        return by_capacity(self.comb, whole) if by_weight else whole

    # ------------------------------------------------------------------------------ select

    def _counts(self, plan: Plan) -> dict[Axis, int]:
        return {group.axis: len(plan.groups[group.name]) for group in self.comb.groups}

    def _figure(self, cost: CostFigures) -> float:
        """What the schedule runs in: the target's figure of a cost, MACs for a measured target."""
        return float(cost.macs) if self.target.is_measured else self.target.of(cost)

    def _select(self, scores: Mapping[str, Tensor], share: float) -> Plan:
        """What stays after this shrink: of the way to the target as much as the schedule says."""
        if self.target.is_measured or self.normalization == "latency":  # by a stop watch: the first process's
            ranks = repr([torch.argsort(scores[group.name], stable=True).tolist() for group in self.comb.open])
            processes.check_same(hashlib.sha256(ranks.encode()).hexdigest(), "ranking of the positions")
            keep, self._scopes, self._goal, told = processes.from_first(lambda: self._decided(scores, share))
        else:
            keep, self._scopes, self._goal, told = self._decided(scores, share)
        if share == 1:
            for text in told:
                self.note(text)
        return self.comb.plan(keep)

    def _decided(
        self, scores: Mapping[str, Tensor], share: float
    ) -> tuple[dict[str, tuple[int, ...]], tuple[Scope, ...], float, list[str]]:
        """The positions that stay; the scope, the figure at the target, and what a user should know of it."""
        weighing = self._weigh()
        start = {name: len(positions) for name, positions in self.plan.groups.items()}
        selectors = {s: Selector(self.comb, scores, self.limits, s, weighing, start) for s in self._scopes}
        scopes, goal = self._scopes, self._goal
        told: list[str] = []
        if goal is None or share == 1:
            scope, keep, told = self._at_target(selectors)
            scopes, goal = (scope,), self._figure(self.comb.cost(self._counts(self.comb.plan(keep))))
            if share == 1:
                return keep, scopes, goal, told
        (selector,) = (selectors[scope] for scope in scopes)
        full = self._figure(self.comb.cost({}))
        plan = selector.plan(selector.meet(self._figure, full - (full - goal) * share))
        return dict(plan.groups), scopes, goal, told

    def _weigh(self) -> Weighing:
        """What a removed position is weighed against; what has to be measured for it is measured once."""
        if self._weighing is None:
            latency = self._latency() if self.normalization == "latency" else None
            self._weighing = Weighing(self.normalization, self._exponent, latency)
        return self._weighing

    def _probe(self) -> LatencyProbe:
        """Times candidates beside the unpruned model."""
        if self.probe is None:
            with self._stage("export"):
                call = self.comb.operations.call
                self.probe = LatencyProbe(self.comb.model, call, threads=self.threads, others=self._latency_inputs)
        return self.probe

    def _latency(self) -> LatencyModel:
        """Predicts the latency of any widths."""
        if self._latency_model is None:
            probe = self._probe()
            with self._stage("profile"):
                self._latency_model = LatencyModel(self.comb, probe.profile(), KernelTimes(self.threads))
        return self._latency_model

    def _at_target(self, selectors: Mapping[Scope, Selector]) -> tuple[Scope, dict[str, tuple[int, ...]], list[str]]:
        """The scope, the positions kept at the target, and what a user should know of it.

        Of two that meet the target, the one that leaves more MACs is kept; where both leave as much, the one that
        comes nearer to the model as it is without training.
        """
        plans = {scope: self._predicted(selector) for scope, selector in selectors.items()}
        macs = {scope: self.comb.cost(self._counts(plan)).macs for scope, plan in plans.items()}
        chosen = self._nearest({s: plan for s, plan in plans.items() if macs[s] >= AS_MUCH * max(macs.values())})
        try:
            plans[chosen] = self._meet(selectors[chosen])
        except TargetError:
            others = [scope for scope in plans if scope != chosen]
            if not others:
                raise
            (chosen,) = others  # the prediction was wrong about it
            plans[chosen] = self._meet(selectors[chosen])
        notes = []
        if len(plans) > 1:
            full = max(self.comb.cost({}).macs, 1)
            told = ", ".join(f"{scope} {found / full:.1%}" for scope, found in macs.items())
            notes.append(f"Scores compared by scope {chosen!r} (share of the MACs left at the target: {told}).")
        floored = selectors[chosen].at_floor(self._counts(plans[chosen]))
        if floored:
            notes.append(
                f"{len(floored)} of {len(self.comb.open)} groups stand at the fewest positions that they may keep "
                f"(max_ratio={self.limits.max_ratio:g}, min_width={self.limits.min_width}): {', '.join(floored[:8])}"
                f"{', …' if len(floored) > 8 else '.'}"
            )
        return chosen, dict(plans[chosen].groups), [*notes, *plans[chosen].adjusted]

    def _nearest(self, plans: Mapping[Scope, Plan]) -> Scope:
        """Of several plans the one whose logits come nearest to those of the model as it is, without training."""
        if len(plans) == 1 or self.data is None:
            return next(iter(plans))
        errors = {}
        for scope, plan in plans.items():
            step = plan.since(self.plan)
            narrower = shrink(copy_of(self.model), step)
            errors[scope] = min(self._recovered(narrower, self.model, step).errors.values())
        return min(errors, key=lambda scope: errors[scope])

    def _predicted(self, selector: Selector) -> Plan:
        """The plan of one selector that should meet the target; the final one, where nothing need be measured."""
        if not self.target.is_measured:
            return self._meet(selector)
        return selector.plan(predicted(selector, self._latency(), self.target.speedup(self._original_ms())))

    def _original_ms(self) -> float:
        """The latency of the unpruned model, taken once."""
        if self._unpruned_ms is None:
            self._unpruned_ms = self._probe().original_ms()
        return self._unpruned_ms

    def _meet(self, selector: Selector) -> Plan:
        """The plan of one selector that meets the target."""
        if self.target.is_measured:
            best, tried = reach(
                self.comb.model, selector, self._probe(), self._latency(), self.target, self._original_ms(),
                self.tolerance,
            )  # fmt: skip
            self.search += [
                {
                    "scope": selector.scope, "macs_ratio": item.macs_ratio, "predicted": item.predicted,
                    "speedup": item.speedup,
                }
                for item in tried
            ]  # fmt: skip
            return best.plan
        full, least = self.comb.cost({}), self.comb.cost(selector.least())
        goal = self.target.absolute(full)
        if self.target.of(least) > goal:
            frozen = [f"{group.name}: {group.frozen}" for group in self.comb.groups if group.frozen][:8]
            raise TargetError(
                f"{self.target.name}={self.target.value:g} cannot be reached: the narrowest widths allowed leave "
                f"{self.target.of(least):,.0f} of {self.target.of(full):,.0f}. "
                + (f"Frozen groups stand in the way: {'; '.join(frozen)}." if frozen else "No group is frozen.")
            )
        return selector.plan(selector.meet(self.target.of, goal))

    # ------------------------------------------------------------------------------ shrink

    def _shrink(self, plan: Plan, between: Callable[[], None] | None) -> None:
        """Apply what is new of a plan to the model and to the optimizer's state, and make up for it."""
        first, step = not self.plan.kept, plan.since(self.plan)
        if not step.kept:  # widths come in steps, and this one was too small for one
            return
        entries = [] if self.optimizer is None else narrowed_state(self.optimizer, self.model, step)
        before = copy_of(self.model) if first or self.data is not None else None
        with self._stage("shrink"):
            shrink(self.model, step)
            narrow_state(entries)
            self.plan = plan
        if first:
            assert before is not None
            with self._stage("check"):
                device = device_of(self.comb.model)
                there = self.model if device_of(self.model) == device else copy_of(self.model).to(device)
                self.checks["masked equals shrunk"] = masked_error(before.to(device), there, self.comb, plan)
        if between is not None:
            between()
        if self.data is None:
            return
        assert before is not None
        with self._stage("recover"):
            found = processes.from_first(lambda: self._recovered(self.model, before.to(device_of(self.model)), step))
            processes.copy_from_first(named_tensors(self.model).values())
        self.note(str(found) if len(self._events) == 1 else f"Shrink {len(self.shrinks) + 1}: {found}")
        if found.failure is not None:
            self.note(f"Compensation was not possible: {found.failure}")

    def _recovered(self, narrower: nn.Module, wider: nn.Module, step: Plan) -> Recovery:
        assert self.data is not None
        return recover(narrower, wider, step, self.data, limit=self.score_batches, compensation=self.compensation)

    def note(self, text: str) -> None:
        """Say something to the user, now and in the report."""
        self.notes.append(text)
        log.info(text)

    # ------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on: plain types and tensors, as `cpd.checkpoint` writes them."""
        return {
            "plan": {name: list(positions) for name, positions in self.plan.groups.items()},
            "digest": self.plan.digest,
            "steps_taken": self.steps_taken,
            "shrinks": [asdict(item) for item in self.shrinks],
            "scopes": list(self._scopes),
            "goal": self._goal,
            "notes": list(self.notes),
            "search": list(self.search),
            "checks": dict(self.checks),
            "sums": list(self._sums),
            "count": self._count,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state: the model, as it was given, is shrunk to what it says. Weights are not in it.

        Load the weights of model and optimizer after it.

        Raises:
            CheckpointError: if the state is of another model or version, or the model has been shrunk already.
        """
        if self.shrinks:
            raise CheckpointError("This pruner has shrunk its model already: make a new one of the unpruned model.")
        try:
            plan = self.comb.plan(state["plan"])
            if plan.digest != state["digest"]:
                raise CheckpointError("The state is of another model: its plan means other positions of this one.")
            shrinks = [Shrink(**item) for item in state["shrinks"]]
            scopes, sums = tuple(state["scopes"]), list(state["sums"])
        except (KeyError, TypeError, ValueError, PlanError) as error:
            raise CheckpointError(f"The state is not of this model: {type(error).__name__}: {error}.") from error
        shrink(self.model, plan)
        self.plan, self.shrinks, self.steps_taken = plan, shrinks, int(state["steps_taken"])
        self._scopes, self._goal = scopes, state["goal"]
        self.notes, self.search, self.checks = list(state["notes"]), list(state["search"]), dict(state["checks"])
        self._restart_sums()
        if self._gates is not None:
            self._sums, self._count = sums, int(state["count"])
