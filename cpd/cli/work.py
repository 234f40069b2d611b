"""What commands that prune and train are given alike: the model, its images, its teacher, and where all is written."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from cpd.cli.arguments import (
    WORKERS,
    Augment,
    AutoAugment,
    BatchSize,
    Data,
    InputSize,
    Mean,
    Model,
    OutputDir,
    Overwrite,
    Pretrained,
    RandomErasing,
    Std,
    Teacher,
    TrustTeacher,
    Workers,
    build,
    build_teacher,
)
from cpd.cli.command import Output
from cpd.cli.folders import Images
from cpd.cli.options import takes, values
from cpd.cli.tables import figures_table, tried_table
from cpd.distillation.config import DistillConfig

if TYPE_CHECKING:
    from cpd.report.report import Report

TRAIN = "Training"
#: Options of the training that are shared with pruning, or are none of a command.
SHARED = ("seed", "progress")
KD_BY_DATA = "kl, or cwd for label maps"

LOST = "Nothing will be written: without --output-dir, the result is measured and shown, but not saved."

log = logging.getLogger("cpd.cli")

Resume = Annotated[
    bool, typer.Option("--resume", help="Resume from the checkpoint in --output-dir.", rich_help_panel=TRAIN)
]
CheckpointMinutes = Annotated[
    float, typer.Option(help="Longest time between two checkpoints, in minutes.", rich_help_panel=TRAIN)
]


@dataclass(frozen=True, kw_only=True)
class Work:
    """The model, its data and settings of a command that prunes and trains, and where the result is written.

    Attributes are those options of the command line; the types say what they are there.
    """

    model: Model
    data: Data = None
    output_dir: OutputDir = None
    overwrite: Overwrite = False
    batch_size: BatchSize = 64
    workers: Workers = WORKERS
    pretrained: Pretrained = True
    input_size: InputSize = None
    teacher: Teacher = None
    trust_source: TrustTeacher = False
    augment: Augment = "light"
    auto_augment: AutoAugment = None
    random_erasing: RandomErasing = 0.0
    mean: Mean = None
    std: Std = None
    progress: bool | None = None

    def images(self, seed: int) -> Images:
        """How images are loaded."""
        return Images(
            self.data, self.batch_size, self.workers, seed, self.augment, self.auto_augment, self.random_erasing,
            self.mean, self.std, self.model,
        )  # fmt: skip

    def say_what_is_lost(self, sentence: str = LOST) -> None:
        """Say so where nothing will be written."""
        if self.output_dir is None:
            log.info(sentence)

    def prepared(self, images: Images) -> tuple[str | None, dict[str, Any]]:
        """The source of the model, and what a whole run is given of objects."""
        source, built, example_inputs = build(self.model, self.input_size, self.pretrained)
        given = {"model": built, "example_inputs": example_inputs}
        if images.folder is not None:
            loaded = images.load(built, example_inputs)
            given |= {"data": loaded.training, "calibration": loaded.plain}
            if loaded.evaluate is not None:
                given["evaluate"] = loaded.evaluate
        if self.teacher is not None:
            given["teacher"] = build_teacher(self.teacher, self.pretrained, self.trust_source)
        return source.recorded, given


def works(command: Callable[..., Output]) -> Callable[..., Output]:
    """Make a command that takes a `Work` and options one that takes what a `Work` is made of, and those of training."""
    hints = get_type_hints(Work, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    signature = inspect.signature(command, eval_str=True)
    _, *own = signature.parameters.values()
    given = [
        inspect.Parameter(
            item.name,
            kind,
            default=inspect.Parameter.empty if item.default is MISSING else item.default,
            annotation=hints[item.name],
        )
        for item in fields(Work)
    ]

    @functools.wraps(command)
    def called(**options: Any) -> Output:
        work = Work(**{item.name: options.pop(item.name) for item in fields(Work)})
        return command(work, **options)

    first, *others = given
    required = [item for item in own if item.default is item.empty and item.kind is not item.VAR_KEYWORD]
    rest = [item for item in own if item not in required]
    parameters = [first, *required, *others, *rest]
    called.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[item if item.kind is item.VAR_KEYWORD else item.replace(kind=kind) for item in parameters]
    )
    return takes(DistillConfig, TRAIN, SHARED, kd=KD_BY_DATA)(called)


def training_of(options: dict[str, Any], images: Images) -> DistillConfig:
    """The training, as it is asked for; the loss is the usual one of the images, where none is named."""
    found = values(DistillConfig, options)
    if images.folder is not None and not images.by_name:
        found.setdefault("kd", "cwd" if images.have_maps else "kl")
    return DistillConfig(**found)


def report_output(report: Report, output_dir: Path | None) -> Output:
    """A report as a table, and where the rest of it lies."""
    notes = [f"Note: {note}" for note in report.notes]
    if output_dir is not None:
        notes.append(f"Written to {output_dir}; the whole report: {output_dir / 'report.html'}")
    else:
        notes.append("Nothing was written: --output-dir FOLDER keeps the model, its ONNX file and a report.")
    tables = [figures_table(report), *([tried_table(report)] if report.tried else [])]
    return Output(report.to_dict(), (*tables, *notes))
