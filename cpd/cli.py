"""The command line: `cpd compress MODEL`, `cpd comb MODEL`, `cpd latency A B`, `cpd demo`, and others (`cpd --help`).

Tables and `--json` go to stdout, everything else (log, bars, errors) to stderr. torch and timm are imported inside
the commands, so that `cpd --help` answers at once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

from cpd.errors import CPDError, InputError
from cpd.folders import has_maps, image_folders, load_folder, load_images, load_maps

if TYPE_CHECKING:
    from torch import nn

    from cpd.cost import FrozenShare
    from cpd.latency import LatencyTable
    from cpd.latency_model import ModelProfile
    from cpd.report import Report
    from cpd.sensitivity import Sensitivity
    from cpd.sources import ModelSource
    from cpd.sweep import Sweep

DEFAULT_SPEEDUP = 2.0
PRUNE, TRAIN = "Pruning", "Training"
MEMBERS_SHOWN = 3
PLACES_SHOWN = 2

app = typer.Typer(
    name="cpd",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Comb, Prune, Distill: physically narrower PyTorch vision models, as fast as you asked for.",
)

Model = Annotated[
    str,
    typer.Argument(
        help="timm:NAME, torchvision:NAME or package.module:factory; arguments of the builder after commas, "
        "as in timm:resnet18,num_classes=10."
    ),
]
InputSize = Annotated[
    str | None, typer.Option("--input-size", metavar="H[,W]", help="Image size in pixels, where none is known.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show warnings only.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show every step.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
OutputDir = Annotated[Path | None, typer.Option("--output-dir", help="Where the artifacts are written.")]
WORKERS = min(4, os.cpu_count() or 1)
Workers = Annotated[
    int, typer.Option("--workers", min=0, help="Processes that load images.", show_default="one a core, at most 4")
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of every random choice.")]


def main() -> None:
    """Run the command line."""
    app()


def _show_version(value: bool) -> None:
    if value:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"cpd {version('cpd')}")
        except PackageNotFoundError:
            typer.echo("cpd (not installed)")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of `cpd` itself; the commands hold all others."""


@app.command()
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
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images in one folder a class, or images/ and labels/ (label maps), or of train/ and val/ "
            "that hold such folders."
        ),
    ] = None,
    output_dir: OutputDir = None,
    epochs: Annotated[
        int | None, typer.Option(min=0, help="Training epochs; 0 prunes without a gradient step.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a training step.")] = 64,
    workers: Workers = WORKERS,
    threads: Annotated[int, typer.Option(min=1, help="ONNX Runtime threads that latency is measured on.")] = 1,
    seed: Seed = 0,
    pretrained: Annotated[bool, typer.Option(help="Start from the library's own weights (downloads them).")] = True,
    input_size: InputSize = None,
    round_to: Annotated[int, typer.Option(min=1, help="Widths are kept to multiples of this.")] = 8,
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
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Make a model faster, train it back, measure it, and write what came of it."""
    with _running(quiet, verbose, debug):
        folders = None if data is None else image_folders(data)
        maps = folders is not None and has_maps(folders[0])
        source, built, example_inputs = _build(model, input_size, pretrained)
        options: dict[str, Any] = {
            "target_speedup": target_speedup,
            "target_latency_ms": target_latency_ms,
            "target_macs": target_macs,
            "target_params": target_params,
            "epochs": epochs,
            "output_dir": output_dir,
            "criterion": criterion,
            "lr": lr,
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
        if is_first_process():
            _print_report(result.report, output_dir, json_output)


@app.command()
def comb(
    model: Model,
    input_size: InputSize = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Also draw the grouped graph, to an .svg or .html file.")
    ] = None,
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """List a model's coupling groups (size, members, exact, frozen and why) and what the frozen ones hold."""
    with _running(quiet, verbose, debug):
        if plot is not None:
            from cpd.picture import check_path

            check_path(plot)
        _, built, example_inputs = _build(model, input_size, pretrained=False)

        import cpd

        combed = cpd.comb(built, example_inputs)
        share: dict[str, float] = combed.open_share
        if plot is not None:
            from cpd.picture import draw

            logging.getLogger("cpd.cli").info("picture written to %s", draw(combed, plot))
        if json_output:
            rows = [_group_dict(group) for group in combed.groups]
            frozen = [asdict(row) for row in combed.frozen_share]
            _print_json({"model": model, "groups": rows, "open_share": dict(share), "frozen_share": frozen})
            return
        console = Console()
        console.print(groups_table(combed.groups))
        open_count = sum(group.frozen is None for group in combed.groups)
        console.print(
            f"{open_count} of {len(combed.groups)} groups are open: they hold {share['parameters']:.1%} of the "
            f"parameters and {share['macs']:.1%} of the MACs.",
            highlight=False,
        )
        if combed.frozen_share:
            console.print(frozen_table(combed.frozen_share))


@app.command()
def sensitivity(
    model: Model,
    data: Annotated[Path, typer.Option(help="Folder of images, as `cpd compress` takes it.")],
    plot: Annotated[Path | None, typer.Option("--plot", help="Also draw a map: .svg, .png.")] = None,
    criterion: Annotated[str, typer.Option(help="Which positions go: a name in cpd.criteria.CRITERIA.")] = "magnitude",
    batch_size: Annotated[int, typer.Option(min=1, help="Images a batch.")] = 64,
    limit: Annotated[int, typer.Option(min=1, help="Batches of training images used.")] = 4,
    workers: Workers = WORKERS,
    accuracy: Annotated[bool, typer.Option(help="Also the accuracy on val/ at every point.")] = False,
    seed: Seed = 0,
    pretrained: Annotated[bool, typer.Option(help="The library's own weights (downloads them).")] = True,
    input_size: InputSize = None,
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Prune each group alone, 10 to 90 % of it, and show what that does to the loss."""
    with _running(quiet, verbose, debug):
        from cpd.sensitivity import check_plot

        if plot is not None:
            check_plot(plot)
        folders = image_folders(data)
        _, built, example_inputs = _build(model, input_size, pretrained)

        import cpd

        loader, evaluate = load_images(
            built, folders, example_inputs, batch_size=batch_size, workers=workers, seed=seed
        )
        if accuracy and evaluate is None:
            raise InputError(f"--accuracy needs validation images: {data}/val.")
        combed = cpd.comb(built, example_inputs)
        scores = cpd.score(built, combed, loader, criterion=criterion, limit=limit, seed=seed)
        found = cpd.sensitivity(
            built, combed, loader, scores=scores, limit=limit, evaluate=evaluate if accuracy else None,
            progress=False if quiet else None,
        )  # fmt: skip
        if plot is not None:
            logging.getLogger("cpd.cli").info("picture written to %s", found.plot(plot))
        if json_output:
            _print_json({"model": model, **found.to_dict()})
            return
        Console().print(sensitivity_table(found))


@app.command()
def profile(
    model: Model,
    threads: Annotated[int, typer.Option(min=1, help="ONNX Runtime threads.")] = 1,
    check: Annotated[int, typer.Option(min=0, help="Narrower copies to export, time and compare with.")] = 0,
    seed: Seed = 0,
    input_size: InputSize = None,
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Learn how long this machine takes for the model's kernels at any width, and show where its time goes."""
    with _running(quiet, verbose, debug):
        _, built, example_inputs = _build(model, input_size, pretrained=False)

        from cpd.latency_model import profile_model

        found = profile_model(built, example_inputs, threads=threads, check=check, seed=seed)
        if json_output:
            _print_json({"model": model, **found.to_dict()})
            return
        Console().print(profile_table(found))
        for text in found.told():
            Console().print(Text(text), soft_wrap=True)


@app.command()
def latency(
    models: Annotated[
        list[str], typer.Argument(help="ONNX files, folders that cpd compress wrote, or models as elsewhere.")
    ],
    backends: Annotated[
        str, typer.Option(help="Any of onnxruntime, cuda, torch, torch.compile, openvino; commas between.")
    ] = "onnxruntime",
    threads: Annotated[int, typer.Option(min=1, help="Threads.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a run, for models that are exported now.")] = 1,
    seconds: Annotated[float, typer.Option(help="The timing ends after so long.")] = 20.0,
    input_size: InputSize = None,
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Time several models in turn, in one run: medians, and ratios with their 95 % confidence intervals."""
    with _running(quiet, verbose, debug):
        found, inputs = {}, None
        for name in models:
            found[name], inputs = _opened(name, input_size, inputs)

        import cpd

        names = [name.strip() for name in backends.split(",")]
        timed = cpd.measure_latency(
            found, inputs, backends=names, threads=threads, seconds=seconds,
            batch_size=None if any(isinstance(item, str) for item in found.values()) else batch_size,
        )  # fmt: skip
        if json_output:
            _print_json(timed.to_dict())
            return
        Console().print(latency_table(timed))


@app.command()
def sweep(
    model: Model,
    speedups: Annotated[str, typer.Option(help="ONNX Runtime latency, original over result; commas between.")],
    data: Annotated[Path | None, typer.Option(help="Folder of images, as cpd compress takes it.")] = None,
    output_dir: OutputDir = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Also draw accuracy against latency: .svg, .png.")] = None,
    epochs: Annotated[int | None, typer.Option(min=0, help="Training epochs of each.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a training step.")] = 64,
    workers: Workers = WORKERS,
    threads: Annotated[int, typer.Option(min=1, help="ONNX Runtime threads that latency is measured on.")] = 1,
    seed: Seed = 0,
    pretrained: Annotated[bool, typer.Option(help="Start from the library's own weights (downloads them).")] = True,
    input_size: InputSize = None,
    round_to: Annotated[int, typer.Option(min=1, help="Widths are kept to multiples of this.")] = 8,
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Compress a model to several speed-ups: one table, and one picture of accuracy against measured latency."""
    with _running(quiet, verbose, debug):
        from cpd.sensitivity import check_plot

        if plot is not None:
            check_plot(plot)
        asked = parse_numbers(speedups)
        source, built, example_inputs = _build(model, input_size, pretrained)
        options: dict[str, Any] = {} if epochs is None else {"epochs": epochs}
        if data is not None:
            options["data"], options["evaluate"] = load_folder(
                built, image_folders(data), example_inputs, batch_size=batch_size, workers=workers, seed=seed
            )

        import cpd

        found = cpd.sweep(
            built, asked, output_dir=output_dir, example_inputs=example_inputs, threads=threads, seed=seed,
            round_to=round_to, source=str(source), **options,
        )  # fmt: skip
        if plot is not None:
            logging.getLogger("cpd.cli").info("picture written to %s", found.plot(plot))
        if json_output:
            _print_json({"model": model, **found.to_dict()})
            return
        Console().print(sweep_table(found))


@app.command()
def quantize(
    folder: Annotated[Path, typer.Argument(help="A folder that cpd compress wrote.")],
    data: Annotated[Path, typer.Option(help="Folder of images, as cpd compress takes it, to calibrate on.")],
    output: Annotated[Path | None, typer.Option(help="Where the INT8 model goes (FOLDER/model.int8.onnx).")] = None,
    calibration: Annotated[str, typer.Option(help="minmax, entropy or percentile.")] = "minmax",
    limit: Annotated[int, typer.Option(min=1, help="Batches of images used.")] = 4,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a batch.")] = 32,
    workers: Workers = WORKERS,
    threads: Annotated[int, typer.Option(min=1, help="ONNX Runtime threads that latency is measured on.")] = 1,
    seconds: Annotated[float, typer.Option(help="The timing ends after so long.")] = 20.0,
    seed: Seed = 0,
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Bring a compressed model to INT8, compare it with the float one, and time pruning, quantization and both."""
    with _running(quiet, verbose, debug):
        folders = image_folders(data)

        import cpd
        from cpd import sources
        from cpd.artifacts import read_document

        pruned = cpd.load(folder)
        source = sources.resolve(str(read_document(folder)["source"]))
        original = source.build().eval()
        example_inputs = sources.default_inputs(original, source)
        loader, evaluate = load_folder(
            pruned, folders, example_inputs, batch_size=batch_size, workers=workers, seed=seed
        )
        found = cpd.quantize_onnx(
            folder / "model.onnx", loader, output or folder / "model.int8.onnx", original=original, evaluate=evaluate,
            calibration=calibration, limit=limit, threads=threads, seconds=seconds,
        )  # fmt: skip
        if json_output:
            _print_json(found.to_dict())
            return
        console = Console()
        console.print(latency_table(found.latency))
        console.print(Text(found.told()), soft_wrap=True)


@app.command()
def demo(
    output_dir: OutputDir = None,
    seed: Seed = 0,
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Train a small CNN on scikit-learn's digits and make it twice as fast: offline, in a few minutes."""
    with _running(quiet, verbose, debug):
        from cpd.demo import run_demo

        result = run_demo(output_dir=output_dir, seed=seed, progress=False if quiet else None)
        _print_report(result.report, output_dir, json_output)


# ---------------------------------------------------------------------------------- one run: log and errors


def is_first_process() -> bool:
    """Whether this process is the one, of those that `accelerate launch` has started, that prints."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def _running(quiet: bool, verbose: bool, debug: bool) -> Iterator[None]:
    """Show the log of `cpd` on stderr; turn a `CPDError` into one line and exit status 1 (unless `debug`)."""
    logger = logging.getLogger("cpd")
    console = Console(stderr=True)
    handler = RichHandler(console=console, show_path=False, log_time_format="%H:%M:%S")
    level, propagate = logger.level, logger.propagate
    quiet = quiet or not is_first_process()
    logger.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    except CPDError as error:
        if debug:
            raise
        console.print(Text(f"error: {error}", style="red"), soft_wrap=True)
        raise typer.Exit(1) from None
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _build(name: str, input_size: str | None, pretrained: bool) -> tuple[ModelSource, nn.Module, Any]:
    """The source, the model in eval mode, and one example input: [1, C, H, W] of most models."""
    size = None if input_size is None else parse_size(input_size)
    from cpd import sources

    source = sources.resolve(name)
    model = source.build(pretrained=pretrained and source.by_name).eval()
    if size is not None:
        return source, model, sources.image_inputs(model, size)
    inputs = sources.default_inputs(model, source)
    if inputs is None:
        raise InputError(f"The input of {name} is not known: give its image size in pixels, --input-size H[,W].")
    return source, model, inputs


def parse_size(text: str) -> tuple[int, int]:
    """`H` or `H,W` (also `HxW`) as height and width in pixels.

    Raises:
        InputError: if it is neither.
    """
    parts = text.lower().replace("x", ",").split(",")
    if len(parts) in (1, 2) and all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        return int(parts[0]), int(parts[-1])
    raise InputError(f"--input-size takes H or H,W in pixels, as in 224 or 224,320; got {text!r}.")


def parse_numbers(text: str) -> list[float]:
    """`1.5,2,3` as numbers.

    Raises:
        InputError: if it is something else.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"Numbers with commas between are wanted, as in 1.5,2,3; got {text!r}.") from None


def _opened(name: str, input_size: str | None, inputs: Any) -> tuple[Any, Any]:
    """A model to be timed, and example inputs: those of the first that has some serve all."""
    path = Path(name)
    if path.is_dir():
        path = path / "model.onnx"
    if path.suffix == ".onnx":
        if inputs is None:
            from cpd.onnx import random_inputs

            inputs = random_inputs(str(path))
        return str(path), inputs
    _, built, example_inputs = _build(name, input_size, pretrained=False)
    return built, example_inputs if inputs is None else inputs


# ---------------------------------------------------------------------------------- what is printed


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def _print_report(report: Report, output_dir: Path | None, json_output: bool) -> None:
    if json_output:
        _print_json(report.to_dict())
        return
    console = Console()
    console.print(figures_table(report))
    for note in report.notes:
        console.print(Text(f"Note: {note}"), soft_wrap=True)
    if output_dir is not None:
        console.print(Text(f"Written to {output_dir}; the whole report: {output_dir / 'report.html'}"), soft_wrap=True)


def sensitivity_table(found: Sensitivity) -> Table:
    """A row a group, a column a ratio: the loss, or the metric where there is one."""
    name = found.shown
    before = getattr(found, name, None)
    now = "" if before is None else f" (now {before:.4g})"
    table = Table(title=f"{name} when a group alone loses this share{now}")
    table.add_column("group")
    table.add_column("size", justify="right")
    for ratio in sorted({point.ratio for point in found.points}):
        table.add_column(f"{ratio:.0%}", justify="right")
    for group, points in found.by_group.items():
        table.add_row(group, str(points[0].size), *(f"{getattr(point, name):.3g}" for point in points))
    return table


def latency_table(found: LatencyTable) -> Table:
    """One row a model and backend; ratios are against the first."""
    table = Table(title=f"{found.runs} rounds, {found.threads} thread(s), {found.samples} sample(s) a run")
    several = len({row.backend for row in found.rows}) > 1
    table.add_column("model", overflow="fold")
    if several:
        table.add_column("backend")
    for column in ("median ms", "p90 ms", "speed-up", "95 %"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in found.rows:
        figures = (f"{row.median_ms:.3g}", f"{row.p90_ms:.3g}", f"{row.speedup:.2f}")
        interval = f"{row.speedup_low:.2f}-{row.speedup_high:.2f}"
        table.add_row(row.name, *([row.backend] if several else []), *figures, interval)
    return table


def profile_table(found: ModelProfile) -> Table:
    """Where the time goes, by operator."""
    table = Table(title=f"{found.total_ms:.3g} ms in ONNX Runtime, {found.threads} thread(s)")
    table.add_column("operator")
    for column in ("nodes", "ms", "share", "at half of every width"):
        table.add_column(column, justify="right")
    for row in found.operators:
        table.add_row(row.op, str(row.nodes), f"{row.ms:.3g}", f"{row.ms / found.total_ms:.1%}", f"{row.half_ms:.3g}")
    return table


def sweep_table(found: Sweep) -> Table:
    """One row a speed-up."""
    table = Table()
    for column in ("asked", "measured", "ms", "MACs left", "parameters left", "metric"):
        table.add_column(column, justify="right")
    if (whole := found.original) is not None:
        table.add_row("original", "1", f"{whole.latency_ms or 0:.3g}", "100%", "100%", _number(whole.metric))
    for point in found.points:
        if (figures := point.figures) is None or whole is None:
            table.add_row(f"{point.asked:g}", "out of reach", "", "", "", "")
            continue
        table.add_row(
            f"{point.asked:g}", f"{point.speedup:.2f}", f"{figures.latency_ms:.3g}",
            f"{figures.macs / max(whole.macs, 1):.1%}", f"{figures.parameters / max(whole.parameters, 1):.1%}",
            _number(figures.metric),
        )  # fmt: skip
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def figures_table(report: Report) -> Table:
    """Original and result side by side."""
    table = Table(title=None if report.speedup is None else f"{report.speedup:.2f}× faster, measured")
    table.add_column("")
    for column in ("original", "compressed", "change"):
        table.add_column(column, justify="right")
    for row in report.figure_rows:
        table.add_row(*row)
    return table


def groups_table(groups: Sequence[Any]) -> Table:
    """One row a group: size, members, exact, frozen and why."""
    table = Table()
    table.add_column("group", overflow="fold")
    table.add_column("size", justify="right")
    table.add_column("members", overflow="fold")
    table.add_column("exact")
    table.add_column("frozen", overflow="fold")
    for group in groups:
        frozen = Text("no" if group.frozen is None else group.frozen, style="" if group.frozen is None else "yellow")
        demands = [f"tied: {', '.join(group.ties)}"] if group.ties else []
        demands += [f"at least {group.minimum}"] if group.minimum > 1 else []
        ties = Text("".join(f"; {demand}" for demand in demands), style="dim")
        exact = Text("yes" if group.exact else "no")
        table.add_row(Text(group.name), str(group.size), Text(_members(group.members)), exact, frozen + ties)
    return table


def frozen_table(rows: Sequence[FrozenShare]) -> Table:
    """One row a reason: what it keeps from being pruned, and where."""
    table = Table(title="What no open group reaches, and why", title_justify="left")
    table.add_column("reason", overflow="fold")
    table.add_column("parameters", justify="right")
    table.add_column("MACs", justify="right")
    table.add_column("places", overflow="fold")
    for row in rows:
        more = len(row.places) - PLACES_SHOWN
        shown = [*row.places[:PLACES_SHOWN], *([f"and {more} more"] if more > 0 else [])]
        places = f"{len(row.places)}: {', '.join(shown)}" if shown else ""
        table.add_row(Text(row.reason), _share(row.parameters), _share(row.macs), Text(places))
    return table


def _share(share: float) -> str:
    """A share in per cent; one that rounds to nothing is told from none."""
    return "<0.01%" if 0 < share < 0.00005 else f"{share:.2%}"


def _members(members: Sequence[Any]) -> str:
    """How many members, and the first few."""
    more = len(members) - MEMBERS_SHOWN
    shown = [str(member) for member in members[:MEMBERS_SHOWN]] + ([f"and {more} more"] if more > 0 else [])
    return f"{len(members)}: {', '.join(shown)}"


def _group_dict(group: Any) -> dict[str, Any]:
    return {
        "name": group.name,
        "size": group.size,
        "exact": group.exact,
        "frozen": group.frozen,
        "members": [str(member) for member in group.members],
        "ties": [str(tie) for tie in group.ties],
    }
