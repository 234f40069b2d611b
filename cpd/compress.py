"""Compress: the whole path in one call.

comb -> score -> select (searching for the measured target) -> shrink -> check -> recalibrate -> distill -> export
"""

from __future__ import annotations

import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from cpd import sources
from cpd.artifacts import check_output_dir, save_result
from cpd.comb import Comb, comb
from cpd.criteria import DATA_FREE, TARGET_FREE, Criterion
from cpd.distiller import DistillConfig, distill
from cpd.errors import ExportError, InputError, NothingToPruneError, TargetError
from cpd.inputs import Call, batches, check_model, evaluated
from cpd.latency import LatencyComparison, LatencyProbe
from cpd.latency_model import fit_latency
from cpd.onnx import export_onnx
from cpd.oracle import masked_error
from cpd.plan import Plan
from cpd.recovery import recover
from cpd.report import Figures, GroupRow, Report
from cpd.request import Target, check_data, check_limits, check_target, copy_of, example_call
from cpd.scorer import score
from cpd.search import reach
from cpd.selector import Limits, Normalization, Scope, Selector, Weighing, check_ratios
from cpd.surgeon import shrink

log = logging.getLogger("cpd")

#: Two plans leave as much if the MACs of one are at least this share of the other's.
AS_MUCH = 0.9
#: Seconds that the final model is timed.
FINAL_SECONDS = 15.0


@dataclass(frozen=True, repr=False)
class Result:
    """What `compress` gives.

    Attributes:
        model: the compressed model, of the same class as the one given, in eval mode.
        report: the numbers of every stage.
        plan: what was kept of the original.
    """

    model: nn.Module
    report: Report
    plan: Plan
    _onnx: bytes | None = field(default=None)

    def __repr__(self) -> str:
        """The figures before and after."""
        return repr(self.report).replace(type(self.report).__name__, type(self).__name__, 1)

    @property
    def speedup(self) -> float | None:
        """Measured latency of the original over the result's in ONNX Runtime; None where it was not exported."""
        return self.report.speedup

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write weights, plan, ONNX model, report and model card to a folder that `cpd.load` reads.

        Raises:
            InputError: if `directory` is a file or cannot be written to.
            ArtifactError: if a file cannot be written.
        """
        target = check_output_dir(directory)
        save_result(target, self.model, self.plan, self.report, self._onnx)
        return target


def compress(
    model: nn.Module,
    target_speedup: float | None = None,
    *,
    target_macs: float | None = None,
    target_params: float | None = None,
    target_memory: float | None = None,
    data: Iterable[Any] | None = None,
    example_inputs: Any = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    epochs: float = 10,
    lr: float | None = None,
    training: DistillConfig | None = None,
    teacher: nn.Module | None = None,
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
    seed: int = 0,
    output_dir: str | os.PathLike[str] | None = None,
    source: str | None = None,
    progress: bool | None = None,
) -> Result:
    """Make a model faster: comb, prune, distill, and measure.

    Args:
        model: a trained model; left as it was, a copy is compressed.
        target_speedup: measured latency of the original over the result's in ONNX Runtime on this machine, >= 1.
            This or exactly one of the next three.
        target_macs: multiply-accumulates left: a share up to 1, or a number of them.
        target_params: parameters left, likewise.
        target_memory: elements of all intermediate tensors left, likewise.
        data: batches of (input, target), or mappings as Hugging Face loaders give, in anything that can be iterated
            more than once. Without data, channels are chosen by magnitude and nothing is trained back.
        example_inputs: a tensor, a tuple, or (tuple, dict), the batch that latency is measured on; taken from `data`
            (one sample), or known for timm and torchvision models, if None.
        loss: `loss(output, target) -> scalar`; cross-entropy is inferred for class targets.
        evaluate: `evaluate(model) -> float`, higher is better; reported before, between and after.
        epochs: passes over `data` that the student is trained; 0: one-shot, no gradient step.
        lr: peak learning rate; None takes the optimizer's default.
        training: all other settings of the training; its epochs, lr, seed and progress are those given here.
        teacher: what the student learns from; the unpruned model if None.
        criterion: a name in `cpd.criteria.CRITERIA` or a callable; "obs" with data, "magnitude" without, if None.
        normalization: what scores are divided by what is saved of: "memory", "macs", "parameters", "latency" (fitted
            on narrower copies) or "none"; "macs" with data, "none" without, if None.
        exponent: score / saved^exponent.
        scope: among what scores are compared: "global", "isomorphic" or "group"; None: "global", and for a measured
            speed-up "group" too, of which the better is kept.
        compensation: whether what was removed is made up for in closed form by the layers that read it.
        score_batches: batches that scores, compensation and recalibration are taken over at most.
        round_to: widths are kept to multiples of this.
        max_ratio: the largest share of a group that may go.
        min_width: the fewest positions that a group may keep.
        ratios: {pattern of group names, as of a shell: share that goes}, for groups that you decide on: 0 keeps all.
        tolerance: how far from the target speed-up the search may end, as a fraction.
        threads: ONNX Runtime's intra-op threads when timing.
        seed: of scores and training; the same seed gives the same scores and, for the targets that are not measured,
            the same plan.
        output_dir: where the artifacts are written; None writes none.
        source: how a fresh model is built by name ("timm:resnet18"); found out for timm and torchvision models.
        progress: whether bars are shown on stderr; None: if it is a terminal.

    Returns:
        A `Result`: `model`, `speedup`, `report`, `save(dir)`.

    Raises:
        InputError: an unusable argument; raised before any work.
        TraceError: the model cannot be exported.
        NothingToPruneError: no group can be pruned; the message says why, group by group.
        TargetError: the target is out of reach; the message gives the best figure and what stands in the way.
        TrainingError: an empty loader, or a loss that is not finite.
        ExportError: the ONNX export fails or differs from PyTorch.
    """
    given = {key: value for key, value in locals().items() if value is not None and key not in _NOT_REPORTED}
    check_model(model)
    target = check_target(target_speedup, target_macs, target_params, target_memory)
    limits = check_limits(round_to, max_ratio, min_width, ratios or {}, tolerance, threads, score_batches)
    settings = training or DistillConfig()
    settings = DistillConfig(
        **{**vars(settings), "epochs": epochs, "lr": lr or settings.lr, "seed": seed, "progress": progress}
    )
    folder = None if output_dir is None else check_output_dir(output_dir)
    call = example_call(model, example_inputs, data)
    student = copy_of(model)
    if data is not None:
        check_data(student, data, loss)
    run = _Run(model, student, call, target, limits, settings, _Stages(progress))
    run.comb_and_score(data, loss, criterion, score_batches, seed)
    run.weigh(normalization, exponent, scope, threads)
    run.select(tolerance, data, score_batches, compensation)
    run.shrink_and_recover(data, loss, evaluate, teacher, score_batches, compensation)
    result = run.finish(threads, given, source)
    if folder is not None:
        result.save(folder)
    return result


_NOT_REPORTED = {"model", "example_inputs", "loss", "evaluate", "data", "training", "teacher", "progress", "source"}


@dataclass
class _Run:
    """State of one compression, handed from stage to stage."""

    model: nn.Module
    student: nn.Module
    call: Call
    target: Target
    limits: Limits
    training: DistillConfig
    stages: _Stages
    notes: list[str] = field(default_factory=list)
    checks: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    search: list[dict[str, Any]] = field(default_factory=list)
    criterion: tuple[str, str] = ("", "")
    metrics: tuple[float | None, float | None] = (None, None)
    comb: Comb = field(init=False)
    scores: dict[str, Tensor] = field(init=False)
    weighing: Weighing = field(init=False)
    selectors: list[Selector] = field(init=False)
    plan: Plan = field(init=False)
    probe: LatencyProbe | None = None

    def note(self, text: str) -> None:
        """Say something to the user, now and in the report."""
        self.notes.append(text)
        log.info(text)

    def comb_and_score(
        self,
        data: Iterable[Any] | None,
        loss: Callable[[Any, Any], Tensor] | None,
        criterion: str | Criterion | None,
        limit: int,
        seed: int,
    ) -> None:
        """Find the groups and score their positions."""
        with self.stages("comb"):
            self.comb = comb(self.model, self.call)
        if not self.comb.open:
            reasons = "\n".join(f"  {group.name} ({group.size}): {group.frozen}" for group in self.comb.groups)
            raise NothingToPruneError(f"No group of {type(self.model).__name__} can be pruned:\n{reasons}")
        check_ratios(self.comb, self.limits)
        chosen, why = _choose_criterion(criterion, data, loss)
        name = chosen if isinstance(chosen, str) else getattr(chosen, "__name__", type(chosen).__name__)
        self.criterion = (name, why)
        log.info("Scores: %s: %s", name, why)
        if data is None:
            self.note(
                "No data given: channels are chosen by the size of their weights and nothing is trained back, so most "
                "of the accuracy is lost. Pass data=loader to keep it."
            )
        with self.stages("score"):
            self.scores = score(self.student, self.comb, data, loss, criterion=chosen, limit=limit, seed=seed)

    def weigh(self, normalization: Normalization | None, exponent: float, scope: Scope | None, threads: int) -> None:
        """Settle what a removed position is weighed against, and among what scores are compared."""
        data_free = self.criterion[0] in DATA_FREE
        normalization = normalization or ("none" if data_free else "macs")
        latency = None
        if self.target.is_speedup or normalization == "latency":
            with self.stages("export"):
                self.probe = LatencyProbe(self.model, self.call, threads=threads)
        if normalization == "latency":
            assert self.probe is not None
            with self.stages("fit latency"):
                latency = fit_latency(self.student, self.comb, self.probe)
        self.weighing = Weighing(normalization, exponent, latency)
        scopes: tuple[Scope, ...] = ("global", "group") if self.target.is_speedup and not data_free else ("global",)
        with self.stages("order"):
            self.selectors = [
                Selector(self.comb, self.scores, self.limits, each, self.weighing)
                for each in (scopes if scope is None else (scope,))
            ]

    def select(self, tolerance: float, data: Iterable[Any] | None, limit: int, compensation: bool) -> None:
        """Choose the widths: by measured speed-up or by cost, for each scope.

        Of two that meet the target, the one that leaves more MACs is kept; where both leave as much, the one that
        comes nearer to the unpruned model without training.
        """
        plans: list[tuple[Scope, Plan]] = []
        failure: TargetError | None = None
        with self.stages("select"):
            for selector in self.selectors:
                try:
                    plans.append((selector.scope, self._meet(selector, tolerance)))
                except TargetError as error:
                    failure = failure or error
            if not plans:
                assert failure is not None
                raise failure
            scope, self.plan = self._choose(plans, data, limit, compensation)
        if len(plans) > 1:
            told = ", ".join(f"{scope} {self._macs_left(plan):.1%}" for scope, plan in plans)
            self.note(f"Scores compared by scope {scope!r} (share of the MACs left at the target: {told}).")
        kept = {group.axis: len(self.plan.groups[group.name]) for group in self.comb.groups}
        floored = next(item for item in self.selectors if item.scope == scope).at_floor(kept)
        if floored:
            self.note(
                f"{len(floored)} of {len(self.comb.open)} groups stand at the fewest positions that they may keep "
                f"(max_ratio={self.limits.max_ratio:g}, min_width={self.limits.min_width}): {', '.join(floored[:8])}"
                f"{', …' if len(floored) > 8 else '.'}"
            )

    def _choose(
        self, plans: list[tuple[Scope, Plan]], data: Iterable[Any] | None, limit: int, compensation: bool
    ) -> tuple[Scope, Plan]:
        """Of several plans that meet the target, the one that leaves most; of those that leave as much, the nearest."""
        most = max(self._macs_left(plan) for _, plan in plans)
        rest = [item for item in plans if self._macs_left(item[1]) >= AS_MUCH * most]
        if len(rest) == 1 or data is None:
            return rest[0]
        errors = [
            min(recover(shrink(copy_of(self.student), plan), self.model, plan, data, limit=limit,
                        compensation=compensation).errors.values())
            for _, plan in rest
        ]  # fmt: skip
        return rest[errors.index(min(errors))]

    def _macs_left(self, plan: Plan) -> float:
        """Share of the original's MACs that a plan leaves."""
        kept = {group.axis: len(plan.groups[group.name]) for group in self.comb.groups}
        return self.comb.cost(kept).macs / max(self.comb.cost({}).macs, 1)

    def _meet(self, selector: Selector, tolerance: float) -> Plan:
        """The plan of one selector that meets the target."""
        if self.target.is_speedup:
            assert self.probe is not None
            best, tried = reach(self.student, selector, self.probe, self.target.value, tolerance)
            self.search += [
                {"scope": selector.scope, "macs_ratio": item.macs_ratio, "speedup": item.speedup} for item in tried
            ]
            return best.plan
        full, least = self.comb.cost({}), self.comb.cost(selector.least())
        goal = self.target.absolute(full)
        if self.target.of(least) > goal:
            raise TargetError(
                f"{self.target.name}={self.target.value:g} cannot be reached: the narrowest widths allowed leave "
                f"{self.target.of(least):,.0f} of {self.target.of(full):,.0f}. {_frozen_reasons(self.comb)}"
            )
        return selector.plan(selector.meet(self.target.of, goal))

    def shrink_and_recover(
        self,
        data: Iterable[Any] | None,
        loss: Callable[[Any, Any], Tensor] | None,
        evaluate: Callable[[nn.Module], float] | None,
        teacher: nn.Module | None,
        limit: int,
        compensation: bool,
    ) -> None:
        """Shrink the student, check it, make up for what went, and train it back."""
        before = evaluated(evaluate, self.student)
        with self.stages("shrink"):
            shrink(self.student, self.plan)
        with self.stages("check"):
            self.checks["masked equals shrunk"] = masked_error(self.model, self.student, self.comb, self.plan)
        after = evaluated(evaluate, self.student)
        if after is not None:
            self.note(f"Metric of the unpruned model {before:.4g}, right after pruning {after:.4g}.")
        if data is not None:
            with self.stages("recover"):
                found = recover(self.student, self.model, self.plan, data, limit=limit, compensation=compensation)
            after = evaluated(evaluate, self.student)
            self.note(f"{found} Metric {after:.4g}." if after is not None else str(found))
            if found.failure is not None:
                self.note(f"Compensation was not possible: {found.failure}")
            if after is not None:
                self.history.append({"epoch": 0, "metric": after})
        if data is not None and self.training.epochs:
            with self.stages("distill", bar=False):
                guide = copy_of(self.model) if teacher is None else teacher
                records = distill(self.student, guide, data, loss=loss, evaluate=evaluate, config=self.training)
            self.history += [record.to_dict() for record in records]
            after = records[-1].metric if records else after
        self.student.eval()
        self.metrics = (before, after)

    def finish(self, threads: int, given: dict[str, Any], source: str | None) -> Result:
        """Export, measure once more, and report."""
        comparison, onnx = None, None
        with self.stages("deploy"):
            try:
                onnx = export_onnx(self.student, self.call)
                self.probe = self.probe or LatencyProbe(self.model, self.call, threads=threads)
                comparison = self.probe.compare(onnx, seconds=FINAL_SECONDS, precision=0.01)
            except ExportError as error:
                if self.target.is_speedup:
                    raise
                self.note(f"Not exported to ONNX, so no latency was measured: {error}")
        report = self._report(given, source, comparison)
        return Result(self.student, report, self.plan, onnx)

    def _report(self, given: dict[str, Any], source: str | None, latency: LatencyComparison | None) -> Report:
        name = source or (str(found) if (found := sources.identify(self.model)) else None)
        kept = {group.axis: len(self.plan.groups[group.name]) for group in self.comb.groups}
        times = (latency.original_ms, latency.candidate_ms) if latency else (None, None)
        costs = [self.comb.cost({}), self.comb.cost(kept)]
        figures = [
            Figures(cost.parameters, cost.macs, cost.activations, time_ms, metric)
            for cost, time_ms, metric in zip(costs, times, self.metrics, strict=True)
        ]
        criterion, why = self.criterion
        return Report(
            call=given,
            model_class=f"{type(self.model).__module__}.{type(self.model).__qualname__}",
            source=name,
            criterion=criterion,
            criterion_reason=why,
            normalization=self.weighing.normalization,
            original=figures[0],
            result=figures[1],
            latency=None if latency is None else latency.to_dict(),
            groups=tuple(_row(group, len(self.plan.groups[group.name])) for group in self.comb.groups),
            checks=self.checks,
            history=tuple(self.history),
            search=tuple(self.search),
            seconds=self.stages.seconds,
            environment=_environment(),
            notes=(*self.notes, *self.plan.adjusted),
        )


class _Stages:
    """Times the stages of a run, and shows which one is on where stderr is a terminal."""

    def __init__(self, progress: bool | None) -> None:
        self.seconds: dict[str, float] = {}
        self.console = Console(stderr=True)
        self.shown = self.console.is_terminal if progress is None else progress

    @contextmanager
    def __call__(self, name: str, *, bar: bool = True) -> Iterator[None]:
        start = time.perf_counter()
        log.debug("%s …", name)
        with self.console.status(f"cpd: {name}") if bar and self.shown else nullcontext():
            yield
        self.seconds[name] = time.perf_counter() - start


def _choose_criterion(
    criterion: str | Criterion | None, data: Iterable[Any] | None, loss: Callable[[Any, Any], Tensor] | None
) -> tuple[str | Criterion, str]:
    """The criterion, and why this one."""
    if criterion is None and data is None:
        return "magnitude", "no data was given, and magnitude needs none."
    if criterion is None:
        return "obs", "data was given, so what removal costs once the rest is refitted can be estimated."
    if criterion not in TARGET_FREE and data is not None and loss is None and next(batches(data, 1)).target is None:
        raise InputError(f"criterion={criterion!r} needs targets or a loss, and the data has none: pass loss=….")
    return criterion, "as asked for."


def _frozen_reasons(comb: Comb) -> str:
    frozen = [f"{group.name}: {group.frozen}" for group in comb.groups if group.frozen][:8]
    return f"Frozen groups stand in the way: {'; '.join(frozen)}." if frozen else "No group is frozen."


def _row(group: Any, kept: int) -> GroupRow:
    return GroupRow(group.name, group.size, kept, group.exact, group.frozen, tuple(map(str, group.members)))


def _environment() -> dict[str, str]:
    names = ("cpd", "torch", "onnx", "onnxruntime", "timm")
    found = {"python": sys.version.split()[0], "platform": platform.platform()}
    return {**found, **{name: version(name) for name in names}}
