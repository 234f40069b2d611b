"""The command that makes a sparse model: sparsify."""

from __future__ import annotations

import logging
from typing import Annotated, Any

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
)  # fmt: skip
from cpd.cli.command import Output
from cpd.cli.compressing import KD_BY_DATA, SHARED, TRAIN, prepared, report_output
from cpd.cli.folders import Images
from cpd.cli.options import takes, values
from cpd.distillation.config import DistillConfig
from cpd.sparsity.config import SparseConfig

SPARSITY = "Sparsity"

log = logging.getLogger("cpd.cli")


@takes(SparseConfig, SPARSITY)
@takes(DistillConfig, TRAIN, SHARED, kd=KD_BY_DATA)
def sparsify(
    model: Model,
    data: Data = None,
    output_dir: OutputDir = None,
    overwrite: Overwrite = False,
    storage: Annotated[
        str, typer.Option(help="How the weights are written: plain, packed (a bitmap and the values), or packed-int8.")
    ] = "plain",
    batch_size: BatchSize = 64,
    workers: Workers = WORKERS,
    pretrained: Pretrained = True,
    input_size: InputSize = None,
    teacher: Teacher = None,
    trust_source: TrustTeacher = False,
    augment: Augment = "light",
    auto_augment: AutoAugment = None,
    random_erasing: RandomErasing = 0.0,
    mean: Mean = None,
    std: Std = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the checkpoint in --output-dir.", rich_help_panel=TRAIN)
    ] = False,
    checkpoint_minutes: Annotated[
        float, typer.Option(help="Minutes between two checkpoints at most.", rich_help_panel=TRAIN)
    ] = 10.0,
    progress: bool | None = None,
    **options: Any,
) -> Output:
    """Make weights of a model zero, refit and train the others, and write what came of it. It becomes no faster."""
    images = Images(
        data, batch_size, workers, options["seed"], augment, auto_augment, random_erasing, mean, std
    )  # fmt: skip
    training = values(DistillConfig, options)
    if images.folder is not None:
        training.setdefault("kd", "cwd" if images.have_maps else "kl")
    config, learning = SparseConfig(**values(SparseConfig, options)), DistillConfig(**training)
    _ = config.share
    source, given = prepared(model, input_size, pretrained, images, teacher, trust_source)
    if output_dir is None:
        log.info("Nothing will be written: without --output-dir the result is measured and shown, then lost.")

    import cpd

    result = cpd.sparsify(
        **given, config=config, training=learning, source=source, output_dir=output_dir, overwrite=overwrite,
        storage=storage, resume=resume, checkpoint_minutes=checkpoint_minutes, progress=progress,
    )  # fmt: skip
    return report_output(result.report, output_dir)
