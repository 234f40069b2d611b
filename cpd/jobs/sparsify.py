"""Sparsify: the whole path to a sparse model in one call.

mask (score, choose, refit in closed form: `cpd.sparsity`), at once or during the next -> distill -> export, measure
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cpd import processes
from cpd.coupling.comb import Comb, comb
from cpd.criteria.choice import criterion_name
from cpd.deploy.export import export_onnx
from cpd.deploy.latency import LatencyComparison, LatencyProbe
from cpd.distillation.config import TRAINING, DistillConfig
from cpd.errors import CPDError, InputError, first_line
from cpd.jobs.identity import agreed_identity
from cpd.jobs.outcome import call_record, environment_of, layer_rows, source_of
from cpd.jobs.request import check_data, checkpoint_of, example_call, steps_an_epoch, training_settings
from cpd.jobs.stages import Evaluate, Run, Stages
from cpd.model.architecture import architecture_of, check_architecture
from cpd.model.arguments import INPUTS, MODEL, SAMPLES_OR_DATA
from cpd.model.inputs import Call, check_model, evaluating, plain_attention
from cpd.model.masks import masks_applied
from cpd.model.progress import shown
from cpd.model.randomness import random_states_kept, seeded
from cpd.model.samples import as_batches
from cpd.model.state import preserved
from cpd.model.tensors import copy_of
from cpd.options import EVALUATE, FLAG, LOSS, PATH, Check, checked, checks_of, choice, number, takes_options, text
from cpd.plan import PLAN, Plan
from cpd.report.artifacts import SPARSE as FILES
from cpd.report.artifacts import check_output_dir, save_result, unique_tensors
from cpd.report.packed import pack
from cpd.report.records import Figures, SparseRow
from cpd.report.report import Report
from cpd.sparsity.config import SPARSE, SparseConfig
from cpd.sparsity.masking import weights_of, zeros_of
from cpd.sparsity.masks import Masks
from cpd.sparsity.patterns import CHANNEL
from cpd.sparsity.sparsifier import Sparsifier
from cpd.surgery.shrink import shrink
from cpd.tasks.loss import LossFunction
from cpd.tasks.metric import metric_name, told, written

log = logging.getLogger("cpd")

#: Seconds that the final model is timed.
FINAL_SECONDS = 5.0
#: Fine-tuning goes on at this share of the rate at which a training peaks, where none is given.
GENTLY = 0.1
#: How the weights are written.
STORAGES = ("plain", "packed", "packed-int8")
NOT_FASTER = (
    "Zeros do not make the model faster, because ONNX Runtime multiplies by them. They make a packed file smaller, and "
    "on GPUs that support 2:4 sparsity they make a runtime built for it faster. For speed, remove channels: cpd "
    "compress."
)
INIT = "init"

_MINUTES = number("above 0 and at most 1440 (a day)", lambda value: 0 < value <= 1440)
_REWIND = Check(
    "a state_dict of the model, or 'init'",
    lambda value: value == INIT if isinstance(value, str) else isinstance(value, Mapping),
)


@dataclass(frozen=True, repr=False)
class SparseResult:
    """The result of `cpd.sparsify`.

    Attributes:
        model: The sparse model, in eval mode. Its class is that of the original; with the pattern "channel" it is
            narrower.
        report: The figures of every stage.
        masks: Which weights of the original model are kept.
        plan: What is kept of the original's shapes: everything, except with the pattern "channel"; or the plan that was
            passed.
    """

    model: nn.Module
    report: Report
    masks: Masks
    plan: Plan
    _onnx: bytes | None = field(default=None)

    def __repr__(self) -> str:
        """The figures before and after sparsification."""
        return repr(self.report).replace(type(self.report).__name__, type(self).__name__, 1)

    @property
    def sparsity(self) -> float:
        """The share of zeros among all weights of convolutions and linear layers."""
        return self.report.zeros or 0.0

    @checked(directory=PATH, overwrite=FLAG, storage=choice(*STORAGES))
    def save(self, directory: str | os.PathLike[str], *, overwrite: bool = False, storage: str = "plain") -> Path:
        """Write weights, masks, plan, ONNX model, report and model card to a folder that `cpd.load` reads.

        Args:
            directory: The folder. It is created if it does not exist, and may hold other files with other names.
            overwrite: Whether to replace files that have the name of one of these files, but were not written by cpd
                or were changed since.
            storage: How the weights are written: "plain" (`model.safetensors`, which any reader takes), "packed" (a
                bitmap and the exact values), or "packed-int8" (the values rounded to 8 bits, with one scale for each
                output).

        Returns:
            The path of the folder.

        Raises:
            InputError: If `directory` is not a folder, cannot be written to, or holds such files and `overwrite` is
                False.
            ArtifactError: If a file cannot be written. The folder is then unchanged.
        """
        target = check_output_dir(directory, FILES, overwrite=overwrite)
        packed = None
        if storage != "plain":
            packed = pack(unique_tensors(self.model), int8=storage == "packed-int8")
        masks = None if self.masks.pattern == CHANNEL else self.masks.to_bytes()
        save_result(target, self.model, self.plan, self.report, self._onnx, masks=masks, packed=packed)
        return target


@takes_options(SparseConfig)
@checked(
    model=MODEL, **checks_of(SparseConfig, "sparsity"), data=SAMPLES_OR_DATA, calibration=SAMPLES_OR_DATA,
    example_inputs=INPUTS, loss=LOSS, evaluate=EVALUATE, **checks_of(DistillConfig, "epochs", "lr"), training=TRAINING,
    teacher=MODEL, rewind=_REWIND, plan=PLAN, output_dir=PATH, overwrite=FLAG, storage=choice(*STORAGES), resume=FLAG,
    checkpoint_minutes=_MINUTES, source=text("a name, as 'timm:resnet18'"), progress=FLAG, config=SPARSE,
)  # fmt: skip
def sparsify(
    model: nn.Module,
    sparsity: float | None = None,
    *,
    data: Iterable[Any] | None = None,
    calibration: Iterable[Any] | None = None,
    example_inputs: Any = None,
    loss: LossFunction | None = None,
    evaluate: Evaluate | None = None,
    epochs: float | None = None,
    lr: float | None = None,
    training: DistillConfig | None = None,
    teacher: nn.Module | None = None,
    rewind: Mapping[str, Tensor] | str | None = None,
    plan: Plan | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    storage: str = "plain",
    resume: bool = False,
    checkpoint_minutes: float = 10.0,
    source: str | None = None,
    progress: bool | None = None,
    config: SparseConfig | None = None,
    **options: Any,
) -> SparseResult:
    """Set weights of a model to zero: choose them, refit the others in closed form, distill, and measure.

    Args:
        model: The trained model. It is not changed: a copy is made sparse. If it has masks of `torch.nn.utils.prune`,
            they are multiplied into the weights of the copy.
        sparsity: The first of the options below.
        data: Batches of (input, target), or mappings as loaders of Hugging Face give, in anything that can be iterated
            more than once. Without data, nothing is refitted or trained.
        calibration: Batches without augmentation, for scores and refits. Default: `data`.
        example_inputs: A tensor, a tuple, or (tuple, dict), as for `cpd.compress`. Default: one sample of `data`.
        loss: `loss(output, target) -> scalar`. Default: cross-entropy if the targets are classes.
        evaluate: `evaluate(model) -> float`, where higher is better. It is reported before, between and after the
            steps, and decides which weights are kept: the best of those before the training and after each epoch at
            the final sparsity.
        epochs: Passes over `data` for which the sparse model is trained; 0 takes no gradient step. Default: the epochs
            of `training`, which are 10 unless set.
        lr: Peak learning rate. Default: the one of `training`, or else a tenth of the optimizer's default.
        training: All other settings of the training. Its seed is replaced by `seed` below.
        teacher: The model that the sparse one learns from. Default: the dense model.
        rewind: The values to which the kept weights are reset before the training: a state dict of the model from
            earlier in its training (a lottery ticket, Frankle and Carbin 2019, arXiv 1803.03635), or "init" for new
            random values. Nothing is refitted then.
        plan: For a model that `cpd.compress` made: the plan of its result. It is saved in the folder, so that
            `cpd.load` can start from a fresh model of the original class.
        output_dir: The folder to which the result is written and, during the training, a checkpoint. Default: nothing
            is written.
        overwrite: Whether to replace files in `output_dir` that cpd did not write or that were changed since.
        storage: How the weights are written, as for `SparseResult.save`.
        resume: Continue from the checkpoint in `output_dir`, if there is one.
        checkpoint_minutes: Longest time between two checkpoints. One is written after every change of the masks as
            well.
        source: The name from which a fresh model can be built ("timm:resnet18"). Default: found automatically for
            models of timm and torchvision.
        progress: False shows no progress line. Default: shown if stderr is a terminal.
        config: Options held together. Options given by name replace those in it.
        options: The options of `cpd.SparseConfig`, by name:

    Returns:
        A `SparseResult` with `model`, `masks`, `sparsity`, `report` and `save(dir)`.

    Raises:
        InputError: An argument cannot be used. This is raised before any work.
        TrainingError: The loader is empty, or a loss is not finite.
        CheckpointError: The checkpoint cannot be written or read, or belongs to a run with other settings.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))
        >>> data = [(torch.randn(32, 3, 8, 8), torch.randint(10, (32,)))]  # or a DataLoader
        >>> result = cpd.sparsify(model, 0.75, data=data, epochs=0)  # epochs=10 trains it, too
        >>> result.masks
        Masks(unstructured: 4,644 of 6,192 weights in 2 layers are zero, 75.0%)
        >>> cpd.get_sparsity(result.model), cpd.get_sparsity(model)  # the original is unchanged
        (0.75, 0.0)
        >>> sorted(file.name for file in result.save("out").iterdir())  # doctest: +NORMALIZE_WHITESPACE
        ['README.md', 'masks.safetensors', 'model.onnx', 'model.safetensors', 'plan.json', 'report.html',
         'report.json']
    """
    processes.start()
    named = options if sparsity is None else {"sparsity": sparsity, **options}
    settings = SparseConfig.of(config, named, "cpd.sparsify")
    model = masks_applied(copy_of(check_model(model)))
    settings = _checked(settings, model, plan, rewinds=rewind is not None)
    learning = _gently(training_settings(training, epochs, lr, settings.seed, progress))
    folder = None if output_dir is None else check_output_dir(output_dir, FILES, overwrite=overwrite)
    given = agreed_identity(model, teacher, data, loss)
    checkpoint = checkpoint_of(folder, resume, checkpoint_minutes, settings, learning, model, given)
    objects = {
        "data": data, "calibration": calibration, "example_inputs": example_inputs, "loss": loss,
        "evaluate": evaluate, "teacher": teacher, "rewind": rewind,
    }  # fmt: skip
    data, calibration = (None if item is None else as_batches(item) for item in (data, calibration))
    with preserved(model), shown(progress if processes.rank() == 0 else False):
        call = example_call(model, example_inputs, data)
        student = copy_of(model)
        for batches in (item for item in (data, calibration) if item is not None):
            check_data(student, batches, loss, settings.outputs, learning, teacher)
        per_epoch = steps_an_epoch(settings, learning, data)
        stages = Stages(["recover", *(["distill"] if data is not None and learning.epochs else []), "deploy"])
        combed = _combed(model, call, settings, stages) if settings.pattern == CHANNEL else None
        sparsifier = Sparsifier(
            student, steps=round(per_epoch * learning.epochs), data=data if calibration is None else calibration,
            loss=loss, config=settings, comb=combed, stage=stages,
        )  # fmt: skip
        run = _Run(model, student, call, sparsifier, learning, stages, checkpoint, per_epoch, rewind=rewind, plan=plan)
        run.prune_and_train(data, loss, evaluate, teacher)
        record = call_record(settings, learning, objects, folder)
        result = run.finish(record, source, metric_name(evaluate))
    if folder is not None:
        processes.from_first(lambda: result.save(folder, overwrite=overwrite, storage=storage))
    if checkpoint is not None:
        processes.from_first(checkpoint.remove)
    return result


def _checked(settings: SparseConfig, model: nn.Module, plan: Plan | None, *, rewinds: bool) -> SparseConfig:
    """The settings, without a refit where weights are rewound.

    Raises:
        InputError: no share of zeros; masks that change while weights that were rewound train; a plan that is not of
            the model, or a model that would become narrower than the plan says.
    """
    _ = settings.share
    if plan is not None:
        wanted = plan.architecture and plan.architecture.narrowed(plan)
        remedy = "Pass result.plan of the cpd.compress that made this model."
        check_architecture(model, wanted, InputError, "The plan was made for", remedy)
        if settings.pattern == CHANNEL:
            raise InputError(
                "pattern='channel' removes channels, and so did the plan: compress the model to its final widths in "
                "one step, or leave plan out."
            )
    if rewinds and (settings.schedule != "one-shot" or settings.regrow is not None):
        raise InputError("rewind needs masks that are chosen once: use schedule='one-shot', and leave regrow out.")
    return replace(settings, compensation=False) if rewinds else settings


def _combed(model: nn.Module, call: Call, settings: SparseConfig, stages: Stages) -> Comb:
    with stages("comb"):
        return comb(model, call, outputs=settings.outputs)


def _gently(training: DistillConfig) -> DistillConfig:
    """The training at a tenth of its usual rate, where none is given (Han et al. 2015, section 3.3)."""
    return replace(training, lr=GENTLY * training.peak_lr) if training.lr is None else training


@dataclass
class _Run(Run):
    """State of one run, handed from stage to stage.

    Attributes:
        rewind: what the weights that stay go back to.
        plan: what the model keeps of another one; None: all.
    """

    pruner: Sparsifier
    rewind: Mapping[str, Tensor] | str | None = None
    plan: Plan | None = None

    def prune_at_once(self, evaluate: Evaluate | None, before: float | None) -> float | None:
        """The first change of the masks, before any training; the metric after it."""
        name, note = metric_name(evaluate), self.pruner.note
        if self.pruner.data is None:
            note("No data was given, so accuracy is not recovered. Pass data=loader to refit and train the weights.")
        self.pruner.prune()
        masks = self.pruner.masks
        assert masks is not None
        if self.rewind is not None:
            masks.apply(_rewound(self.student, self.rewind, self.pruner.config.seed))
        raw = None
        if self.pruner.recovery is not None and before is not None:
            raw = self.evaluated(evaluate, "with masks on the dense weights", masks.apply(copy_of(self.model)).eval())
            assert raw is not None
            note(f"Before: {told(name, before)}; with these masks on the dense weights {written(name, raw)}.")
        return self.untrained(evaluate, "Before any training", before, raw)

    # ------------------------------------------------------------------------------ what came of it

    def finish(self, record: dict[str, Any], source: str | None, metric: str) -> SparseResult:
        """Shrink what is wholly zero, export, measure, and report."""
        sparsifier = self.pruner
        assert sparsifier.masks is not None
        narrowed, rows = sparsifier.plan, self._rows()
        if narrowed is not None:
            shrink(self.student, narrowed)
        comparison, onnx = None, None
        with self.stages("deploy"):
            try:
                onnx, comparison = processes.from_first(self._deployed)
            except Exception as error:  # what ONNX Runtime raises shares no base class
                found = error if isinstance(error, CPDError) else f"{type(error).__name__}: {first_line(error)}."
                sparsifier.note(f"The result has no ONNX model and no latency: {found}")
            stored = self._stored()
        if narrowed is None:
            sparsifier.note(NOT_FASTER)
        self.note_source(source)
        config, (original, result) = sparsifier.config, self._figures(comparison)
        report = Report(
            call=record,
            model_class=f"{type(self.model).__module__}.{type(self.model).__qualname__}",
            source=source_of(self.model, source),
            criterion=criterion_name(config.criterion),  # type: ignore[arg-type]
            criterion_reason=f"pattern {config.pattern}, scope {config.scope}",
            normalization="none",
            original=original,
            result=result,
            latency=None if comparison is None else comparison.to_dict(),
            layers=() if narrowed is None else layer_rows(self.model, self.student),
            shrinks=tuple({"epoch": c.step / max(self.per_epoch, 1), **asdict(c)} for c in sparsifier.changes),
            history=tuple(self.history),
            seconds=self.stages.seconds,
            environment=environment_of(),
            notes=tuple(sparsifier.notes),
            metric_name=metric,
            job="sparsify",
            sparsity=rows if narrowed is None else (),
            stored=stored if narrowed is None else {},
        )
        plan = narrowed or self.plan or replace(Plan({}, {}, {}), architecture=architecture_of(self.model))
        return SparseResult(self.student, report, sparsifier.masks, plan, onnx)

    def _rows(self) -> tuple[SparseRow, ...]:
        """The zeros of each layer, before and after."""
        before, after = zeros_of(weights_of(self.model)), zeros_of(weights_of(self.student))
        return tuple(
            SparseRow(now.name, now.elements, then.zeros, now.zeros) for then, now in zip(before, after, strict=True)
        )

    def _stored(self) -> dict[str, int]:
        """What the weights take in a file, in bytes."""
        tensors = unique_tensors(self.student)
        plain = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        return {"plain": plain, "packed": len(pack(tensors)), "packed with INT8": len(pack(tensors, int8=True))}

    def _deployed(self) -> tuple[bytes, LatencyComparison]:
        """The ONNX model, and its latency beside the original's."""
        onnx = export_onnx(self.student, self.call)
        probe = LatencyProbe(self.model, self.call, threads=self.pruner.config.threads)
        return onnx, probe.compare(onnx, seconds=FINAL_SECONDS, precision=0.02)

    def _figures(self, latency: LatencyComparison | None) -> list[Figures]:
        """What both models cost."""
        times = (latency.original_ms, latency.candidate_ms) if latency else (None, None)
        return [
            Figures(sum(weight.numel() for weight in model.parameters()), _macs(model, self.call), 0, time_ms, metric)
            for model, time_ms, metric in zip((self.model, self.student), times, self.metrics, strict=True)
        ]


def _macs(model: nn.Module, call: Call) -> int:
    """Multiply-accumulates of a pass over the example inputs, by torch's own counter; zeros count like all others."""
    with torch.no_grad(), evaluating(model), plain_attention(), FlopCounterMode(display=False) as counter:
        call.on(model)
    return int(counter.get_total_flops()) // 2


def _rewound(model: nn.Module, rewind: Mapping[str, Tensor] | str, seed: int) -> nn.Module:
    """The model with earlier weights, or with new ones.

    Raises:
        InputError: if they are of another model.
    """
    if isinstance(rewind, str):
        with random_states_kept(), seeded(None, seed):
            for module in model.modules():
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
        return model
    try:
        model.load_state_dict(dict(rewind))
    except RuntimeError as error:
        raise InputError(f"rewind is not a state dict of this model: {first_line(error)}.") from error
    return model
