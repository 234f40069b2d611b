"""The command line: `cpd compress MODEL`, `cpd comb MODEL`, `cpd latency A B`, `cpd report DIR`, and others.

command.py     what all commands share: --config, --json, the log, errors and exit codes
arguments.py   options that several commands have, and how a model is named
options.py     the options of PruneConfig and DistillConfig as options of commands
wording.py     messages of the library in the words of the command line
folders.py     folders of images as data
work.py        what commands that prune and train are given alike
compressing.py compress, sweep, family, quantize, demo
sparsifying.py sparsify
analysing.py   comb, sensitivity, profile, latency, report, env
tables.py      what is printed

Tables and `--json` go to stdout, everything else (log, bars, errors) to stderr. torch and timm are imported inside
the commands, so that `cpd --help` answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from cpd import __version__
from cpd.cli import analysing, compressing, sparsifying
from cpd.cli.command import register

app = typer.Typer(
    name="cpd",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Comb, Prune, Distill: make trained PyTorch vision models physically narrower and measurably faster.",
    epilog="Exit codes: 0 done; 1 failed; 2 the command line or an input is wrong; 3 the target is out of reach; "
    "130 interrupted.",
)


def main() -> None:
    """Run the command line."""
    app()


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"cpd {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of `cpd` itself; the commands hold all others."""


register(app, compressing.compress, "timm:resnet18 --target-speedup 2 --data images/ --output-dir out",
         "torchvision:mobilenet_v2 --target-macs 0.5 --data images/ --schedule cubic --kd kl --epochs 30",
         "--config recipe.yaml --output-dir out --resume")  # fmt: skip
register(app, compressing.sweep, "timm:resnet18 --speedups 1.5,2,3 --data images/ --output-dir out --plot sweep.svg")
register(app, compressing.family, "timm:resnet18 --speedups 1.5,2,3 --data images/ --output-dir out",
         "timm:resnet18 --speedups 1.25,1.5,2,3,4 --together --data images/ --epochs 30 --output-dir out")  # fmt: skip
register(app, sparsifying.sparsify, "timm:resnet18 --sparsity 0.8 --data images/ --output-dir out",
         "timm:resnet18 --pattern 2:4 --data images/ --epochs 0",
         "timm:resnet18 --sparsity 0.9 --schedule cubic --data images/ --storage packed --output-dir out")  # fmt: skip
register(app, compressing.quantize, "out --data images/")
register(app, analysing.report, "out")
register(app, analysing.comb, "timm:vit_tiny_patch16_224", "timm:swin_tiny_patch4_window7_224 --plot groups.html")
register(app, analysing.sensitivity, "timm:resnet18 --data images/ --plot sensitivity.svg")
register(app, analysing.profile, "timm:resnet18", "timm:resnet18 --threads 2 --check 4")
register(app, analysing.latency, "timm:resnet18 out out/model.int8.onnx",
         "timm:resnet18 --runtime onnxruntime,torch --threads 2")  # fmt: skip
register(app, analysing.env, "", "--json")
register(app, compressing.demo, "", "--output-dir out")
