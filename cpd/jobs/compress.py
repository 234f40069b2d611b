"""Compress: the whole path in one call.

comb -> prune (score, select, shrink, recover: `cpd.pruner`), at once or during the next -> distill -> export
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, TypedDict

from torch import nn

from cpd import processes
from cpd.config import PRUNING, PruneConfig
from cpd.coupling.comb import comb
from cpd.deploy.export import check_runs, export_onnx
from cpd.deploy.latency import LatencyComparison, LatencyProbe
from cpd.deploy.profiling import paired
from cpd.distillation.config import TRAINING, DistillConfig, EpochRecord
from cpd.distillation.distiller import distill
from cpd.errors import CPDError, first_line
from cpd.files.checkpoint import Checkpoint
from cpd.files.reading import conform
from cpd.jobs.identity import agreed_identity
from cpd.jobs.outcome import Measured, Result, call_record, missed, report_of
from cpd.jobs.request import check_data, checkpoint_of, example_call, given_of, steps_an_epoch, training_settings
from cpd.model.arguments import INPUTS, MODEL, NAMED_DATA, NAMED_MODEL
from cpd.model.inputs import Call, evaluated
from cpd.model.masks import masks_applied
from cpd.model.progress import part, shown
from cpd.model.recorded import why_not_by_name
from cpd.model.state import preserved
from cpd.model.tensors import copy_of
from cpd.options import EVALUATE, FLAG, LOSS, PATH, checked, checks_of, number, takes_options, text
from cpd.pruner import Pruner
from cpd.report.artifacts import check_output_dir
from cpd.tasks.loss import LossFunction
from cpd.tasks.metric import metric_name, told, written
from cpd.tasks.task import TASK, DataName, Task

log = logging.getLogger("cpd")

#: Seconds that the final model is timed, and that each node of both models is, for the report.
FINAL_SECONDS, PROFILE_SECONDS = 10.0, 0.5

Evaluate = Callable[[nn.Module], float]

_LEARNING = checks_of(DistillConfig, "epochs", "lr")
_MINUTES = number("above 0 and at most 1440 (a day)", lambda value: 0 < value <= 1440)
_SOURCE = text("a name, as 'timm:resnet18'")


@takes_options(PruneConfig)
@checked(
    model=NAMED_MODEL, task=TASK, data=NAMED_DATA, calibration=NAMED_DATA, example_inputs=INPUTS, loss=LOSS,
    evaluate=EVALUATE, **_LEARNING, training=TRAINING, teacher=MODEL, output_dir=PATH, overwrite=FLAG, resume=FLAG,
    checkpoint_minutes=_MINUTES, source=_SOURCE, progress=FLAG, config=PRUNING,
)  # fmt: skip
def compress(
    model: nn.Module | str,
    target_speedup: float | None = None,
    *,
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
    """Make a model faster: comb, prune, distill, and measure.

    Args:
        model: a trained model; left as it was, a copy is compressed. Of one that `torch.compile` gave, the module
            within; compile the result anew. Or the name of one, as "timm:resnet18", "hf:microsoft/resnet-18" or
            "ultralytics:yolo11n.pt", which is built with its pretrained weights.
        target_speedup: the first of the options below; exactly one target is needed.
        task: what the model is for: how its batches are read, which loss it has, what the student mimics, its metric.
            Known by itself for models of transformers, ultralytics and torchvision's detectors; for others, those
            that return logits. See `cpd.Task` for one of your own.
        data: batches of (input, target), or mappings as Hugging Face loaders give, in anything that can be iterated
            more than once; or the name of data that the task reads, as "coco8.yaml" for ultralytics. Without data,
            channels are chosen by magnitude and nothing is trained back.
        calibration: batches like those of `data`, as the model meets them in use: without augmentation. Channels are
            scored, and layers refitted, on them; on `data` if None.
        example_inputs: a tensor, a tuple, or (tuple, dict), the batch that latency is measured on; taken from `data`
            (one sample), or known for timm and torchvision models, if None.
        loss: `loss(output, target) -> scalar`; the model's own where its task has one, else cross-entropy is inferred
            for class targets.
        evaluate: `evaluate(model) -> float`, higher is better; reported before, between and after. The weights are
            kept that do best by it, of those before the training and after each epoch. It is called in reports by its
            name, or by its attribute `metric`, with the unit in brackets: `evaluate.metric = "top-1 accuracy [%]"`.
        epochs: passes over `data` that the student is trained; 0: one-shot, no gradient step. None: those of
            `training`, 10 if it says nothing.
        lr: peak learning rate; None: that of `training`, or the optimizer's default.
        training: all other settings of the training; its seed is the one below.
        teacher: what the student learns from; the unpruned model if None.
        output_dir: where the artifacts are written, and during the training a checkpoint; None writes none.
        overwrite: whether files may be replaced there that have the names of artifacts, but that cpd did not write, or
            that were changed since; a former result always may.
        resume: go on from the checkpoint in `output_dir`, if there is one: to the same plan and, on the same machine,
            the same weights.
        checkpoint_minutes: between two checkpoints at most; there is one after every shrink anyhow.
        source: how a fresh model is built by name ("timm:resnet18"); found out for timm and torchvision models.
        progress: False shows no progress line; else there is one where stderr is a terminal.
        config: options; those that are given by name replace its own.
        options: those of `cpd.PruneConfig`, by name:

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

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))
        >>> data = [(torch.randn(32, 3, 8, 8), torch.randint(10, (32,)))]  # or a DataLoader
        >>> result = cpd.compress(model, target_macs=0.5, data=data, epochs=0)  # epochs=10 trains it, too
        >>> result.model[0], model[0]  # the same class, narrower; the model given is as it was
        (Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1)), Conv2d(3, 16, kernel_size=(3, 3), stride=(1, 1)))
        >>> result.report.result.macs / result.report.original.macs
        0.5
        >>> sorted(file.name for file in result.save("out").iterdir())
        ['README.md', 'model.onnx', 'model.safetensors', 'plan.json', 'report.html', 'report.json']
    """
    processes.start()
    named = options if target_speedup is None else {"target_speedup": target_speedup, **options}
    settings = PruneConfig.of(config, named, "cpd.compress")
    read = given_of(model, task, data, calibration, evaluate, source)
    model, evaluate = read.model, read.evaluate
    if settings.outputs is None:
        settings = replace(settings, outputs=read.task.outputs(model))
    model = masks_applied(copy_of(model)) if settings.masks == "permanent" else model
    learning = training_settings(training, epochs, lr, settings.seed, progress, read.task.training(model))
    folder = None if output_dir is None else check_output_dir(output_dir, overwrite=overwrite)
    given = agreed_identity(model, teacher, read.data, loss)
    checkpoint = checkpoint_of(folder, resume, checkpoint_minutes, settings, learning, model, given)
    objects = {
        "data": data, "calibration": calibration, "example_inputs": example_inputs, "loss": loss,
        "evaluate": evaluate, "teacher": teacher,
    }  # fmt: skip
    data, calibration = read.batches()
    with preserved(model), shown(progress if processes.rank() == 0 else False):
        call = example_call(model, example_inputs, data, read.task)
        if settings.measures:
            check_runs(model, call)
        student = copy_of(model)
        for batches in (item for item in (data, calibration) if item is not None):
            check_data(student, batches, loss, settings.outputs, learning, teacher)
        per_epoch = steps_an_epoch(settings, learning, data)
        scored_on = data if calibration is None else calibration
        stages = _Stages(_planned(settings, scored_on is not None, data is not None and learning.epochs > 0))
        with stages("comb"):
            combed = comb(model, call, **settings.combing)
        by_weight = scored_on is None and settings.criterion is None
        pruner = Pruner(
            student, call, steps=round(per_epoch * learning.epochs), data=scored_on, loss=loss, comb=combed,
            config=replace(settings, criterion="magnitude") if by_weight else settings, stage=stages,
        )  # fmt: skip
        run = _Run(model, student, call, pruner, learning, stages, checkpoint, per_epoch)
        run.prune_and_train(data, loss, evaluate, teacher)
        result = run.finish(call_record(settings, learning, objects, folder), read.source, metric_name(evaluate))
    if folder is not None:
        processes.from_first(lambda: result.save(folder, overwrite=overwrite))
    if checkpoint is not None:
        processes.from_first(checkpoint.remove)
    return result


class _Before(TypedDict):
    """What was found before the training, as its checkpoint has it."""

    history: list[dict[str, Any]]
    before: float | None


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
        loss: LossFunction | None,
        evaluate: Evaluate | None,
        teacher: nn.Module | None,
    ) -> None:
        """Shrink the student, at once or while it is trained back."""
        log.info("Criterion: %s (%s).", self.pruner.criterion_name, self.pruner.why)
        if self.pruner.data is None:
            self.pruner.note(
                "No data given: channels are chosen by the size of their weights and nothing is trained back, so most "
                "of the accuracy is lost. Pass data=loader to keep it."
            )
        before = after = self._before(evaluate)
        if (self.checkpoint is None or self.checkpoint.state is None) and self.pruner.due:
            after = self._prune_at_once(evaluate, before)
        if self.checkpoint is not None:
            self.checkpoint.extra = {"history": list(self.history), "before": before}
        if data is not None and self.training.epochs:
            with self.stages("distill"):
                guide = copy_of(self.model) if teacher is None else teacher
                records = distill(
                    self.student, guide, data, loss=loss, evaluate=evaluate, config=self.training, pruner=self.pruner,
                    checkpoint=self.checkpoint, outputs=self.pruner.config.outputs, before=after,
                )  # fmt: skip
            self.history += [record.to_dict() for record in records]
            after = self._trained(records, evaluate, after)
        if not self.pruner.done:  # the data was shorter than its length
            self.pruner.note(
                "The data ran out before the pruning schedule finished; the remaining channels were pruned after "
                "training."
            )
            while not self.pruner.done:
                self.pruner.prune()
            after = self._evaluated(evaluate, "after the training")
        self.student.eval()
        self.metrics = (before, after)

    def _evaluated(self, evaluate: Evaluate | None, when: str) -> float | None:
        """The metric of the student as it is."""
        if evaluate is None:
            return None
        with self.stages("evaluate"):
            return evaluated(evaluate, self.student, when)

    def _trained(self, records: Sequence[EpochRecord], evaluate: Evaluate | None, before: float | None) -> float | None:
        """The metric after the training; what is kept of it is noted where that is not the end."""
        kept = next((record for record in records if record.kept), None)
        if kept is not None:
            if kept is not records[-1] and kept.metric is not None:
                best = told(metric_name(evaluate), kept.metric)
                self.pruner.note(f"The weights after epoch {kept.epoch} of {len(records)} are kept, the best: {best}.")
            return kept.metric
        if records and before is not None:
            best = told(metric_name(evaluate), before)
            self.pruner.note(
                f"No epoch made the model better: the weights before the training are kept ({best}). A lower lr, more "
                "epochs or less augmentation may help."
            )
            self.history = [{**row, "kept": True} if row["epoch"] == 0 else row for row in self.history]
        return before

    def _before(self, evaluate: Evaluate | None) -> float | None:
        """The metric of the unpruned model; that of the checkpoint, with its history, where there is one."""
        if self.checkpoint is None or self.checkpoint.state is None:
            return self._evaluated(evaluate, "before pruning")
        with self.checkpoint.taken_up():
            extra = conform(self.checkpoint.extra, _Before, "a state")
        self.history = extra["history"]
        return extra["before"]

    def _prune_at_once(self, evaluate: Evaluate | None, before: float | None) -> float | None:
        """The first shrink, before any training; the metric after it."""

        def pruned() -> None:
            if before is not None:
                found = self._evaluated(evaluate, "directly after pruning")
                assert found is not None
                self.pruner.note(f"Before pruning: {told(name, before)}; directly after it {written(name, found)}.")

        name = metric_name(evaluate)
        self.pruner.prune(pruned)
        after = self._evaluated(evaluate, "after pruning")
        if after is not None:
            self.history.append({"epoch": 0, "metric": after})
            self.pruner.note(f"Recovered, before any training: {told(name, after)}.")
        return after

    def finish(self, record: dict[str, Any], source: str | None, metric: str) -> Result:
        """Export, measure once more, and report."""
        comparison, onnx, nodes = None, None, list[dict[str, Any]]()
        with self.stages("deploy"):
            try:
                onnx, comparison, nodes = processes.from_first(self._deployed)
            except Exception as error:  # what ONNX Runtime raises shares no base class
                if self.pruner.target.is_measured:
                    raise
                told = error if isinstance(error, CPDError) else f"{type(error).__name__}: {first_line(error)}."
                self.pruner.note(f"The result has no ONNX model and no latency: {told}")
        if source is not None and (fault := why_not_by_name(source)):
            self.pruner.note(f"cpd.load does not build {source} by itself ({fault}): pass it a fresh model.")
        tolerance = self.pruner.config.tolerance
        if comparison is not None and (text := missed(self.pruner.target, comparison, tolerance)):
            self.pruner.note(text)
        report = report_of(
            self.model, self.pruner, Measured(comparison, tuple(nodes), self.metrics, metric),
            call=record, source=source, per_epoch=self.per_epoch, history=self.history, seconds=self.stages.seconds,
        )  # fmt: skip
        return Result(self.student, report, self.pruner.plan, onnx)

    def _deployed(self) -> tuple[bytes, LatencyComparison, list[dict[str, Any]]]:
        """The ONNX model, its latency beside the original's, and the time of each node of both."""
        onnx = export_onnx(self.student, self.call)
        target = self.pruner.target
        probe = self.pruner.probe or LatencyProbe(self.model, self.call, threads=self.pruner.config.threads)
        candidate = onnx if len(probe.calls) == 1 else self.student
        slowest = target.attained if target.is_measured else attrgetter("speedup")
        comparison = probe.compare(candidate, seconds=FINAL_SECONDS, precision=0.01, slowest=slowest)
        nodes = paired(probe.profile(seconds=PROFILE_SECONDS), probe.profile(onnx, seconds=PROFILE_SECONDS))
        return onnx, comparison, nodes


class _Stages:
    """Times the stages of a run, and shows which one is on, of how many.

    Args:
        planned: those that follow one another; others are parts of these, or stand between them.
    """

    def __init__(self, planned: Sequence[str]) -> None:
        self.seconds: dict[str, float] = {}
        self.planned, self._within = planned, False

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start, within = time.perf_counter(), self._within
        numbered = name in self.planned and not within
        log.log(logging.DEBUG if within else logging.INFO, "%s …", name.capitalize())
        self._within = True
        try:
            with part(f"stage {self.planned.index(name) + 1} of {len(self.planned)}: {name}" if numbered else name):
                yield
        finally:
            self._within = within
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def _planned(settings: PruneConfig, recovers: bool, trains: bool) -> list[str]:
    """The stages of a run, in their order; where it prunes while it trains, pruning is a part of that."""
    at_once = ["score", "select", "shrink", "check", *(["recover"] if recovers else [])]
    return [
        "comb",
        *(at_once if settings.schedule == "one-shot" else []),
        *(["distill"] if trains else []),
        "deploy",
    ]
