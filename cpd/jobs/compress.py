"""Compress: the whole path in one call.

comb -> prune (score, select, shrink, recover: `cpd.pruner`), at once or during the next -> distill -> export
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from cpd import processes
from cpd.checkpoint import Checkpoint
from cpd.coupling.comb import comb
from cpd.criteria import Criterion
from cpd.deploy.export import export_onnx
from cpd.deploy.latency import LatencyComparison, LatencyProbe, environment
from cpd.deploy.profiling import paired
from cpd.distillation.config import DistillConfig
from cpd.distillation.distiller import distill, steps_per_epoch
from cpd.errors import ExportError, InputError, TrainingError
from cpd.model import sources
from cpd.model.inputs import Call, as_call, batches, check_model, device_of, evaluated, evaluating, move
from cpd.model.task_loss import task_loss
from cpd.model.tensors import copy_of
from cpd.plan import Plan
from cpd.pruner import Pruner
from cpd.report.artifacts import check_output_dir, save_pretrained, save_result
from cpd.report.records import OBJECTS, Figures, GroupRow, LayerRow
from cpd.report.report import Report
from cpd.selection.limits import check_limits
from cpd.selection.schedule import Schedule
from cpd.selection.selector import Scope
from cpd.selection.target import Target, check_target
from cpd.selection.weighing import Normalization

log = logging.getLogger("cpd")

#: Seconds that the final model is timed, and that each node of both models is, for the report.
FINAL_SECONDS, PROFILE_SECONDS = 15.0, 0.5


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

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Write `config.json`, `model.safetensors` and a model card to a folder that `cpd.from_pretrained` reads.

        Raises:
            InputError: if `directory` is a file or cannot be written to.
            ArtifactError: if a file cannot be written.
        """
        target = check_output_dir(directory)
        save_pretrained(target, self.model, self.plan, self.report)
        return target


def compress(
    model: nn.Module,
    target_speedup: float | None = None,
    *,
    target_latency_ms: float | None = None,
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
    schedule: Schedule | str = "one-shot",
    round_to: int = 8,
    max_ratio: float = 0.9,
    min_width: int = 1,
    ratios: Mapping[str, float] | None = None,
    tolerance: float = 0.05,
    threads: int = 1,
    latency_inputs: Sequence[Any] = (),
    seed: int = 0,
    output_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    checkpoint_minutes: float = 10.0,
    source: str | None = None,
    progress: bool | None = None,
) -> Result:
    """Make a model faster: comb, prune, distill, and measure.

    Args:
        model: a trained model; left as it was, a copy is compressed.
        target_speedup: measured latency of the original over the result's in ONNX Runtime on this machine, >= 1.
            This or exactly one of the next four.
        target_latency_ms: measured latency of the result in ms a run of `example_inputs`.
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
        normalization: what scores are divided by what is saved of: "memory", "macs", "parameters", "latency"
            (predicted for this machine) or "none". None: "macs" for scores from data; for others "latency" where the
            target is measured, "none" elsewhere.
        exponent: score / saved^exponent.
        scope: among what scores are compared: "global", "isomorphic" or "group"; None: "global", and for a measured
            speed-up "group" too, of which the better is kept.
        compensation: whether what was removed is made up for in closed form by the layers that read it.
        score_batches: batches that scores, compensation and recalibration are taken over at most.
        schedule: when positions go: "one-shot" (all at once, before the training), or a little at a time while the
            student is trained: "linear", "cubic", or a `Schedule`.
        round_to: widths are kept to multiples of this.
        max_ratio: the largest share of a group that may go.
        min_width: the fewest positions that a group may keep.
        ratios: {pattern of group names, as of a shell: share that goes}, for groups that you decide on: 0 keeps all.
        tolerance: how far from the target speed-up the search may end, as a fraction.
        threads: ONNX Runtime's intra-op threads when timing.
        latency_inputs: further batches (other batch or input sizes) that a measured target holds for: the slowest
            counts, and is reported.
        seed: of scores and training; the same seed gives the same scores and, for the targets that are not measured,
            the same plan.
        output_dir: where the artifacts are written, and during the training a checkpoint; None writes none.
        resume: go on from the checkpoint in `output_dir`, if there is one: to the same plan and, on the same machine,
            the same weights.
        checkpoint_minutes: between two checkpoints at most; there is one after every shrink anyhow.
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
        CheckpointError: the checkpoint cannot be written or read, or is of a run of other settings.
    """
    arguments = dict(locals())
    given = {key: value for key, value in arguments.items() if value is not None and key not in _NOT_REPORTED}
    objects = {name: name for name in OBJECTS if arguments[name] is not _USUAL[name].default}
    check_model(model)
    processes.start()
    check_target(target_speedup, target_latency_ms, target_macs, target_params, target_memory)
    check_limits(round_to, max_ratio, min_width, ratios or {}, tolerance, threads, score_batches)
    settings = training or DistillConfig()
    settings = DistillConfig(
        **{**vars(settings), "epochs": epochs, "lr": lr or settings.lr, "seed": seed, "progress": progress}
    )
    if training is not None:
        given["training"] = _changed(training, DistillConfig())
    folder = None if output_dir is None else check_output_dir(output_dir)
    checkpoint = _checkpoint(folder, resume, checkpoint_minutes, given, settings, model)
    call = example_call(model, example_inputs, data)
    student = copy_of(model)
    if data is not None:
        check_data(student, data, loss)
    when = Schedule.of(schedule)
    if when.kind != "one-shot" and (data is None or not epochs):
        raise InputError(f"schedule={when.kind!r} prunes during the training: pass data= and epochs=, or 'one-shot'.")
    per_epoch = steps_per_epoch(data, settings.accumulate) if data is not None else 0
    if per_epoch is None:
        if when.kind != "one-shot" or when.warmup:
            raise InputError(f"schedule={when.kind!r} needs data with a length (__len__), to know when to prune.")
        per_epoch = 0
    stages = _Stages(progress)
    with stages("comb"):
        combed = comb(model, call)
    pruner = Pruner(
        student, call, target_speedup=target_speedup, target_latency_ms=target_latency_ms, target_macs=target_macs,
        target_params=target_params, target_memory=target_memory, steps=round(per_epoch * epochs), schedule=when,
        data=data, loss=loss, criterion=criterion or ("magnitude" if data is None else None),
        normalization=normalization, exponent=exponent, scope=scope, compensation=compensation,
        score_batches=score_batches, round_to=round_to, max_ratio=max_ratio, min_width=min_width, ratios=ratios,
        tolerance=tolerance, threads=threads, latency_inputs=latency_inputs, seed=seed, comb=combed, stage=stages,
    )  # fmt: skip
    run = _Run(model, student, call, pruner, settings, stages, checkpoint, per_epoch)
    run.prune_and_train(data, loss, evaluate, teacher)
    result = run.finish(threads, {**_unusual(given), **objects}, source)
    if folder is not None:
        processes.from_first(lambda: result.save(folder))
    if checkpoint is not None:
        processes.from_first(checkpoint.remove)
    return result


#: Arguments that are no settings: the report and the checkpoint leave them out.
_NOT_REPORTED = {"model", "training", "progress", "source", "resume", "checkpoint_minutes", *OBJECTS}
_USUAL = inspect.signature(compress).parameters


def _changed(record: Any, usual: Any) -> dict[str, Any]:
    """The fields in which a record of settings is not the usual one."""
    return {name: value for name, value in vars(record).items() if value != vars(usual)[name]}


def _unusual(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call that are not the usual ones, and the seed, as a report keeps them."""
    usual = {name: item.default for name, item in _USUAL.items()}
    told = {name: value for name, value in given.items() if name == "seed" or value not in (usual.get(name), {})}
    when = Schedule.of(told.pop("schedule", usual["schedule"]))
    if when != Schedule.of(usual["schedule"]):
        told["schedule"] = {"kind": when.kind, **_changed(when, Schedule(when.kind))}
    if "output_dir" in told:
        told["output_dir"] = os.fspath(told["output_dir"])
    return told


@dataclass
class _Run:
    """State of one compression, handed from stage to stage."""

    model: nn.Module
    student: nn.Module
    call: Call
    pruner: Pruner
    training: DistillConfig
    stages: _Stages
    checkpoint: Checkpoint | None
    per_epoch: int
    history: list[dict[str, Any]] = field(default_factory=list)
    metrics: tuple[float | None, float | None] = (None, None)

    def prune_and_train(
        self,
        data: Iterable[Any] | None,
        loss: Callable[[Any, Any], Tensor] | None,
        evaluate: Callable[[nn.Module], float] | None,
        teacher: nn.Module | None,
    ) -> None:
        """Shrink the student, at once or while it is trained back."""
        log.info("Scores: %s: %s", self.pruner.criterion_name, self.pruner.why)
        if data is None:
            self.pruner.note(
                "No data given: channels are chosen by the size of their weights and nothing is trained back, so most "
                "of the accuracy is lost. Pass data=loader to keep it."
            )
        state = None if self.checkpoint is None else self.checkpoint.state
        if state is not None:
            assert self.checkpoint is not None
            self.history, before = self.checkpoint.extra["history"], self.checkpoint.extra["before"]
            after = before
        else:
            before = after = evaluated(evaluate, self.student)
        if state is None and self.pruner.due:

            def pruned() -> None:
                if evaluate is not None:
                    found = evaluated(evaluate, self.student)
                    self.pruner.note(f"Metric of the unpruned model {before:.4g}, right after pruning {found:.4g}.")

            self.pruner.prune(pruned)
            after = evaluated(evaluate, self.student)
            if after is not None:
                self.history.append({"epoch": 0, "metric": after})
                self.pruner.note(f"Metric of the recovered model, before any training: {after:.4g}.")
        if self.checkpoint is not None:
            self.checkpoint.extra = {"history": list(self.history), "before": before}
        if data is not None and self.training.epochs:
            with self.stages("distill", bar=False):
                guide = copy_of(self.model) if teacher is None else teacher
                records = distill(
                    self.student, guide, data, loss=loss, evaluate=evaluate, config=self.training, pruner=self.pruner,
                    checkpoint=self.checkpoint,
                )  # fmt: skip
            self.history += [record.to_dict() for record in records]
            after = records[-1].metric if records else after
        if not self.pruner.done:  # the data was shorter than its length
            self.pruner.note("The data ended before the schedule did: what was left to go went after the training.")
            while not self.pruner.done:
                self.pruner.prune()
            after = evaluated(evaluate, self.student)
        self.student.eval()
        self.metrics = (before, after)

    def finish(self, threads: int, given: dict[str, Any], source: str | None) -> Result:
        """Export, measure once more, and report."""
        comparison, onnx, nodes = None, None, list[dict[str, Any]]()
        with self.stages("deploy"):
            try:
                onnx, comparison, nodes = processes.from_first(lambda: self._deployed(threads))
            except ExportError as error:
                if self.pruner.target.is_measured:
                    raise
                self.pruner.note(f"Not exported to ONNX, so no latency was measured: {error}")
        if comparison is not None and (told := _missed(self.pruner.target, comparison, self.pruner.tolerance)):
            self.pruner.note(told)
        report = self._report(given, source, comparison, nodes)
        return Result(self.student, report, self.pruner.plan, onnx)

    def _deployed(self, threads: int) -> tuple[bytes, LatencyComparison, list[dict[str, Any]]]:
        """The ONNX model, its latency beside the original's, and the time of each node of both."""
        onnx = export_onnx(self.student, self.call)
        target = self.pruner.target
        probe = self.pruner.probe or LatencyProbe(self.model, self.call, threads=threads)
        candidate = onnx if len(probe.calls) == 1 else self.student
        slowest = target.attained if target.is_measured else attrgetter("speedup")
        comparison = probe.compare(candidate, seconds=FINAL_SECONDS, precision=0.01, slowest=slowest)
        nodes = paired(probe.profile(seconds=PROFILE_SECONDS), probe.profile(onnx, seconds=PROFILE_SECONDS))
        return onnx, comparison, nodes

    def _report(
        self, given: dict[str, Any], source: str | None, latency: LatencyComparison | None, nodes: list[dict[str, Any]]
    ) -> Report:
        name = source or (str(found) if (found := sources.identify(self.model)) else None)
        kept = {group.axis: len(self.pruner.plan.groups[group.name]) for group in self.pruner.comb.groups}
        times = (latency.original_ms, latency.candidate_ms) if latency else (None, None)
        costs = [self.pruner.comb.cost({}), self.pruner.comb.cost(kept)]
        figures = [
            Figures(cost.parameters, cost.macs, cost.activations, time_ms, metric)
            for cost, time_ms, metric in zip(costs, times, self.metrics, strict=True)
        ]
        return Report(
            call=given,
            model_class=f"{type(self.model).__module__}.{type(self.model).__qualname__}",
            source=name,
            criterion=self.pruner.criterion_name,
            criterion_reason=self.pruner.why,
            normalization=self.pruner.normalization,
            original=figures[0],
            result=figures[1],
            latency=None if latency is None else latency.to_dict(),
            groups=tuple(_row(group, len(self.pruner.plan.groups[group.name])) for group in self.pruner.comb.groups),
            layers=_layers(self.model, self.student),
            nodes=tuple(nodes),
            shrinks=tuple(
                {"epoch": shrink.step / max(self.per_epoch, 1), **asdict(shrink)} for shrink in self.pruner.shrinks
            ),
            checks=self.pruner.checks,
            history=tuple(self.history),
            search=tuple(self.pruner.search),
            seconds=self.stages.seconds,
            environment=_environment(),
            notes=tuple(self.pruner.notes),
        )


class _Stages:
    """Times the stages of a run, and shows which one is on where stderr is a terminal."""

    def __init__(self, progress: bool | None) -> None:
        self.seconds: dict[str, float] = {}
        self.console = Console(stderr=True)
        self.shown = processes.rank() == 0 and (self.console.is_terminal if progress is None else progress)

    @contextmanager
    def __call__(self, name: str, *, bar: bool = True) -> Iterator[None]:
        start, shown = time.perf_counter(), self.shown
        log.info("%s …", name.capitalize())
        self.shown = False  # what runs within shows no second bar
        try:
            with self.console.status(f"cpd: {name}") if bar and shown else nullcontext():
                yield
        finally:
            self.shown = shown
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def _checkpoint(
    folder: Path | None,
    resume: bool,
    minutes: float,
    given: Mapping[str, Any],
    training: DistillConfig,
    model: nn.Module,
) -> Checkpoint | None:
    """The checkpoint of a run, read if it is to be resumed.

    Raises:
        InputError: nowhere to resume from, or a checkpoint that would be overwritten.
    """
    if folder is None:
        if resume:
            raise InputError("resume=True needs the output_dir of the run that is to go on.")
        return None
    if not minutes > 0:
        raise InputError(f"checkpoint_minutes must be above 0; got {minutes!r}.")
    shapes = sorted((name, *tensor.shape) for name, tensor in model.state_dict().items())
    key = {**given, **vars(training), "model": hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]}
    key = {name: value for name, value in key.items() if name not in ("output_dir", "progress")}
    checkpoint = Checkpoint(folder, key, minutes)
    if resume and checkpoint.read() is None:
        log.info("There is no checkpoint in %s yet: the run starts at its beginning.", folder)
    if not resume and checkpoint.path.exists():
        raise InputError(
            f"{checkpoint.path} is of a run that did not end. Pass resume=True (--resume) to go on with it, or delete "
            "it to start again."
        )
    return checkpoint


def _missed(target: Target, found: LatencyComparison, tolerance: float) -> str | None:
    """What to say where the last timing lies outside the tolerance."""
    if not target.is_measured or abs(target.attained(found) - 1) <= tolerance:
        return None
    return (
        f"Asked for {target.name}={target.value:g}, the last timing found {found.speedup:.2f} times as fast "
        f"({found.candidate_ms:.3g} ms), more than {tolerance:.0%} from it: widths go in steps, and other work on this "
        "machine moves the figures. Time both again on a quiet one (cpd latency)."
    )


def _layers(original: nn.Module, result: nn.Module) -> tuple[LayerRow, ...]:
    """The width of every layer that has a matrix or a kernel of weights, before and after."""

    def width(module: nn.Module, weight: Tensor) -> int:
        names = ("out_channels", "out_features", "embedding_dim")
        return next((found for name in names if isinstance(found := getattr(module, name, None), int)), len(weight))

    rows = []
    for name, module in original.named_modules():
        weights = [(key, weight) for key, weight in module.named_parameters(recurse=False) if weight.dim() >= 2]
        if weights:
            (key, weight), narrower = weights[0], result.get_submodule(name)
            after = width(narrower, narrower.get_parameter(key))
            rows.append(LayerRow(name, type(module).__name__, width(module, weight), after))
    return tuple(rows)


def _row(group: Any, kept: int) -> GroupRow:
    return GroupRow(group.name, group.size, kept, group.exact, group.frozen, tuple(map(str, group.members)))


def _environment() -> dict[str, str]:
    names = ("cpd", "torch", "onnx", "onnxruntime", "timm")
    found = {"python": sys.version.split()[0], **environment()}
    return {**found, **{name: version(name) for name in names}}


def example_call(model: nn.Module, example_inputs: Any, data: Iterable[Any] | None) -> Call:
    """The example inputs: those given, one sample of the data, or what timm and torchvision models take."""
    if isinstance(data, Iterator):
        raise InputError("data can be iterated only once (it is an iterator); pass a list or a DataLoader.")
    if example_inputs is None and data is not None:
        example_inputs = next(batches(data, 1)).call.part(1)
    if example_inputs is None:
        example_inputs = sources.default_inputs(model)
    if example_inputs is None:
        raise InputError(
            f"The input of {type(model).__name__} is not known: pass example_inputs=, a tensor (with its batch "
            "dimension), a tuple, or (tuple, dict)."
        )
    return as_call(example_inputs).to(device_of(model))


def check_data(model: nn.Module, data: Iterable[Any], loss: Callable[[Any, Any], Tensor] | None) -> None:
    """The first batch must go through the model and give a finite loss.

    Raises:
        TrainingError: if there is no batch or the loss is not finite.
        InputError: if the model fails on the batch, or no loss can be inferred.
    """
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
