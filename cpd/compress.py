"""Compress: the whole path in one call.

comb -> score -> select (searching for the measured target) -> shrink -> check -> recalibrate -> distill -> export
"""

from __future__ import annotations

import copy
import logging
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from cpd import sources
from cpd.artifacts import check_output_dir, save_result
from cpd.batchnorm import recalibrate_batchnorm
from cpd.comb import Comb, comb
from cpd.cost import Figures as Cost
from cpd.criteria import DATA_FREE, Criterion
from cpd.distiller import DistillConfig, distill
from cpd.errors import ExportError, InputError, NothingToPruneError, TargetError
from cpd.inputs import Call, as_call, batches, check_model, device_of, evaluating, move
from cpd.latency import LatencyComparison, LatencyProbe
from cpd.losses import task_loss
from cpd.onnx import export_onnx
from cpd.oracle import masked_error
from cpd.plan import Plan
from cpd.report import Figures, GroupRow, Report
from cpd.scorer import Normalization, score
from cpd.search import reach
from cpd.selector import Limits, Selector
from cpd.surgeon import shrink

log = logging.getLogger("cpd")

#: Batches that BatchNorm statistics are re-estimated on at most.
RECALIBRATION_BATCHES = 64
#: Seconds that the final model is timed.
FINAL_SECONDS = 15.0


@dataclass(frozen=True)
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
    _onnx: bytes | None = field(default=None, repr=False)

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


@dataclass(frozen=True)
class _Target:
    """One target: a measured speed-up, or a cost figure to get down to."""

    name: str
    value: float

    @property
    def is_speedup(self) -> bool:
        return self.name == "target_speedup"

    def of(self, figures: Cost) -> float:
        """The figure of a cost that the target speaks of."""
        names = {"target_macs": "macs", "target_params": "parameters", "target_memory": "activations"}
        return float(getattr(figures, names[self.name]))

    def absolute(self, full: Cost) -> float:
        """The target as a number: a share up to 1 is one of the original's figure."""
        return self.value * self.of(full) if self.value <= 1 else self.value


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
    score_batches: int = 16,
    round_to: int = 8,
    max_ratio: float = 0.9,
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
        criterion: a name in `cpd.criteria.CRITERIA` or a callable; "hessian" with data, "magnitude" without, if None.
        normalization: what scores are divided by: "memory", "macs" or "none"; "memory" with data, "none" without.
        score_batches: batches that scores are taken over at most.
        round_to: widths are kept to multiples of this.
        max_ratio: the largest share of a group that may go.
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
    target = _check_target(target_speedup, target_macs, target_params, target_memory)
    limits = _check_limits(round_to, max_ratio, tolerance, threads, score_batches)
    settings = training or DistillConfig()
    settings = DistillConfig(
        **{**vars(settings), "epochs": epochs, "lr": lr or settings.lr, "seed": seed, "progress": progress}
    )
    folder = None if output_dir is None else check_output_dir(output_dir)
    call = _example_call(model, example_inputs, data)
    student = _copy(model)
    if data is not None:
        _check_data(student, data, loss)
    run = _Run(model, student, call, target, limits, settings, _Stages(progress))
    run.comb_and_score(data, loss, criterion, normalization, score_batches, seed)
    run.select(threads, tolerance)
    run.shrink_and_recover(data, loss, evaluate, teacher)
    result = run.finish(threads, {**given, **target_dict(target)}, source)
    if folder is not None:
        result.save(folder)
    return result


_NOT_REPORTED = {"model", "example_inputs", "loss", "evaluate", "data", "training", "teacher", "progress", "source"}


def target_dict(target: _Target) -> dict[str, float]:
    """The target as an argument of `compress`."""
    return {target.name: target.value}


@dataclass
class _Run:
    """State of one compression, handed from stage to stage."""

    model: nn.Module
    student: nn.Module
    call: Call
    target: _Target
    limits: Limits
    training: DistillConfig
    stages: _Stages
    notes: list[str] = field(default_factory=list)
    checks: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    search: list[dict[str, Any]] = field(default_factory=list)
    criterion: tuple[str, str, str] = ("", "", "")
    metrics: tuple[float | None, float | None] = (None, None)
    comb: Comb = field(init=False)
    selector: Selector = field(init=False)
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
        normalization: Normalization | None,
        limit: int,
        seed: int,
    ) -> None:
        """Find the groups and score their positions."""
        with self.stages("comb"):
            self.comb = comb(self.model, self.call)
        if not self.comb.open:
            reasons = "\n".join(f"  {group.name} ({group.size}): {group.frozen}" for group in self.comb.groups)
            raise NothingToPruneError(f"No group of {type(self.model).__name__} can be pruned:\n{reasons}")
        chosen, why = _choose_criterion(criterion, data, self.student, loss)
        saved: Normalization = normalization or ("none" if chosen in DATA_FREE else "memory")
        name = chosen if isinstance(chosen, str) else getattr(chosen, "__name__", type(chosen).__name__)
        self.criterion = (name, why, saved)
        log.info("Scores: %s, normalised by %s: %s", name, saved, why)
        if data is None:
            self.note(
                "No data given: channels are chosen by the size of their weights and nothing is trained back, so most "
                "of the accuracy is lost. Pass data=loader to keep it."
            )
        with self.stages("score"):
            scores = score(
                self.student, self.comb, data, loss, criterion=chosen, normalization=saved, limit=limit, seed=seed
            )
        self.selector = Selector(self.comb, scores, self.limits)

    def select(self, threads: int, tolerance: float) -> None:
        """Choose the widths: by measured speed-up, or by cost."""
        full, least = self.comb.cost({}), self.comb.cost(self.selector.least())
        with self.stages("select"):
            if self.target.is_speedup:
                self.probe = LatencyProbe(self.model, self.call, threads=threads)
                best, tried = reach(self.student, self.selector, self.probe, self.target.value, tolerance)
                self.search = [{"macs_ratio": item.macs_ratio, "speedup": item.speedup} for item in tried]
                self.plan = best.plan
                return
            goal = self.target.absolute(full)
            if self.target.of(least) > goal:
                raise TargetError(
                    f"{self.target.name}={self.target.value:g} cannot be reached: the narrowest widths allowed leave "
                    f"{self.target.of(least):,.0f} of {self.target.of(full):,.0f}. {_frozen_reasons(self.comb)}"
                )
            self.plan = self.selector.plan(self.selector.meet(self.target.of, goal))

    def shrink_and_recover(
        self,
        data: Iterable[Any] | None,
        loss: Callable[[Any, Any], Tensor] | None,
        evaluate: Callable[[nn.Module], float] | None,
        teacher: nn.Module | None,
    ) -> None:
        """Shrink the student, check it, and train it back."""
        before = _evaluate(evaluate, self.student)
        with self.stages("shrink"):
            shrink(self.student, self.plan)
        with self.stages("check"):
            self.checks["masked equals shrunk"] = masked_error(self.model, self.student, self.comb, self.plan)
        after = _evaluate(evaluate, self.student)
        if after is not None:
            self.note(f"Metric of the unpruned model {before:.4g}, right after pruning {after:.4g}.")
        if data is not None:
            with self.stages("recalibrate"):
                layers = recalibrate_batchnorm(self.student, data, limit=RECALIBRATION_BATCHES)
            if layers and evaluate is not None:
                after = _evaluate(evaluate, self.student)
                self.note(f"After recalibrating {layers} BatchNorm layers: {after:.4g}.")
            if after is not None:
                self.history.append({"epoch": 0, "metric": after})
        if data is not None and self.training.epochs:
            with self.stages("distill", bar=False):
                guide = _copy(self.model) if teacher is None else teacher
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
        criterion, why, normalization = self.criterion
        return Report(
            call=given,
            model_class=f"{type(self.model).__module__}.{type(self.model).__qualname__}",
            source=name,
            criterion=criterion,
            criterion_reason=why,
            normalization=normalization,
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


# ---------------------------------------------------------------- checking what was given


def _check_target(*values: float | None) -> _Target:
    names = ("target_speedup", "target_macs", "target_params", "target_memory")
    given = [_Target(name, value) for name, value in zip(names, values, strict=True) if value is not None]
    if len(given) != 1:
        raise InputError(
            f"Give exactly one target of {', '.join(names)}; got {[item.name for item in given] or 'none'}."
        )
    (target,) = given
    if isinstance(target.value, bool) or not isinstance(target.value, (int, float)) or not math.isfinite(target.value):
        raise InputError(f"{target.name} must be a number; got {target.value!r}.")
    if target.is_speedup and target.value < 1:
        raise InputError(
            f"target_speedup is original over compressed latency, so at least 1; got {target.value:g}. "
            "For half the latency ask for 2."
        )
    if target.value <= 0:
        raise InputError(f"{target.name} must be above 0: a share up to 1, or a number; got {target.value:g}.")
    return target


def _check_limits(round_to: int, max_ratio: float, tolerance: float, threads: int, score_batches: int) -> Limits:
    for name, value in (("round_to", round_to), ("threads", threads), ("score_batches", score_batches)):
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be an integer of at least 1; got {value!r}.")
    for name, share in (("max_ratio", max_ratio), ("tolerance", tolerance)):
        if not 0 < share < 1:
            raise InputError(f"{name} must lie between 0 and 1; got {share!r}.")
    return Limits(round_to, max_ratio)


def _example_call(model: nn.Module, example_inputs: Any, data: Iterable[Any] | None) -> Call:
    """The example inputs: those given, one sample of the data, or what timm and torchvision models take."""
    if isinstance(data, Iterator):
        raise InputError("data can be iterated only once (it is an iterator); pass a list or a DataLoader.")
    if example_inputs is None and data is not None:
        first = next(batches(data, 1)).call
        example_inputs = Call(*torch.utils._pytree.tree_map_only(Tensor, lambda t: t[:1], (first.args, first.kwargs)))
    if example_inputs is None:
        example_inputs = sources.default_inputs(model)
    if example_inputs is None:
        raise InputError(
            f"The input of {type(model).__name__} is not known: pass example_inputs=, a tensor (with its batch "
            "dimension), a tuple, or (tuple, dict)."
        )
    return as_call(example_inputs).to(device_of(model))


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # a user's module may hold anything
        raise InputError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); compress works on a copy. "
            "Detach tensors that the module keeps, or define __deepcopy__."
        ) from error


def _check_data(model: nn.Module, data: Iterable[Any], loss: Callable[[Any, Any], Tensor] | None) -> None:
    """The first batch must go through the model and give a finite loss.

    Raises:
        TrainingError: if there is no batch or the loss is not finite.
        InputError: if the model fails on the batch, or no loss can be inferred.
    """
    from cpd.errors import TrainingError

    batch = next(batches(data, 1))
    device = device_of(model)
    with torch.no_grad(), evaluating(model):
        try:
            output = batch.call.to(device).on(model)
        except Exception as error:  # the user's forward may raise anything
            raise InputError(f"The model fails on the first batch of data: {type(error).__name__}: {error}.") from error
        value = task_loss(output, move(batch.target, device), loss)
    if value is not None and not bool(torch.isfinite(value)):
        raise TrainingError(
            f"The loss of the unpruned model on the first batch is {float(value)}: check data and loss."
        )


def _choose_criterion(
    criterion: str | Criterion | None,
    data: Iterable[Any] | None,
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor] | None,
) -> tuple[str | Criterion, str]:
    """The criterion, and why this one."""
    if criterion is not None:
        return criterion, "as asked for."
    if data is None:
        return "magnitude", "no data was given, and magnitude needs none."
    if loss is None and next(batches(data, 1)).target is None:
        return "magnitude", "the data has no targets, so there is no loss whose curvature could be taken."
    return "hessian", "data was given, so the curvature of the loss can be measured (CPD's criterion)."


def _frozen_reasons(comb: Comb) -> str:
    frozen = [f"{group.name}: {group.frozen}" for group in comb.groups if group.frozen][:8]
    return f"Frozen groups stand in the way: {'; '.join(frozen)}." if frozen else "No group is frozen."


def _evaluate(evaluate: Callable[[nn.Module], float] | None, model: nn.Module) -> float | None:
    if evaluate is None:
        return None
    with torch.no_grad(), evaluating(model):
        return float(evaluate(model))


def _row(group: Any, kept: int) -> GroupRow:
    return GroupRow(group.name, group.size, kept, group.exact, group.frozen, tuple(map(str, group.members)))


def _environment() -> dict[str, str]:
    names = ("cpd", "torch", "onnx", "onnxruntime", "timm")
    found = {"python": sys.version.split()[0], "platform": platform.platform()}
    return {**found, **{name: version(name) for name in names}}
