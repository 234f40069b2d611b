"""Commands that make a model: compress, sweep, quantize, demo."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cpd.cli.arguments import (
    WORKERS,
    BatchSize,
    Data,
    InputSize,
    Model,
    NeededData,
    OutputDir,
    Plot,
    Pretrained,
    RoundTo,
    Seconds,
    Seed,
    Threads,
    Workers,
    build,
    parse_numbers,
)  # fmt: skip
from cpd.cli.command import Output
from cpd.cli.folders import image_folders, load_folder, load_images, load_maps
from cpd.cli.tables import figures_table, latency_table, sweep_table
from cpd.segmentation import has_maps

if TYPE_CHECKING:
    from cpd.report.report import Report

DEFAULT_SPEEDUP = 2.0
PRUNE, TRAIN = "Pruning", "Training"

log = logging.getLogger("cpd.cli")


def compress(
    model: Model,
    target_speedup: Annotated[
        float | None,
        typer.Option(help="ONNX Runtime latency, original over result (2, unless another target is given)."),
    ] = None,
    target_latency_ms: Annotated[float | None, typer.Option(help="ONNX Runtime latency of the result, in ms.")] = None,
    target_macs: Annotated[float | None, typer.Option(help="MACs kept: a share up to 1, or a number of them.")] = None,
    target_params: Annotated[
        float | None, typer.Option(help="Parameters kept: a share up to 1, or a number of them.")
    ] = None,
    data: Data = None,
    output_dir: OutputDir = None,
    epochs: Annotated[
        int | None, typer.Option(min=0, help="Training epochs; 0 prunes without a gradient step.")
    ] = None,
    batch_size: BatchSize = 64,
    workers: Workers = WORKERS,
    threads: Threads = 1,
    seed: Seed = 0,
    pretrained: Pretrained = True,
    input_size: InputSize = None,
    round_to: RoundTo = 8,
    criterion: Annotated[
        str | None, typer.Option(help="Scores: a name in cpd.criteria.CRITERIA (obs with data).", rich_help_panel=PRUNE)
    ] = None,
    schedule: Annotated[
        str, typer.Option(help="one-shot, or while training: linear, cubic.", rich_help_panel=PRUNE)
    ] = "one-shot",
    prune_from: Annotated[
        float, typer.Option(help="Share of the training before which nothing goes.", rich_help_panel=PRUNE)
    ] = 0.0,
    prune_until: Annotated[
        float, typer.Option(help="Share of the training by which all is gone.", rich_help_panel=PRUNE)
    ] = 0.5,
    interval: Annotated[
        int | None, typer.Option(help="Steps from one shrink to the next.", rich_help_panel=PRUNE)
    ] = None,
    optimizer: Annotated[
        str, typer.Option(help="A name of timm.optim.list_optimizers().", rich_help_panel=TRAIN)
    ] = "sgd",
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.", rich_help_panel=TRAIN)] = None,
    weight_decay: Annotated[float, typer.Option(help="Weight decay.", rich_help_panel=TRAIN)] = 1e-4,
    scheduler: Annotated[
        str, typer.Option(help="Of the rate: cosine, poly, tanh, step.", rich_help_panel=TRAIN)
    ] = "cosine",
    kd: Annotated[
        str | None,
        typer.Option(help="Distillation: kl, cwd, cirkd, mse, none (kl; cwd for label maps).", rich_help_panel=TRAIN),
    ] = None,
    task_weight: Annotated[float, typer.Option(help="Weight of the task's loss.", rich_help_panel=TRAIN)] = 1.0,
    features: Annotated[
        list[str] | None, typer.Option(help="Modules whose outputs are compared.", rich_help_panel=TRAIN)
    ] = None,
    kd_weight: Annotated[
        float | None, typer.Option(help="Its weight beside the task's loss.", rich_help_panel=TRAIN)
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Its temperature.", rich_help_panel=TRAIN)] = None,
    ema: Annotated[
        float | None, typer.Option(help="Decay of an average of the weights.", rich_help_panel=TRAIN)
    ] = None,
    mixup: Annotated[float, typer.Option(help="Alpha of mixup.", rich_help_panel=TRAIN)] = 0.0,
    cutmix: Annotated[float, typer.Option(help="Alpha of CutMix.", rich_help_panel=TRAIN)] = 0.0,
    auto_augment: Annotated[
        str | None, typer.Option(help="timm's policy, as rand-m9-mstd0.5.", rich_help_panel=TRAIN)
    ] = None,
    random_erasing: Annotated[
        float, typer.Option(min=0, max=1, help="Chance of an erased patch.", rich_help_panel=TRAIN)
    ] = 0.0,
    mixed_precision: Annotated[str, typer.Option(help="no, bf16 or fp16.", rich_help_panel=TRAIN)] = "no",
    accumulate: Annotated[int, typer.Option(min=1, help="Batches a step.", rich_help_panel=TRAIN)] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint in --output-dir.", rich_help_panel=TRAIN)
    ] = False,
    checkpoint_minutes: Annotated[
        float, typer.Option(help="Between two checkpoints at most.", rich_help_panel=TRAIN)
    ] = 10.0,
    progress: bool | None = None,
) -> Output:
    """Make a model faster, train it back, measure it, and write what came of it."""
    folders = None if data is None else image_folders(data)
    maps = folders is not None and has_maps(folders[0])
    source, built, example_inputs = build(model, input_size, pretrained)
    options: dict[str, Any] = {
        "target_speedup": target_speedup,
        "target_latency_ms": target_latency_ms,
        "target_macs": target_macs,
        "target_params": target_params,
        "epochs": epochs,
        "output_dir": output_dir,
        "criterion": criterion,
        "lr": lr,
        "progress": progress,
    }
    if all(target is None for target in (target_speedup, target_latency_ms, target_macs, target_params)):
        options["target_speedup"] = DEFAULT_SPEEDUP
    if folders is not None:
        loading = {"batch_size": batch_size, "workers": workers, "seed": seed}
        if maps:
            options["data"], options["evaluate"] = load_maps(built, folders, example_inputs, **loading)
        else:
            augmentation = {"auto_augment": auto_augment, "re_prob": random_erasing}
            options["data"], options["evaluate"] = load_images(
                built, folders, example_inputs, **loading, augmentation=augmentation
            )
    given = {key: value for key, value in options.items() if value is not None}

    import cpd

    result = cpd.compress(
        built,
        example_inputs=example_inputs,
        seed=seed,
        threads=threads,
        round_to=round_to,
        source=str(source),
        schedule=cpd.Schedule(schedule, warmup=prune_from, end=prune_until, interval=interval),
        training=cpd.DistillConfig(
            optimizer=optimizer, lr=lr, weight_decay=weight_decay, scheduler=scheduler,
            kd=kd or ("cwd" if maps else "kl"), kd_weight=kd_weight,
            task_weight=task_weight, features=features or (),
            temperature=temperature, ema=ema, mixup=mixup, cutmix=cutmix, mixed_precision=mixed_precision,
            accumulate=accumulate,
        ),
        resume=resume,
        checkpoint_minutes=checkpoint_minutes,
        **given,
    )  # fmt: skip
    return report_output(result.report, output_dir)


def sweep(
    model: Model,
    speedups: Annotated[str, typer.Option(help="ONNX Runtime latency, original over result; commas between.")],
    data: Data = None,
    output_dir: OutputDir = None,
    plot: Plot = None,
    epochs: Annotated[int | None, typer.Option(min=0, help="Training epochs of each.")] = None,
    batch_size: BatchSize = 64,
    workers: Workers = WORKERS,
    threads: Threads = 1,
    seed: Seed = 0,
    pretrained: Pretrained = True,
    input_size: InputSize = None,
    round_to: RoundTo = 8,
    progress: bool | None = None,
) -> Output:
    """Compress a model to several speed-ups: one table, and one picture of accuracy against measured latency."""
    from cpd.jobs.sensitivity import check_plot

    if plot is not None:
        check_plot(plot)
    asked = parse_numbers(speedups)
    source, built, example_inputs = build(model, input_size, pretrained)
    options: dict[str, Any] = {} if epochs is None else {"epochs": epochs}
    if data is not None:
        options["data"], options["evaluate"] = load_folder(
            built, image_folders(data), example_inputs, batch_size=batch_size, workers=workers, seed=seed
        )

    import cpd

    found = cpd.sweep(
        built, asked, output_dir=output_dir, example_inputs=example_inputs, threads=threads, seed=seed,
        round_to=round_to, source=str(source), progress=progress, **options,
    )  # fmt: skip
    if plot is not None:
        log.info("picture written to %s", found.plot(plot))
    return Output({"model": model, **found.to_dict()}, (sweep_table(found),))


def quantize(
    folder: Annotated[Path, typer.Argument(help="A folder that cpd compress wrote.")],
    data: NeededData,
    output: Annotated[Path | None, typer.Option(help="Where the INT8 model goes (FOLDER/model.int8.onnx).")] = None,
    calibration: Annotated[str, typer.Option(help="minmax, entropy or percentile.")] = "minmax",
    limit: Annotated[int, typer.Option(min=1, help="Batches of images used.")] = 4,
    batch_size: BatchSize = 32,
    workers: Workers = WORKERS,
    threads: Threads = 1,
    seconds: Seconds = 20.0,
    seed: Seed = 0,
) -> Output:
    """Bring a compressed model to INT8, compare it with the float one, and time pruning, quantization and both."""
    folders = image_folders(data)

    import cpd
    from cpd.model import sources
    from cpd.report.artifacts import read_document

    pruned = cpd.load(folder)
    source = sources.resolve(str(read_document(folder)["source"]))
    original = source.build().eval()
    example_inputs = sources.default_inputs(original, source)
    loader, evaluate = load_folder(pruned, folders, example_inputs, batch_size=batch_size, workers=workers, seed=seed)
    found = cpd.quantize_onnx(
        folder / "model.onnx", loader, output or folder / "model.int8.onnx", original=original, evaluate=evaluate,
        calibration=calibration, limit=limit, threads=threads, seconds=seconds,
    )  # fmt: skip
    return Output(found.to_dict(), (latency_table(found.latency), found.summary()))


def demo(output_dir: OutputDir = None, seed: Seed = 0, progress: bool | None = None) -> Output:
    """Train a small CNN on scikit-learn's digits and make it twice as fast: offline, in a few minutes."""
    from cpd.demo import run_demo

    result = run_demo(output_dir=output_dir, seed=seed, progress=progress)
    return report_output(result.report, output_dir)


def report_output(report: Report, output_dir: Path | None) -> Output:
    """A report as a table, and where the rest of it lies."""
    notes = [f"Note: {note}" for note in report.notes]
    if output_dir is not None:
        notes.append(f"Written to {output_dir}; the whole report: {output_dir / 'report.html'}")
    return Output(report.to_dict(), (figures_table(report), *notes))
