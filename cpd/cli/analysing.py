"""Commands that look at a model, or at what came of one: comb, sensitivity, profile, latency, report."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from cpd.cli.arguments import (
    WORKERS,
    BatchSize,
    InputSize,
    Mean,
    Model,
    NeededData,
    Plot,
    Pretrained,
    Runtime,
    Seconds,
    Seed,
    Std,
    Threads,
    Workers,
    build,
    folder_path,
    opened,
    result_folder,
)  # fmt: skip
from cpd.cli.command import Output
from cpd.cli.folders import Images
from cpd.cli.tables import (
    branch_dict,
    branches_table,
    frozen_table,
    group_dict,
    groups_table,
    latency_table,
    layer_times_table,
    operator_times_table,
    sensitivity_table,
    sweep_table,
)  # fmt: skip
from cpd.cli.work import report_output
from cpd.config import PruneConfig
from cpd.deploy.runtimes.catalogue import DEFAULT
from cpd.errors import InputError
from cpd.model.progress import part
from cpd.options import checks_of

log = logging.getLogger("cpd.cli")

Drawing = Annotated[
    Path | None, typer.Option("--plot", help="Also draw the graph with its groups, to an .svg or .html file.")
]


def comb(
    model: Model,
    input_size: InputSize = None,
    plot: Drawing = None,
    outputs: Annotated[
        list[str] | None,
        typer.Option("--outputs", help="A part of the output that you use, by name or index; any number of times."),
    ] = None,
    proof_copies: Annotated[
        int, typer.Option(min=1, help="Largest number of narrower copies tried to verify what can be removed.")
    ] = 1000,
    proof_seconds: Annotated[
        float | None,
        typer.Option(help="Seconds after which groups not yet verified are frozen.", show_default="no limit"),
    ] = None,
    branches: Annotated[
        bool, typer.Option(help="Also list what can be removed as a whole, such as residual blocks.")
    ] = True,
) -> Output:
    """List which channels of a model must be removed together, which cannot be removed and why, and its branches.

    No weights are downloaded: widths do not depend on them.
    """
    if plot is not None:
        from cpd.picture import check_path

        check_path(plot)
    _, built, example_inputs = build(model, input_size, pretrained=False)

    import cpd
    from cpd.coupling.cost import unused_sentence
    from cpd.model.outputs import outputs_sentence

    proof: dict[str, Any] = {"proof_copies": proof_copies, "proof_seconds": proof_seconds}
    with part("comb"):
        combed = cpd.comb(built, example_inputs, outputs=outputs or None, **proof)
    with part("branches"):
        found = combed.branches if branches else ()
    share: dict[str, float] = combed.open_share
    if plot is not None:
        from cpd.picture import draw

        log.info("The picture was written to %s.", draw(combed, plot))
    sentence = (
        f"{len(combed.open)} of {len(combed.groups)} groups can be pruned: they hold {share['parameters']:.1%} of the "
        f"parameters and {share['macs']:.1%} of the MACs."
    )
    data = {
        "model": model,
        "groups": [group_dict(group) for group in combed.groups],
        "branches": [branch_dict(branch) for branch in found],
        "open_share": dict(share),
        "frozen_share": [asdict(row) for row in combed.frozen_share],
        "unused": dict(combed.unused),
        "outputs": list(combed.outputs),
        "values_read": list(combed.operations.values_read),
    }
    told = [unused_sentence(combed.unused)] if combed.unused else []
    told += [outputs_sentence(combed.outputs)] if outputs else []
    told += [combed.operations.values_sentence] if combed.operations.values_read else []
    frozen = [frozen_table(combed.frozen_share)] if combed.frozen_share else []
    removable = [branches_table(found)] if found else []
    return Output(data, (groups_table(combed.groups), sentence, *told, *frozen, *removable))


def sensitivity(
    model: Model,
    data: NeededData,
    plot: Plot = None,
    criterion: Annotated[
        str, typer.Option(help="Criterion that decides which channels are removed: a name in cpd.criteria.CRITERIA.")
    ] = "magnitude",
    batch_size: BatchSize = 64,
    limit: Annotated[int, typer.Option(min=1, help="Number of batches of training images to use.")] = 4,
    workers: Workers = WORKERS,
    accuracy: Annotated[bool, typer.Option(help="Also measure the accuracy on val/ at every point.")] = False,
    mean: Mean = None,
    std: Std = None,
    seed: Seed = 0,
    pretrained: Pretrained = True,
    input_size: InputSize = None,
    progress: bool | None = None,
) -> Output:
    """Prune each group alone, by 10 to 90 %, and show how the loss changes."""
    if plot is not None:
        from cpd.jobs.sensitivity import check_plot

        check_plot(plot)
    checks_of(PruneConfig, "criterion")["criterion"].demand("criterion", criterion)
    images = Images(data, batch_size, workers, seed, mean=mean, std=std)
    _, built, example_inputs = build(model, input_size, pretrained)

    import cpd

    loaded = images.load(built, example_inputs)
    if accuracy and loaded.evaluate is None:
        raise InputError(f"--accuracy needs validation images: {data}/val.")
    with part("comb"):
        combed = cpd.comb(built, example_inputs)
    with part("score"):
        scores = cpd.score(built, combed, loaded.plain, criterion=criterion, limit=limit, seed=seed)
    found = cpd.sensitivity(
        built, combed, loaded.plain, scores=scores, limit=limit, evaluate=loaded.evaluate if accuracy else None,
        progress=progress,
    )  # fmt: skip
    if plot is not None:
        log.info("The picture was written to %s.", found.plot(plot))
    return Output({"model": model, **found.to_dict()}, (sensitivity_table(found),))


def profile(
    model: Model,
    runtime: Runtime = DEFAULT,
    threads: Threads = 1,
    plot: Drawing = None,
    check: Annotated[
        int, typer.Option(min=0, help="Number of narrower copies to export and time, to check the predictions.")
    ] = 0,
    seed: Seed = 0,
    input_size: InputSize = None,
) -> Output:
    """Measure the model's kernels on this machine, so that latency can be predicted, and show where the time goes.

    With --plot, the picture shows the milliseconds of each group.
    """
    if plot is not None:
        from cpd.picture import check_path

        check_path(plot)
    _, built, example_inputs = build(model, input_size, pretrained=False)

    from cpd.deploy.model_profile import profile_model

    found = profile_model(built, example_inputs, runtime=runtime, threads=threads, check=check, seed=seed)
    if plot is not None:
        import cpd
        from cpd.picture import draw

        drawn = draw(cpd.comb(built, example_inputs), plot, milliseconds=found.groups)
        log.info("The picture was written to %s.", drawn)
    tables = (layer_times_table(found), operator_times_table(found))
    return Output({"model": model, **found.to_dict()}, (*tables, *found.summary()))


def latency(
    models: Annotated[
        list[str],
        typer.Argument(help="ONNX files, folders that cpd compress wrote, or models, named as for cpd compress."),
    ],
    runtime: Runtime = DEFAULT,
    threads: Threads = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per run, for models that are not ONNX files yet.")] = 1,
    seconds: Seconds = 20.0,
    input_size: InputSize = None,
) -> Output:
    """Time several models alternately: medians, and speed-ups with their 95 % confidence intervals."""
    found, inputs = {}, None
    for name in models:
        found[name], inputs = opened(name, input_size, inputs)

    import cpd

    timed = cpd.measure_latency(
        found, inputs, runtime=runtime, threads=threads, seconds=seconds,
        batch_size=None if any(isinstance(item, str) for item in found.values()) else batch_size,
    )  # fmt: skip
    return Output(timed.to_dict(), (latency_table(timed),))


def report(
    folder: Annotated[
        Path,
        typer.Argument(parser=folder_path, metavar="FOLDER", help="A folder that cpd compress, sweep or family wrote."),
    ],
) -> Output:
    """Write report.html again from the saved figures, and print them."""
    from cpd.files.folder import reading
    from cpd.jobs.sweep import Sweep, read_sweep
    from cpd.report.artifacts import FAMILY_SHEET, PAGE, SWEEP, add_files, read_report
    from cpd.report.families import family_figures

    with reading(result_folder(folder)) as files:
        is_sweep, is_family = files.has(SWEEP), files.has(FAMILY_SHEET)
    if is_sweep or is_family:
        swept = read_sweep(folder) if is_sweep else Sweep(*family_figures(folder))
        add_files(folder, {PAGE: swept.to_html().encode()})
        return Output(swept.to_dict(), (sweep_table(swept), f"Written to {folder / PAGE}"))
    found = read_report(folder)
    add_files(folder, {PAGE: found.to_html().encode()})
    return report_output(found, folder)


def env() -> Output:
    """Print what to include in a bug report: versions of Python and of packages, the processor, GPUs."""
    from cpd.deploy.machine import installation

    found = installation()
    return Output(found, tuple(f"{name}: {value}" for name, value in found.items()))
