"""Prune: score, select, shrink and make up for what went, at once or a little at a time while a model is trained.

`cpd.compress` drives a `Pruner` from its own training loop; another loop calls `step()` after each optimizer step:

    pruner = cpd.Pruner(
        model, images, target_macs=0.5, schedule="cubic", optimizer=optimizer, steps=epochs * len(loader)
    )
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import nn

from cpd import processes
from cpd.config import PRUNING, PruneConfig
from cpd.coupling.branches import Branch
from cpd.coupling.comb import COMB, Comb
from cpd.coupling.notes import left_alone_sentence, notes_of
from cpd.criteria import DATA_FREE
from cpd.criteria.accumulated import AccumulatedScores
from cpd.criteria.asked import BATCHES, Asked, samples_asked
from cpd.criteria.choice import FROM_TRAINING, choose_criterion, criterion_name
from cpd.criteria.regularization import Penalty, Regularizer
from cpd.criteria.score import Scores, score, whole_scores
from cpd.deploy.latency import COMPARISON, LatencyComparison, LatencyProbe
from cpd.errors import CheckpointError, InputError, of_the_user
from cpd.model.allocator import memory_reused
from cpd.model.arguments import INPUTS, MODEL, OPTIMIZER, REPEATED_DATA
from cpd.model.inputs import batches, check_model, device_of, of_shape
from cpd.model.masks import masks_applied
from cpd.model.progress import part
from cpd.model.randomness import random_states_kept, seeded
from cpd.model.tensors import copy_of, named_tensors
from cpd.options import LOSS, Check, checked, function, integer, takes_options, text
from cpd.plan import Plan
from cpd.selection.bounds import Bounds
from cpd.selection.branching import check_branches
from cpd.selection.combed import comb_to_prune
from cpd.selection.common import COMMON, Common
from cpd.selection.decision import Decider
from cpd.selection.limits import check_ratios, ratios_notes
from cpd.selection.state import Shrink, state_of
from cpd.selection.weighing import Normalization, by_capacity
from cpd.surgery.masked import masked_error
from cpd.surgery.optimizer_state import drop_parameters, narrow_state, narrowed_state
from cpd.surgery.recovery import Recovery, recover
from cpd.surgery.shrink import shrink
from cpd.surgery.trials import Trials
from cpd.tasks.loss import LossFunction

log = logging.getLogger("cpd")

Stage = Callable[[str], AbstractContextManager[None]]
#: Added to the seed for the order of the data on which scores are taken, to tell it from that of an epoch.
SCORING = 1 << 20


@contextmanager
def _entered(stage: Stage, name: str) -> Iterator[None]:
    """A stage of the user's; what fails in it is not the user's."""
    with ExitStack() as stack:
        with of_the_user("stage", f"for {name!r}"):
            stack.enter_context(stage(name))
        yield


@takes_options(PruneConfig)
class Pruner:
    """Prunes a model in place, on a schedule, while your own loop trains it.

    Parameters stay the same objects, and the optimizer's state is sliced with them, so training can continue. With
    `torch.distributed`, every process makes a `Pruner` of the unwrapped model and calls it in the same way. After a
    pruning step, delete the `DistributedDataParallel` (`del`, `gc.collect()`) and wrap the model again.

    Args:
        model: The model that is trained. It is pruned in place.
        example_inputs: A tensor, a tuple, or (tuple, dict), as for `cpd.comb`.
        steps: Number of optimizer steps of the whole training. The schedule is given in fractions of it.
        optimizer: The optimizer whose state is sliced. It can be set later (`pruner.optimizer`).
        data: Batches for scores and compensation. Without data, scores come from the gradients that the training
            leaves in `parameter.grad` (so call `step` before `zero_grad`), and nothing is refitted.
        loss: `loss(output, target) -> scalar`, for scores. Default: cross-entropy if the targets are classes.
        config: Options held together. Options given by name replace those in it.
        comb: The comb of `model`, if it was made already. The outputs that it was made for apply.
        stage: A function that takes the name of a stage and returns a context manager, to time or show the stage.
        common: Results shared with pruners of the same model for other targets, with the same data and options.
        options: The options of `cpd.PruneConfig`, by name. Give exactly one target:

    Attributes:
        plan: What is kept of the original model so far.
        shrinks: One `Shrink` for each pruning step so far.
        comb: The comb of the original model.
        config: All options.
        steps_taken: Number of calls of `step` so far.
        notes: Sentences that explain what was done.

    Raises:
        InputError: An argument cannot be used.
        TraceError: The model cannot be exported.
        NothingToPruneError: No group can be pruned. The message gives the reason for each group.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))
        >>> images, labels = torch.randn(32, 3, 8, 8), torch.randint(10, (32,))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        >>> pruner = cpd.Pruner(
        ...     model, images, target_macs=0.5, steps=10, schedule="linear", optimizer=optimizer, round_to=1
        ... )
        >>> for step in range(10):
        ...     optimizer.zero_grad()
        ...     nn.functional.cross_entropy(model(images), labels).backward()
        ...     optimizer.step()
        ...     if pruner.step():  # it is time for some channels to go
        ...         print(f"after step {step}: {model[0].out_channels} channels")
        after step 0: 14 channels
        after step 1: 12 channels
        after step 2: 11 channels
        after step 3: 9 channels
        after step 4: 8 channels
        >>> pruner.done
        True
    """

    @checked(
        model=MODEL, example_inputs=INPUTS, steps=integer(0), optimizer=OPTIMIZER, data=REPEATED_DATA, loss=LOSS,
        config=PRUNING, comb=COMB, stage=function("stage(name)"),
        common=COMMON,
    )  # fmt: skip
    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        steps: int,
        optimizer: torch.optim.Optimizer | None = None,
        data: Iterable[Any] | None = None,
        loss: LossFunction | None = None,
        config: PruneConfig | None = None,
        comb: Comb | None = None,
        stage: Stage | None = None,
        common: Common | None = None,
        **options: Any,
    ) -> None:
        self.model, self.optimizer, self.loss = check_model(model), optimizer, loss
        self.config = PruneConfig.of(config, options, "cpd.Pruner")
        if self.config.masks == "permanent":
            masks_applied(self.model)
        self.target, limits = self.config.target, self.config.limits
        self._stage = (lambda _: nullcontext()) if stage is None else partial(_entered, stage)
        self._events = self.config.when.events(steps)
        self.data = None if data is None else processes.Share(data, self.config.score_batches)
        check_branches(self.config.branches, data)
        self.comb = comb = comb_to_prune(
            self.model, comb, example_inputs, self._stage, self.config.measures, self.config.combing
        )
        check_ratios(self.comb, limits)
        self._common = common or Common()
        self._shares = self._is_shared = common is not None
        self._council = processes.Council(tried=partial(_tried, self))
        self._trials = None if data is None else self._common.trials or Trials(
            data, seed=self.config.seed, memory_gb=self.config.memory_gb, layers=self.config.compensation,
            read=comb.read,
        )  # fmt: skip
        self._common.trials = self._trials
        self.criterion, self.why = choose_criterion(self.config.criterion, self.data, loss, trains=steps > 0)
        self._decider = Decider(
            comb, self.target, limits, normalization=self.config.normalization, exponent=self.config.exponent,
            scope=self.config.scope, data_free=self.criterion in DATA_FREE, tolerance=self.config.tolerance,
            runtime=self.config.runtime, threads=self.config.threads, calibration=self.data,
            file_mb=self.config.max_file_mb, memory_mb=self.config.max_memory_mb,
            others=tuple(of_shape(item, comb.operations.call) for item in self.config.latency_inputs),
            error_of=partial(_error_of, self) if self._trials else None,
            error_without=(
                partial(_errors_without, self) if self._trials and self.config.branches is not False else None
            ),
            stage=self._stage, found=self._common.found,
        )  # fmt: skip
        self.plan = self.comb.plan({})
        self.steps_taken = 0
        self.shrinks: list[Shrink] = []
        self.notes = [*notes_of(comb), *ratios_notes(comb, limits)]
        self.checks: dict[str, float] = {}
        self.recovery: Recovery | None = None
        self._asked, self._limit = Asked(), BATCHES
        self._known_scores: Scores | None = None
        self._decided_on: tuple[Scores, Mapping[str, tuple[int, ...]]] | None = None
        self._noted = list(self.notes)
        self._accumulated, self._regularizer = self._from_gradients(), _regularizer_of(self)

    # ------------------------------------------------------------------------------ what it is

    @property
    def criterion_name(self) -> str:
        """The name of the criterion that scores channels."""
        return criterion_name(self.criterion)

    @property
    def normalization(self) -> Normalization:
        """What scores are divided by: the name of the figure that a removed channel saves."""
        return self._decider.normalization

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The branches that may be removed as a whole; empty if branches are not removed."""
        return self.comb.branches if self._decider.removes_branches else ()

    @property
    def search(self) -> list[dict[str, Any]]:
        """One dict for each candidate that was timed (scope, macs_ratio, predicted, speedup)."""
        return self._decider.search

    @property
    def probe(self) -> LatencyProbe | None:
        """The object that times candidates beside the unpruned model; None until something is timed."""
        return self._decider.probe

    @property
    def is_bound(self) -> bool:
        """Whether a limit (`max_file_mb`, `max_memory_mb`), rather than the target, decided the widths so far."""
        comb, counts = self.comb.without(self.plan.removed), self._decider.counts(self.plan.groups)
        return self._decider.bounds.decided(comb, counts)

    @property
    def bounds(self) -> Bounds:
        """The limits on file size and memory that apply beside the target."""
        return self._decider.bounds

    # ------------------------------------------------------------------------------ when

    @property
    def done(self) -> bool:
        """Whether all pruning steps are done."""
        return len(self.shrinks) == len(self._events)

    @property
    def due(self) -> bool:
        """Whether a pruning step is due after the optimizer steps taken so far."""
        return not self.done and self._events[len(self.shrinks)][0] <= self.steps_taken

    def step(self) -> bool:
        """Count one optimizer step, and prune the model if a pruning step is due.

        Returns:
            Whether the model was pruned.

        Raises:
            TargetError: The target is out of reach.
            TrainingError: Scores are not finite, the optimizer's state cannot be sliced, or processes disagree. The
                model is then unchanged.
        """
        if self.done:
            return False
        self.steps_taken += 1
        if self._accumulated is not None:
            self._accumulated.add(self.model)
        _regularize(self)
        if not self.due:
            return False
        self.prune()
        return True

    @checked(between=function("between()"))
    def prune(self, between: Callable[[], None] | None = None) -> Shrink:
        """Do the next pruning step now; call `between` after channels are removed and before the rest is refitted."""
        share = self._events[len(self.shrinks)][1]
        self._is_shared = self._shares and not self.shrinks and not self.steps_taken
        if self._trials is not None and not self._is_shared:
            self._trials.forget()
        seed = self.config.seed + SCORING + len(self.shrinks)
        with random_states_kept(), seeded(self.data, seed):
            self._asked, self._limit = processes.from_first(partial(_wanted, self))
        with random_states_kept(), seeded(self.data, seed):
            with self._stage("score"):
                known = None if self.shrinks else self._known_scores
                scores = known or self._common.scored(self._scores, self._is_shared)
            with self._stage("select"):
                plan = self._select(scores, share)
            processes.check_same(plan.digest, "plan")
            left = self.comb.without(plan.removed).cost(self._decider.counts(plan.groups))
            self._shrink(plan, between)
        self.shrinks.append(Shrink(self.steps_taken, share, left.macs, left.parameters, plan.digest))
        log.info(
            "Pruning step %d of %d: %s MACs and %s parameters are left.",
            len(self.shrinks), len(self._events), f"{left.macs:,}", f"{left.parameters:,}",
        )  # fmt: skip
        if self.done and (left_alone := self.comb.left_alone(plan)):
            self.note(left_alone_sentence(left_alone))
        self._accumulated, self._regularizer = self._from_gradients(), _regularizer_of(self)
        return self.shrinks[-1]

    # ------------------------------------------------------------------------------ score, select

    def _narrowed(self) -> Comb:
        """The comb of the model as it is by now."""
        return self.comb.narrowed(self.model, self.plan)

    def _from_gradients(self) -> AccumulatedScores | None:
        """Scores from the training's gradients, with none seen yet; None where the criterion is another one."""
        return AccumulatedScores(self._narrowed()) if self.criterion == FROM_TRAINING else None

    @memory_reused()
    def _scores(self) -> Scores:
        """{group: Tensor[size in the unpruned model]}, comparable among groups; -inf where a channel has gone."""
        found = None if self._accumulated is None else self._accumulated.scores()
        if found is None and self._accumulated is not None and self.data is None:
            raise InputError(
                "No gradients were seen yet: call step() after backward() and before zero_grad(), or pass data=loader."
            )
        untrusted = dict[str, str]()
        if found is None:
            scores = score(
                self.model, self._narrowed(), self.data, self.loss, criterion=self.criterion,
                limit=self._limit, seed=self.config.seed + len(self.shrinks), total=processes.total,
            )  # fmt: skip
            found, untrusted = scores.drawn(), scores.untrusted
        whole = whole_scores(self.comb, self.plan, found)
        return Scores(by_capacity(self.comb, whole) if self._decider.is_by_capacity else whole, untrusted, {})

    def _select(self, scores: Scores, share: float) -> Plan:
        """What stays after this shrink; where something is measured for it, as the first process has measured it."""
        decider, kept, gone = self._decider, self.plan.groups, self.plan.removed
        scores, stay = self._common.held(self.comb, self.plan, scores)
        if self.target.is_measured or self.normalization == "latency" or decider.removes_branches:
            ranks = repr([torch.argsort(scores[group.name], stable=True).tolist() for group in self.comb.open])
            processes.check_same(hashlib.sha256(ranks.encode()).hexdigest(), "ranking of the channels")
            found = self._council.decide(lambda: decider.decide(scores, kept, share, scores.untrusted, gone, stay))
        else:
            found = decider.decide(scores, kept, share, scores.untrusted, gone, stay)
        self._decided_on, self._noted = (scores, kept), list(self.notes)
        decider.scopes, decider.goal, decider.leaving = found.scopes, found.goal, found.leaving
        for note in found.notes:
            self.note(note)
        return self.comb.plan(found.keep, remove=found.removed)

    @checked(model=MODEL, found=COMPARISON)
    def start_over(self, model: nn.Module, found: LatencyComparison) -> None:
        """Begin again on a fresh copy of the unpruned model, with the same scores, so that `prune` goes on searching.

        Args:
            model: The copy.
            found: The measured latency of the model pruned before.
        """
        self._decider.saw(self.plan, found)
        self.model, self.plan, self.shrinks, self.notes = model, self.comb.plan({}), [], self._noted
        self._known_scores = self._decided_on and self._decided_on[0]

    @checked(found=COMPARISON)
    def would_meet(self, found: LatencyComparison) -> Plan | None:
        """The plan that should meet the target, given a timing of the current one; None if none is in reach."""
        if self._decided_on is None:
            return None
        self._decider.saw(self.plan, found)
        return self._decider.would_meet(*self._decided_on, self.plan.removed)

    # ------------------------------------------------------------------------------ shrink

    def _shrink(self, plan: Plan, between: Callable[[], None] | None) -> None:
        """Apply what is new of a plan to the model and to the optimizer's state, and make up for it."""
        first, step = not self.plan.changes, plan.since(self.plan)
        if not step.changes:  # widths come in steps, and this one was too small for one
            return
        entries = [] if self.optimizer is None else narrowed_state(self.optimizer, self.model, step)
        parameters = {id(parameter) for parameter in self.model.parameters()}
        before = copy_of(self.model) if first or self.data is not None else None
        with self._stage("shrink"):
            shrink(self.model, step)
            narrow_state(entries)
            if self.optimizer is not None:
                drop_parameters(self.optimizer, parameters - {id(parameter) for parameter in self.model.parameters()})
            self.plan = plan
        if first:
            assert before is not None
            with self._stage("check"):
                device = device_of(self.comb.model)
                there = self.model if device_of(self.model) == device else copy_of(self.model).to(device)
                self.checks["masked equals shrunk"] = masked_error(before.to(device), there, self.comb, plan)
        if between is not None:
            with of_the_user("between", "after the shrink"):
                between()
        if self.data is not None:
            assert before is not None
            _recover(self, before, step)

    @checked(text=text("a sentence"))
    def note(self, text: str) -> None:
        """Add a sentence to `notes`, and log it."""
        self.notes.append(text)
        log.info(text)

    # ------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The state of the pruner, from which `load_state_dict` continues: plain types and tensors."""
        return {
            "plan": {name: list(channels) for name, channels in self.plan.groups.items()},
            "digest": self.plan.digest,
            "architecture": self.comb.architecture.to_dict(),
            "steps_taken": self.steps_taken,
            "shrinks": [asdict(item) for item in self.shrinks],
            "scopes": list(self._decider.scopes),
            "goal": self._decider.goal,
            "removed": list(self.plan.removed),
            "leaving": None if self._decider.leaving is None else list(self._decider.leaving),
            "notes": list(self.notes),
            "search": list(self.search),
            "checks": dict(self.checks),
            **({"sums": [], "count": 0} if self._accumulated is None else self._accumulated.state_dict()),
        }

    @checked(state=Check("a mapping, such as the result of state_dict()", lambda value: isinstance(value, Mapping)))
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state: the unpruned model is shrunk to the widths in it.

        The state holds no weights. Load those of the model and of the optimizer after this.

        Args:
            state: The result of `state_dict`.

        Raises:
            CheckpointError: If the state belongs to another model or version, or if the model was already shrunk.
        """
        if self.shrinks:
            raise CheckpointError("This pruner has already shrunk its model: make a new Pruner of the unpruned model.")
        found = state_of(state, self.comb)
        shrink(self.model, found.plan)
        self.plan, self.shrinks, self.steps_taken = found.plan, found.shrinks, found.steps_taken
        self._decider.scopes, self._decider.goal, self._decider.search = found.scopes, found.goal, found.search
        self._decider.leaving = found.leaving
        self.notes, self.checks = found.notes, found.checks
        self._accumulated, self._regularizer = self._from_gradients(), _regularizer_of(self)
        if self._accumulated is not None:
            self._accumulated.load_state_dict(found.seen)


@memory_reused()
def _recover(pruner: Pruner, before: nn.Module, step: Plan) -> None:
    """Make up for a shrink without training, as all processes do together."""
    assert pruner._trials is not None
    with pruner._stage("recover"):
        calibration = pruner._trials.calibration(before.to(device_of(pruner.model)), pruner._limit)
        found = pruner.recovery = recover(pruner.model, calibration, step)
        processes.copy_from_first(named_tensors(pruner.model).values())
    if not pruner._is_shared:
        pruner._trials.forget()
    if found.samples < pruner._asked.samples:
        pruner.note(pruner._asked.told(found.samples))
    pruner.note(str(found) if len(pruner._events) == 1 else f"Pruning step {len(pruner.shrinks) + 1}: {found}")
    if found.failure is not None:
        pruner.note(f"Compensation was not possible: {found.failure}")


def _wanted(pruner: Pruner) -> tuple[Asked, int]:
    """How many images the model as it is by now asks for, and how many batches are read."""
    if pruner.data is None:
        return Asked(), BATCHES
    first = next(batches(pruner.data, 1))
    asked = samples_asked(pruner.model, pruner._narrowed(), first)
    return asked, pruner.config.score_batches or asked.batches(first.call.samples * processes.count())


def _error_of(pruner: Pruner, plan: Plan, roughly: bool) -> float:
    """The error of the logits once a plan has been applied and recovered from, on a copy; or roughly that."""
    return float(pruner._council.do("tried", dict(plan.groups), plan.removed, "roughly" if roughly else "well"))


def _tried(pruner: Pruner, groups: Mapping[str, tuple[int, ...]], removed: tuple[str, ...], how: str) -> float:
    """The error of the logits that a plan leaves, as all processes find it: "well", "roughly", "without" branches."""
    assert pruner._trials is not None
    plan = pruner.comb.plan(groups, remove=removed).since(pruner.plan)
    if how == "without":
        return pruner._trials.error_without(pruner.model, plan, pruner._limit)
    return pruner._trials.error(pruner.model, plan, pruner._limit, roughly=how == "roughly")


def _regularizer_of(pruner: Pruner) -> Regularizer | None:
    """The penalty on the channels of the model as it is by now; None where there is none, or no shrink is left."""
    config = pruner.config
    if config.regularization is None or pruner.done:
        return None
    kept = [group.name for group in pruner.comb.groups if config.limits.ratio_of(group) == 0]
    penalty = Penalty(config.regularization, config.regularization_strength)
    return Regularizer(pruner.comb.narrowed(pruner.model, pruner.plan), penalty, kept)


def _regularize(pruner: Pruner) -> None:
    """Let the channels become smaller, if they are to, by the learning rate of the step just taken."""
    if pruner._regularizer is None:
        return
    if pruner.optimizer is None:
        raise InputError("regularization needs the learning rate: pass optimizer= to the pruner.")
    last = pruner._events[-1][0]
    rate = float(pruner.optimizer.param_groups[0]["lr"])
    pruner._regularizer.step(pruner.model, rate, min(1.0, pruner.steps_taken / max(last, 1)))


def _errors_without(pruner: Pruner, names: list[str]) -> dict[str, float]:
    """The error of the logits without each of some branches, the layers before it giving what it gave."""
    found, (groups, gone) = {}, (dict(pruner.plan.groups), pruner.plan.removed)
    with part("branches", len(names)) as progress:
        for name in names:
            found[name] = float(pruner._council.do("tried", groups, (*gone, name), "without"))
            progress.advance()
    return found
