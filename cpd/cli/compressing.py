"""Commands that make a model: compress, sweep, family, quantize, demo."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    NeededData,
    OutputDir,
    Overwrite,
    Plot,
    Pretrained,
    RandomErasing,
    Saved,
    Seconds,
    Seed,
    Std,
    Teacher,
    Threads,
    TrustSource,
    TrustTeacher,
    Workers,
    build,
    build_teacher,
    example_inputs_of,
    parse_numbers,
    result_folder,
)  # fmt: skip
from cpd.cli.command import Output
from cpd.cli.folders import Images
from cpd.cli.options import takes, values
from cpd.cli.tables import figures_table, latency_table, sweep_table
from cpd.config import PruneConfig
from cpd.distillation.config import DistillConfig
from cpd.errors import InputError
from cpd.options import choice
from cpd.selection.target import TARGETS

if TYPE_CHECKING:
    from torch import nn

    from cpd.report.report import Report

DEFAULT_SPEEDUP = 2.0
PRUNE, TRAIN = "Pruning", "Training"
#: Options of the training that are shared with pruning, or are none of a command.
SHARED = ("seed", "progress")
KD_BY_DATA = "kl; cwd for label maps"

log = logging.getLogger("cpd.cli")


@takes(PruneConfig, PRUNE)
@takes(DistillConfig, TRAIN, SHARED, kd=KD_BY_DATA)
def compress(
    model: Model,
    data: Data = None,
    output_dir: OutputDir = None,
    overwrite: Overwrite = False,
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
    """Make a model faster, train it back, measure it, and write what came of it. Without a target: twice as fast."""
    if not any(options[name] for name in TARGETS):
        options["target_speedup"] = DEFAULT_SPEEDUP
    images = Images(
        data, batch_size, workers, options["seed"], augment, auto_augment, random_erasing, mean, std, model
    )  # fmt: skip
    config, training = _configs(options, images)
    source, given = prepared(model, input_size, pretrained, images, teacher, trust_source)
    if output_dir is None:
        log.info("Nothing will be written: without --output-dir the result is measured and shown, then lost.")

    import cpd

    result = cpd.compress(
        **given, config=config, training=training, source=source, output_dir=output_dir, overwrite=overwrite,
        resume=resume, checkpoint_minutes=checkpoint_minutes, progress=progress,
    )  # fmt: skip
    return report_output(result.report, output_dir)


@takes(PruneConfig, PRUNE, TARGETS)
@takes(DistillConfig, TRAIN, SHARED, kd=KD_BY_DATA)
def sweep(
    model: Model,
    speedups: Annotated[str, typer.Option(help="Latency in the runtime, original over result; commas between.")],
    data: Data = None,
    output_dir: OutputDir = None,
    overwrite: Overwrite = False,
    plot: Plot = None,
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
    progress: bool | None = None,
    **options: Any,
) -> Output:
    """Compress a model to several speed-ups: one table, and one picture of accuracy against measured latency."""
    images = Images(
        data, batch_size, workers, options["seed"], augment, auto_augment, random_erasing, mean, std, model
    )  # fmt: skip
    config, training = _configs(options, images)
    asked = _speedups(speedups)
    if plot is not None:
        from cpd.jobs.sensitivity import check_plot

        check_plot(plot)
    source, given = prepared(model, input_size, pretrained, images, teacher, trust_source)
    if output_dir is None:
        log.info("No model will be written: without --output-dir a sweep gives its table alone.")

    import cpd

    found = cpd.sweep(
        **given, speedups=asked, config=config, training=training, source=source, output_dir=output_dir,
        overwrite=overwrite, progress=progress,
    )  # fmt: skip
    if plot is not None:
        log.info("picture written to %s", found.plot(plot))
    return Output({"model": model, **found.to_dict()}, (sweep_table(found),))


@takes(PruneConfig, PRUNE, TARGETS)
@takes(DistillConfig, TRAIN, SHARED, kd=KD_BY_DATA)
def family(
    model: Model,
    speedups: Annotated[str, typer.Option(help="Latency in the runtime, original over member; commas between.")],
    together: Annotated[
        bool,
        typer.Option(
            "--together", help="Train all members at once, as slices of one set of weights.", rich_help_panel=TRAIN
        ),
    ] = False,
    data: Data = None,
    output_dir: OutputDir = None,
    overwrite: Overwrite = False,
    plot: Plot = None,
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
    progress: bool | None = None,
    **options: Any,
) -> Output:
    """Make a model of each of several speeds in one run, each a slice of the next larger: one file of weights."""
    images = Images(
        data, batch_size, workers, options["seed"], augment, auto_augment, random_erasing, mean, std, model
    )  # fmt: skip
    config, training = _configs(options, images)
    asked = _speedups(speedups)
    if plot is not None:
        from cpd.jobs.sensitivity import check_plot

        check_plot(plot)
    source, given = prepared(model, input_size, pretrained, images, teacher, trust_source)
    if output_dir is None:
        log.info("No model will be written: without --output-dir a family gives its table alone.")

    import cpd

    found = cpd.family(
        **given, speedups=asked, together=together, config=config, training=training, source=source,
        output_dir=output_dir, overwrite=overwrite, progress=progress,
    )  # fmt: skip
    if plot is not None:
        log.info("picture written to %s", found.figures.plot(plot))
    return Output({"model": model, **found.figures.to_dict()}, (sweep_table(found.figures),))


def _speedups(text: str) -> list[float]:
    """The speed-ups of several models.

    Raises:
        InputError: if one is below 1, or no number.
    """
    asked = parse_numbers(text, "--speedups")
    if min(asked) < 1:
        raise InputError(
            f"--speedups must each be at least 1 (original over result: for half the latency, 2); got {text}."
        )
    return asked


def _configs(options: dict[str, Any], images: Images) -> tuple[PruneConfig, DistillConfig]:
    """What was given of the options of pruning and of the training; checked before anything is loaded."""
    pruning, training = values(PruneConfig, options), values(DistillConfig, options)
    if images.folder is not None and not images.by_name:
        training.setdefault("kd", "cwd" if images.have_maps else "kl")
    return PruneConfig(**pruning), DistillConfig(**training)


def prepared(
    model: str, input_size: str | None, pretrained: bool, images: Images, teacher: str | None, trust: bool
) -> tuple[str | None, dict[str, Any]]:
    """The source of a model, and what `cpd.compress` is given of objects."""
    source, built, example_inputs = build(model, input_size, pretrained)
    given = {"model": built, "example_inputs": example_inputs}
    if images.folder is not None:
        loaded = images.load(built, example_inputs)
        given |= {"data": loaded.training, "calibration": loaded.plain}
        if loaded.evaluate is not None:
            given["evaluate"] = loaded.evaluate
    if teacher is not None:
        given["teacher"] = build_teacher(teacher, pretrained, trust)
    return source.recorded, given


def quantize(
    folder: Saved,
    data: NeededData,
    output: Annotated[Path | None, typer.Option(help="Where the INT8 model goes (FOLDER/model.int8.onnx).")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="The original model, as cpd compress takes it, if the folder names none."),
    ] = None,
    trust_source: TrustSource = False,
    calibration: Annotated[str, typer.Option(help="minmax, entropy or percentile.")] = "minmax",
    dynamic: Annotated[
        bool, typer.Option("--dynamic", help="Matrix products alone, ranges of activations taken while it runs.")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, help="Batches of images used.")] = 4,
    batch_size: BatchSize = 32,
    workers: Workers = WORKERS,
    threads: Threads = 1,
    seconds: Seconds = 20.0,
    mean: Mean = None,
    std: Std = None,
    seed: Seed = 0,
    input_size: InputSize = None,
) -> Output:
    """Bring a compressed model to INT8, compare it with the float one, and time pruning, quantization and both."""
    import cpd
    from cpd.deploy.int8 import CALIBRATIONS
    from cpd.model.recorded import rebuilt
    from cpd.model.sources import resolve
    from cpd.report.artifacts import read_document

    choice(*CALIBRATIONS).demand("calibration", calibration)
    images = Images(data, batch_size, workers, seed, mean=mean, std=std)
    document = read_document(result_folder(folder))
    name = model or document["source"] or document["model_class"]

    def fresh() -> nn.Module:
        if model is not None:
            return resolve(model).build()
        return rebuilt(document["source"], document["model_class"], trust=trust_source)

    original, pruned = fresh().eval(), cpd.load(folder, fresh())
    example_inputs = example_inputs_of(original, name, input_size)
    loaded = images.load(pruned, example_inputs)
    found = cpd.quantize_onnx(
        folder / "model.onnx", loaded.plain, output or folder / "model.int8.onnx", original=original,
        evaluate=loaded.evaluate,
        calibration=calibration, dynamic=dynamic, limit=limit, threads=threads, seconds=seconds,
    )  # fmt: skip
    return Output(found.to_dict(), (latency_table(found.latency), found.summary()))


def demo(
    output_dir: OutputDir = None, overwrite: Overwrite = False, seed: Seed = 0, progress: bool | None = None
) -> Output:
    """Train a small CNN on scikit-learn's digits and make it twice as fast: offline, in a few minutes."""
    from cpd.demo import run_demo

    result = run_demo(output_dir=output_dir, overwrite=overwrite, seed=seed, progress=progress)
    return report_output(result.report, output_dir)


def report_output(report: Report, output_dir: Path | None) -> Output:
    """A report as a table, and where the rest of it lies."""
    notes = [f"Note: {note}" for note in report.notes]
    if output_dir is not None:
        notes.append(f"Written to {output_dir}; the whole report: {output_dir / 'report.html'}")
    return Output(report.to_dict(), (figures_table(report), *notes))
