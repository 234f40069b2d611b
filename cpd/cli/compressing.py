"""Commands that make a model: compress, sweep, family, quantize, demo."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cpd.cli.arguments import (
    WORKERS,
    BatchSize,
    InputSize,
    Mean,
    NeededData,
    OutputDir,
    Overwrite,
    Plot,
    Saved,
    Seconds,
    Seed,
    Std,
    Threads,
    TrustSource,
    Workers,
    example_inputs_of,
    parse_numbers,
    result_folder,
)  # fmt: skip
from cpd.cli.command import Output
from cpd.cli.folders import Images
from cpd.cli.options import takes, values
from cpd.cli.tables import latency_table, sweep_table
from cpd.cli.work import CheckpointMinutes, Resume, Work, report_output, training_of, works
from cpd.config import PruneConfig
from cpd.errors import InputError
from cpd.options import choice
from cpd.selection.target import TARGETS

if TYPE_CHECKING:
    from torch import nn

    from cpd.jobs.sweep import Sweep


DEFAULT_SPEEDUP = 2.0
PRUNE = "Pruning"

log = logging.getLogger("cpd.cli")


@takes(PruneConfig, PRUNE)
@works
def compress(
    work: Work,
    resume: Resume = False,
    checkpoint_minutes: CheckpointMinutes = 10.0,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Instead of a target: the fastest model whose validation metric falls by at most this many points.",
            rich_help_panel=PRUNE,
        ),
    ] = None,
    confidence: Annotated[
        float, typer.Option(help="One-sided confidence that --max-drop holds.", rich_help_panel=PRUNE)
    ] = 0.95,
    **options: Any,
) -> Output:
    """Make a model faster: prune, train, measure and save it. Without a target, it is made twice as fast."""
    if max_drop is None and not any(options[name] for name in TARGETS):
        options["target_speedup"] = DEFAULT_SPEEDUP
    images = work.images(options["seed"])
    config, training = PruneConfig(**values(PruneConfig, options)), training_of(options, images)
    source, given = work.prepared(images)
    work.say_what_is_lost()

    import cpd

    result = cpd.compress(
        **given, config=config, training=training, source=source, output_dir=work.output_dir,
        overwrite=work.overwrite, resume=resume, checkpoint_minutes=checkpoint_minutes, progress=work.progress,
        max_drop=max_drop, confidence=confidence,
    )  # fmt: skip
    return report_output(result.report, work.output_dir)


@takes(PruneConfig, PRUNE, TARGETS)
@works
def sweep(
    work: Work,
    speedups: Annotated[
        str, typer.Option(help="Speed-ups to reach (latency of the original divided by the result's), such as 1.5,2,3.")
    ],
    plot: Plot = None,
    **options: Any,
) -> Output:
    """Compress a model to several speed-ups; print a table and draw accuracy against measured latency."""
    return _points(work, _at_speedups("sweep", work, speedups, plot, options), plot)


@takes(PruneConfig, PRUNE, TARGETS)
@works
def family(
    work: Work,
    speedups: Annotated[
        str, typer.Option(help="Speed-ups to reach (latency of the original divided by a member's), such as 1.5,2,3.")
    ],
    together: Annotated[
        bool, typer.Option("--together", help="Train all members at once, as slices of one set of weights.")
    ] = False,
    plot: Plot = None,
    **options: Any,
) -> Output:
    """Make models at several speed-ups in one run, each a slice of the next larger, with one file of weights."""
    return _points(work, _at_speedups("family", work, speedups, plot, options, together=together).figures, plot)


def _at_speedups(job: str, work: Work, speedups: str, plot: Path | None, options: dict[str, Any], **more: Any) -> Any:
    """What `cpd.sweep` or `cpd.family` gives; what it is given is checked before anything is loaded."""
    images = work.images(options["seed"])
    config, training = PruneConfig(**values(PruneConfig, options)), training_of(options, images)
    asked = _speedups(speedups)
    if plot is not None:
        from cpd.jobs.sensitivity import check_plot

        check_plot(plot)
    source, given = work.prepared(images)
    work.say_what_is_lost(f"No model will be written: without --output-dir, a {job} only prints its table.")

    import cpd

    return getattr(cpd, job)(
        **given, **more, speedups=asked, config=config, training=training, source=source, output_dir=work.output_dir,
        overwrite=work.overwrite, progress=work.progress,
    )  # fmt: skip


def _points(work: Work, found: Sweep, plot: Path | None) -> Output:
    """The table of models at several speeds, and their picture, if it is asked for."""
    if plot is not None:
        log.info("The picture was written to %s.", found.plot(plot))
    return Output({"model": work.model, **found.to_dict()}, (sweep_table(found),))


def _speedups(text: str) -> list[float]:
    """The speed-ups of several models.

    Raises:
        InputError: if one is below 1, or no number.
    """
    asked = parse_numbers(text, "--speedups")
    if min(asked) < 1:
        raise InputError(f"--speedups must each be at least 1 (2 means half the latency); got {text}.")
    return asked


def quantize(
    folder: Saved,
    data: NeededData,
    output: Annotated[
        Path | None, typer.Option(help="File for the INT8 model. Default: FOLDER/model.int8.onnx.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="The original model, named as for cpd compress. Needed if FOLDER names none."),
    ] = None,
    trust_source: TrustSource = False,
    calibration: Annotated[
        str, typer.Option(help="How ranges of activations are chosen: minmax, entropy or percentile.")
    ] = "minmax",
    dynamic: Annotated[
        bool,
        typer.Option("--dynamic", help="Quantize matrix products only, with ranges of activations taken at run time."),
    ] = False,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            help="ONNX node that stays in float; any number of times. auto: the nodes to which 8 bits add most noise."
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Number of batches of images to use.")] = 4,
    batch_size: BatchSize = 32,
    workers: Workers = WORKERS,
    threads: Threads = 1,
    seconds: Seconds = 20.0,
    mean: Mean = None,
    std: Std = None,
    seed: Seed = 0,
    input_size: InputSize = None,
) -> Output:
    """Quantize a compressed model to INT8, compare it with the float model, and time pruning, quantization and both."""
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
        exclude="auto" if exclude == ["auto"] else exclude or (),
    )  # fmt: skip
    return Output(found.to_dict(), (latency_table(found.latency), found.summary()))


def demo(
    output_dir: OutputDir = None, overwrite: Overwrite = False, seed: Seed = 0, progress: bool | None = None
) -> Output:
    """Train a small CNN on scikit-learn's digits and make it twice as fast. Takes a few minutes, offline."""
    from cpd.demo import run_demo

    result = run_demo(output_dir=output_dir, overwrite=overwrite, seed=seed, progress=progress)
    return report_output(result.report, output_dir)
