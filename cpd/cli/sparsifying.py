"""The command that makes a sparse model: sparsify."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cpd.cli.command import Output
from cpd.cli.options import takes, values
from cpd.cli.work import CheckpointMinutes, Resume, Work, report_output, training_of, works
from cpd.sparsity.config import SparseConfig

SPARSITY = "Sparsity"


@takes(SparseConfig, SPARSITY)
@works
def sparsify(
    work: Work,
    storage: Annotated[
        str, typer.Option(help="How the weights are written: plain, packed (a bitmap and the values), or packed-int8.")
    ] = "plain",
    resume: Resume = False,
    checkpoint_minutes: CheckpointMinutes = 10.0,
    **options: Any,
) -> Output:
    """Set weights of a model to zero, refit and train the others, and save the result. It does not become faster."""
    images = work.images(options["seed"])
    config, training = SparseConfig(**values(SparseConfig, options)), training_of(options, images)
    _ = config.share
    source, given = work.prepared(images)
    work.say_what_is_lost()

    import cpd

    result = cpd.sparsify(
        **given, config=config, training=training, source=source, output_dir=work.output_dir,
        overwrite=work.overwrite, storage=storage, resume=resume, checkpoint_minutes=checkpoint_minutes,
        progress=work.progress,
    )  # fmt: skip
    return report_output(result.report, work.output_dir)
