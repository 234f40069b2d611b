"""Compress: the whole path in one call.

comb -> prune (score, select, shrink, recover: `cpd.pruner`), at once or during the next -> distill -> export
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

from torch import nn

from cpd import processes
from cpd.config import PRUNING, PruneConfig
from cpd.coupling.comb import comb
from cpd.deploy.export import check_runs, export_onnx
from cpd.deploy.latency import LatencyProbe
from cpd.deploy.profiling import paired
from cpd.deploy.quantize import OnnxModule
from cpd.deploy.runtimes.catalogue import others_installed
from cpd.distillation.config import TRAINING, DistillConfig
from cpd.errors import CPDError, first_line
from cpd.files.checkpoint import Checkpoint
from cpd.jobs.drop import CONFIDENCE, NEARLY, Fastest, Within, recorded, searched, shipping
from cpd.jobs.identity import agreed_identity
from cpd.jobs.outcome import (
    Deployed,
    Measured,
    Result,
    call_record,
    missed,
    report_of,
    would_meet,
)
from cpd.jobs.request import (
    check_data,
    checkpoint_of,
    example_call,
    given_of,
    kept_for_loss,
    steps_an_epoch,
    training_settings,
)
from cpd.jobs.stages import Evaluate, Run, Stages
from cpd.model.arguments import INPUTS, MODEL, NAMED_DATA, NAMED_MODEL
from cpd.model.inputs import Call, evaluated
from cpd.model.masks import masks_applied
from cpd.model.progress import shown
from cpd.model.state import preserved
from cpd.model.tensors import copy_of
from cpd.options import EVALUATE, FLAG, LOSS, PATH, checked, checks_of, number, takes_options, text
from cpd.pruner import Pruner
from cpd.report.artifacts import check_output_dir
from cpd.report.records import TriedRow
from cpd.selection.common import Common
from cpd.selection.schedule import Schedule
from cpd.tasks.loss import LossFunction
from cpd.tasks.metric import metric_name, told, written
from cpd.tasks.task import TASK, DataName, Task, check_whole, itself, on_itself

log = logging.getLogger("cpd")

#: Seconds that the final model is timed, and that each node of both models is, for the report.
FINAL_SECONDS, PROFILE_SECONDS = 10.0, 0.5
#: Seconds that it is timed in each other runtime.
ELSEWHERE_SECONDS = 2.0

#: How often the search goes on from the last timing at most.
MOST_RETURNS = 2

_LEARNING = checks_of(DistillConfig, "epochs", "lr")
_MINUTES = number("above 0 and at most 1440 (a day)", lambda value: 0 < value <= 1440)
_SOURCE = text("a name, as 'timm:resnet18'")
_DROP = number("above 0", lambda value: value > 0)
_CONFIDENCE = number("of at least 0.5 and below 1", lambda value: 0.5 <= value < 1)


_ARGUMENTS = {
    "model": NAMED_MODEL, "max_drop": _DROP, "confidence": _CONFIDENCE, "task": TASK, "data": NAMED_DATA,
    "calibration": NAMED_DATA, "example_inputs": INPUTS, "loss": LOSS, "evaluate": EVALUATE, **_LEARNING,
    "training": TRAINING, "teacher": MODEL, "output_dir": PATH, "overwrite": FLAG, "resume": FLAG,
    "checkpoint_minutes": _MINUTES, "source": _SOURCE, "progress": FLAG, "config": PRUNING,
}  # fmt: skip


@takes_options(PruneConfig)
@checked(**_ARGUMENTS)
def compress(
    model: nn.Module | str,
    target_speedup: float | None = None,
    *,
    max_drop: float | None = None,
    confidence: float = CONFIDENCE,
    task: Task | None = None,
    data: Iterable[Any] | DataName | None = None,
    calibration: Iterable[Any] | DataName | None = None,
    example_inputs: Any = None,
    loss: LossFunction | None = None,
    evaluate: Evaluate | None = None,
    epochs: float | None = None,
    lr: float | None = None,
    training: DistillConfig | None = None,
    teacher: nn.Module | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    resume: bool = False,
    checkpoint_minutes: float = 10.0,
    source: str | None = None,
    progress: bool | None = None,
    config: PruneConfig | None = None,
    **options: Any,
) -> Result:
    """Make a trained model faster: find what can be pruned, prune it, distill the result and measure its speed-up.

    Args:
        model: The trained model. It is not changed: a copy is compressed. A model that `torch.compile` returned is
            unwrapped; compile the result again. A name, such as "timm:resnet18", "hf:microsoft/resnet-18" or
            "ultralytics:yolo11n.pt", builds that model with its pretrained weights.
        target_speedup: The first of the options below. Give exactly one target, or `max_drop`.
        max_drop: How much the metric may fall, in its own unit (percentage points for a percentage). The result is
            the fastest model found that stays within it. Speeds are tried without training and, if `epochs` is above
            0, the last few with training. Each is judged by `evaluate`, so let it use data that no other argument has.
        confidence: One-sided confidence that `max_drop` holds. It applies where `evaluate` has an attribute `each`: a
            function that takes a model and returns one number per sample, whose mean is the metric (`cpd.demo.accuracy`
            has one).
        task: What kind of model it is: how its batches are read, its loss, what the student imitates, its metric.
            Found automatically for models of transformers and ultralytics and for torchvision's detectors; any other
            model is taken to return logits. See `cpd.Task` to write your own.
        data: Batches of (input, target), or mappings as loaders of Hugging Face give, in anything that can be iterated
            more than once; or samples, in a data set or in arrays (inputs, or inputs and targets), which may be mapped
            into memory; or the name of data that the task can read, such as "coco8.yaml" for ultralytics. Without data,
            channels are chosen by magnitude, and accuracy is not recovered.
        calibration: Batches without augmentation, as the model sees them in use. Channels are scored and layers
            refitted on these. Default: `data`.
        example_inputs: A tensor, a tuple, or (tuple, dict): the batch on which latency is measured. Default: one sample
            of `data`; without data, the known input of models of timm and torchvision.
        loss: `loss(output, target) -> scalar`. Default: the loss of the model's task, or else cross-entropy if the
            targets are classes.
        evaluate: `evaluate(model) -> float`, where higher is better. It is reported before, between and after the
            steps, and decides which weights are kept: the best of those before the training and after each epoch.
            Reports show its function name, or its attribute `metric`, with the unit in brackets:
            `evaluate.metric = "top-1 accuracy [%]"`.
        epochs: Passes over `data` for which the student is trained; 0 prunes one-shot, without a gradient step.
            Default: the epochs of `training`, which are 10 unless set.
        lr: Peak learning rate. Default: the one of `training`, or else the optimizer's default.
        training: All other settings of the training. Its seed is replaced by `seed` below.
        teacher: The model that the student learns from. Default: the unpruned model.
        output_dir: The folder to which the result is written and, during the training, a checkpoint. Default: nothing
            is written.
        overwrite: Whether to replace files in `output_dir` that have the name of a result's file, but were not written
            by cpd or were changed since. An unchanged earlier result is always replaced.
        resume: Continue from the checkpoint in `output_dir`, if there is one. The run ends with the same plan and, on
            the same machine, with the same weights as an uninterrupted one.
        checkpoint_minutes: Longest time between two checkpoints. One is written after every pruning step as well.
        source: The name from which a fresh model can be built ("timm:resnet18"). Default: found automatically for
            models of timm and torchvision.
        progress: False shows no progress line. Default: shown if stderr is a terminal.
        config: Options held together. Options given by name replace those in it.
        options: The options of `cpd.PruneConfig`, by name:

    Returns:
        A `Result` with `model`, `speedup`, `report` and `save(dir)`.

    Raises:
        InputError: An argument cannot be used. This is raised before any work. With `max_drop`: `evaluate` is missing,
            or too few samples are evaluated for the drop to be known at that confidence.
        TraceError: The model cannot be exported.
        NothingToPruneError: No group can be pruned. The message gives the reason for each group.
        TargetError: The target is out of reach. The message gives the best figure and what prevents a better one.
        TrainingError: The loader is empty, or a loss is not finite.
        ExportError: The ONNX export fails, or its outputs differ from those of PyTorch.
        CheckpointError: The checkpoint cannot be written or read, or belongs to a run with other settings.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))
        >>> data = [(torch.randn(32, 3, 8, 8), torch.randint(10, (32,)))]  # or a DataLoader
        >>> result = cpd.compress(model, target_macs=0.5, data=data, epochs=0)  # epochs=10 trains it, too
        >>> result.model[0], model[0]  # the same class, narrower; the original is unchanged
        (Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1)), Conv2d(3, 16, kernel_size=(3, 3), stride=(1, 1)))
        >>> result.report.result.macs / result.report.original.macs
        0.5
        >>> sorted(file.name for file in result.save("out").iterdir())
        ['README.md', 'model.onnx', 'model.safetensors', 'plan.json', 'report.html', 'report.json']
    """
    return compressed(
        model, options if target_speedup is None else {"target_speedup": target_speedup, **options},
        max_drop=max_drop, confidence=confidence, task=task, data=data, calibration=calibration,
        example_inputs=example_inputs, loss=loss, evaluate=evaluate, epochs=epochs, lr=lr, training=training,
        teacher=teacher, output_dir=output_dir, overwrite=overwrite, resume=resume,
        checkpoint_minutes=checkpoint_minutes, source=source, progress=progress, config=config,
    )  # fmt: skip


@checked(**_ARGUMENTS)
def compressed(  # noqa: D417  # the other arguments are those of `compress`
    model: nn.Module | str,
    options: Mapping[str, Any],
    *,
    common: Common | None = None,
    max_drop: float | None = None,
    confidence: float = CONFIDENCE,
    task: Task | None = None,
    data: Iterable[Any] | DataName | None = None,
    calibration: Iterable[Any] | DataName | None = None,
    example_inputs: Any = None,
    loss: LossFunction | None = None,
    evaluate: Evaluate | None = None,
    epochs: float | None = None,
    lr: float | None = None,
    training: DistillConfig | None = None,
    teacher: nn.Module | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    resume: bool = False,
    checkpoint_minutes: float = 10.0,
    source: str | None = None,
    progress: bool | None = None,
    config: PruneConfig | None = None,
) -> Result:
    """`compress`, with what other compressions of the model have found.

    Args:
        model: as there, and so are all other arguments and errors.
        options: those of `cpd.PruneConfig`, the target among them.
        common: what is found here is found once for all that are given it; None: nothing is shared.
    """
    processes.start()
    settings = PruneConfig.of(config, options, "cpd.compress")
    folder = None if output_dir is None else check_output_dir(output_dir, overwrite=overwrite)
    read = given_of(model, task, data, calibration, evaluate, source)
    model, evaluate = read.model, read.evaluate
    settings, within = searched(read.completed(settings), max_drop, confidence, on_itself(evaluate), resume)
    model = masks_applied(copy_of(model)) if settings.masks == "permanent" else model
    learning = training_settings(training, epochs, lr, settings.seed, progress, read.task.training(model))
    given = agreed_identity(model, teacher, read.data, loss)
    checkpoint = checkpoint_of(None if within else folder, resume, checkpoint_minutes, settings, learning, model, given)
    objects = {
        "data": data, "calibration": calibration, "example_inputs": example_inputs, "loss": loss,
        "evaluate": evaluate, "teacher": teacher,
    }  # fmt: skip
    data, calibration = read.batches()
    with preserved(model), read.task.viewed(model, teacher), shown(progress if processes.rank() == 0 else False):
        call = example_call(model, example_inputs, data, read.task)
        if settings.measures:
            check_runs(model, call)
        scored_on = data if calibration is None else calibration
        run = _begun(model, call, settings, learning, checkpoint, data, scored_on, loss, teacher, common)
        if within is None:
            run.prune_and_train(data, loss, on_itself(evaluate), teacher)
        else:
            run = run.fastest(within, data, scored_on, loss, teacher)
        record = recorded(call_record(settings, learning, objects, folder), within)
        result = run.finish(record, read.source, evaluate)
        itself(result.model)
    if folder is not None:
        processes.from_first(lambda: result.save(folder, overwrite=overwrite))
    if checkpoint is not None:
        processes.from_first(checkpoint.remove)
    return result


def _begun(
    model: nn.Module,
    call: Call,
    settings: PruneConfig,
    learning: DistillConfig,
    checkpoint: Checkpoint | None,
    data: Iterable[Any] | None,
    scored_on: Iterable[Any] | None,
    loss: LossFunction | None,
    teacher: nn.Module | None,
    common: Common | None,
) -> _Run:
    """A run whose student is a copy of the model, as it is; its data has been looked at."""
    for batches in (item for item in (data, None if scored_on is data else scored_on) if item is not None):
        check_data(model, batches, loss, settings.outputs, learning, teacher)
    student, per_epoch = copy_of(model), steps_an_epoch(settings, learning, data)
    stages = Stages(_planned(settings, scored_on is not None, data is not None and learning.epochs > 0))
    steps = round(per_epoch * learning.epochs)
    pruner = _pruner(model, student, call, settings, steps, scored_on, loss, stages, common)
    return _Run(model, student, call, pruner, learning, stages, checkpoint, per_epoch, common=common or Common())


def _pruner(
    model: nn.Module,
    student: nn.Module,
    call: Call,
    settings: PruneConfig,
    steps: int,
    scored_on: Iterable[Any] | None,
    loss: LossFunction | None,
    stages: Stages,
    common: Common | None,
) -> Pruner:
    """The pruner of a student, by the comb of the model that it is a copy of."""
    if common is not None and common.comb is not None:
        combed = common.comb
    else:
        with stages("comb"):
            combed = comb(model, call, **settings.combing)
    if common is not None:
        common.comb = combed
    whole = kept_for_loss(student, None if loss is not None else scored_on, combed)
    if whole:
        settings = replace(settings, ratios={**(settings.ratios or {}), **whole})
    return Pruner(
        student, call, steps=steps, data=scored_on, loss=loss, comb=combed, config=settings, stage=stages,
        common=common,
    )  # fmt: skip


@dataclass
class _Run(Run):
    """State of one compression, handed from stage to stage."""

    pruner: Pruner
    common: Common = field(default_factory=Common)
    tried: Sequence[TriedRow] = ()

    def fastest(
        self,
        within: Within,
        data: Iterable[Any] | None,
        scored_on: Iterable[Any] | None,
        loss: LossFunction | None,
        teacher: nn.Module | None,
    ) -> _Run:
        """The run whose student is the fastest of those whose metric loses no more than it may."""
        first, tried, common = self.pruner, list[TriedRow](), Common()

        def attempt(speedup: float, trains: bool) -> _Run:
            student, epochs = copy_of(self.model), self.training.epochs if trains else 0
            config = replace(
                first.config, target_speedup=speedup, tolerance=max(first.config.tolerance, NEARLY),
                schedule=first.config.when if trains else Schedule("one-shot"),
            )  # fmt: skip
            pruner = Pruner(
                student, self.call, steps=round(self.per_epoch * epochs), data=scored_on, loss=loss, comb=first.comb,
                config=config, stage=self.stages, common=common,
            )  # fmt: skip
            training = replace(self.training, epochs=epochs)
            one = replace(self, student=student, pruner=pruner, training=training, history=[], tried=tried)
            one.prune_and_train(data, loss, None, teacher)  # without a metric: choosing an epoch by it would spend it
            return one

        with self.stages("export"):
            ship = shipping(self.model, self.call, first.config, scored_on)
        search = Fastest(ship(self.model), within, attempt, ship, tried)
        return search.search(trains=data is not None and self.training.epochs > 0)

    def __post_init__(self) -> None:
        """Say what channels are chosen by."""
        log.info("Criterion: %s (%s).", self.pruner.criterion_name, self.pruner.why)
        if self.pruner.data is None:
            self.pruner.note(
                "No data was given: channels are chosen by the magnitude of their weights and accuracy is not "
                "recovered, so most of it is lost. Pass data=loader to keep it."
            )

    def before(self, evaluate: Evaluate | None) -> float | None:
        """The metric of the model as it was given, found once for all that have it in common."""
        goes_on = self.checkpoint is not None and self.checkpoint.state is not None
        if evaluate is None or goes_on or self.common.metric is None:
            self.common.metric = super().before(evaluate)
        return self.common.metric

    def prune_at_once(self, evaluate: Evaluate | None, before: float | None) -> float | None:
        """The first shrink, before any training; the metric after it."""
        name, directly = metric_name(evaluate), list[float]()

        def pruned() -> None:
            check_whole(self.model, self.student, self.call)
            if before is not None:
                found = self.evaluated(evaluate, "directly after pruning")
                assert found is not None
                directly.append(found)
                after = written(name, found)
                self.pruner.note(f"Before pruning: {told(name, before)}; directly after pruning: {after}.")

        self.pruner.prune(pruned)
        return self.untrained(evaluate, "Recovered, before any training", before, directly[0] if directly else None)

    def finish(self, record: dict[str, Any], source: str | None, evaluate: Evaluate | None) -> Result:
        """Export, measure once more, and report."""
        deployed: Deployed | None = None
        with self.stages("deploy"):
            try:
                deployed = processes.from_first(self._deployed)
                deployed = self._on_target(deployed, evaluate)
            except Exception as error:  # what ONNX Runtime raises shares no base class
                if self.pruner.target.is_measured:
                    raise
                told = error if isinstance(error, CPDError) else f"{type(error).__name__}: {first_line(error)}."
                self.pruner.note(f"The result has no ONNX model and no latency: {told}")
        self.note_source(source)
        comparison, nodes, elsewhere = None, tuple[dict[str, Any], ...](), tuple[dict[str, Any], ...]()
        if deployed is not None:
            comparison, nodes = deployed.latency, deployed.nodes
            if self.pruner.target.is_measured:
                with self.stages("other runtimes"):
                    elsewhere = processes.from_first(lambda: self._elsewhere(deployed))
        tolerance = math.inf if self.tried else self.pruner.config.tolerance
        if comparison is not None and (text := missed(self.pruner.target, comparison, tolerance, self.pruner.is_bound)):
            self.pruner.note(text)
            if (other := processes.from_first(lambda: self.pruner.would_meet(comparison))) is not None:
                self.pruner.note(would_meet(self.pruner, other))
        self.pruner.notes += [] if deployed is None else deployed.notes
        if deployed is not None and deployed.int8 is not None and not self.tried:
            self.metrics = self._evaluated_in_int8(deployed.int8, evaluate)
        name, tried = metric_name(evaluate), tuple(self.tried)
        files = (None, None) if deployed is None else deployed.files
        report = report_of(
            self.model, self.pruner, Measured(comparison, nodes, self.metrics, name, elsewhere, tried, files),
            call=record, source=source, per_epoch=self.per_epoch, history=self.history, seconds=self.stages.seconds,
        )  # fmt: skip
        onnx, int8 = (None, None) if deployed is None else (deployed.onnx, deployed.int8 and deployed.int8[1])
        return Result(self.student, report, self.pruner.plan, onnx, int8)

    def _on_target(self, deployed: Deployed, evaluate: Evaluate | None) -> Deployed:
        """What is deployed in the end: the last timing decides, so where nothing was trained the search goes on.

        Each time the model is pruned anew, with the scores there are, to the widths that the timing asks for.
        """
        pruner, before, tolerance = self.pruner, self.metrics[0], self.pruner.config.tolerance
        trained = bool(self.tried) or len(pruner.shrinks) != 1 or any(row["epoch"] for row in self.history)
        for _ in range(MOST_RETURNS):
            if trained or missed(pruner.target, deployed.latency, tolerance, pruner.is_bound) is None:
                break
            former = pruner.plan
            log.info("The final timing gave a speed-up of %.2f: the search continues.", deployed.latency.speedup)
            self.student, self.history = copy_of(self.model), []
            pruner.start_over(self.student, deployed.latency)
            after = self.prune_at_once(evaluate, before)
            self.student.eval()
            self.metrics = (before, after)
            deployed = processes.from_first(self._deployed)
            if pruner.plan.digest == former.digest:
                break
        return deployed

    def _evaluated_in_int8(
        self, models: tuple[bytes, bytes], evaluate: Evaluate | None
    ) -> tuple[float | None, float | None]:
        """The metrics of the INT8 models, which are what is shipped; those in float are noted."""
        if evaluate is None:
            return self.metrics
        with self.stages("evaluate"):
            before, after = (
                evaluated(evaluate, OnnxModule(content), f"of the {name} INT8 model")
                for name, content in zip(("unpruned", "compressed"), models, strict=True)
            )
        name = metric_name(evaluate)
        in_float = ["not known" if value is None else written(name, value) for value in self.metrics]
        self.pruner.note(
            f"The metrics are those of the INT8 models. In float, the unpruned model has {in_float[0]} and the "
            f"compressed model {in_float[1]}."
        )
        return before, after

    def _elsewhere(self, deployed: Deployed) -> tuple[dict[str, Any], ...]:
        """The original and the result in other runtimes that are installed, so that a miss there is seen."""
        settings, rows = self.pruner.config, list[dict[str, Any]]()
        for name in others_installed(settings.runtime):
            row: dict[str, Any] = dict.fromkeys(("speedup", "original_ms", "candidate_ms", "error"))
            try:
                probe = LatencyProbe(self.model, self.call, runtime=name, threads=settings.threads)
                candidate = probe.artifact(self.student)
                candidate.onnx = deployed.onnx
                found = probe.compare(candidate, seconds=ELSEWHERE_SECONDS, precision=0.02)
                row |= {key: getattr(found, key) for key in ("speedup", "original_ms", "candidate_ms")}
            except CPDError as error:
                row["error"] = first_line(error)
            rows.append({"runtime": name, **row})
        return tuple(rows)

    def _deployed(self) -> Deployed:
        """The ONNX model, its latency beside the original's, and the time of each node of both."""
        settings, target = self.pruner.config, self.pruner.target
        probe = self.pruner.probe or LatencyProbe(
            self.model, self.call, runtime=settings.runtime, threads=settings.threads, calibration=self.pruner.data
        )  # fmt: skip
        candidate = probe.artifact(self.student)
        candidate.onnx = export_onnx(self.student, self.call)
        slowest = target.attained if target.is_measured else attrgetter("speedup")
        comparison = probe.compare(
            candidate, seconds=FINAL_SECONDS, precision=0.01, slowest=slowest, apart=self.pruner.data is not None
        )  # fmt: skip
        nodes = paired(probe.profile(seconds=PROFILE_SECONDS), probe.profile(candidate, seconds=PROFILE_SECONDS))
        int8 = (probe.original.int8, candidate.int8) if probe.is_quantized else None
        files = probe.bytes_of(probe.original), probe.bytes_of(candidate)
        kept = tuple(one.in_float for one in (probe.original, candidate)) if probe.is_quantized else ()
        return Deployed(candidate.content, comparison, tuple(nodes), int8, files, kept)


def _planned(settings: PruneConfig, recovers: bool, trains: bool) -> list[str]:
    """The stages of a run, in their order; where it prunes while it trains, pruning is a part of that."""
    at_once = ["score", "select", "shrink", "check", *(["recover"] if recovers else [])]
    return [
        "comb",
        *(at_once if settings.schedule == "one-shot" else []),
        *(["distill"] if trains else []),
        "deploy",
    ]
