"""Compress a pretrained CIFAR-10 ResNet-56 and print what it costs before and after.

    python benchmarks/resnet56_cifar10.py DATA_DIR [--target-speedup 2] [--epochs 15] [--json FILE] ...

DATA_DIR holds the weights and a tenth of CIFAR-10: see `FILES`.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import results
import torch
import torch.nn.functional as F
from models import CifarResNet, resnet56
from rich.console import Console
from rich.table import Table
from torch import Tensor

import cpd
from cpd.demo import AugmentedLoader, accuracy
from cpd.errors import CPDError
from cpd.report.report import Report, human

FILES = {
    "resnet56-cifar10.safetensors": (
        "pretrained CIFAR-10 ResNet-56 with option-A shortcuts (Idelbayev's pytorch_resnet_cifar10, 6.61 % error), "
        "state-dict keys conv1, bn1, layer{1,2,3}.{0..8}.{conv1,bn1,conv2,bn2}, linear; saved by safetensors"
    ),
    "cifar10-subset.npz": (
        "exact CIFAR-10 pixels: train_images [5085, 32, 32, 3] uint8 with train_labels, test_images "
        "[1017, 32, 32, 3] uint8 with test_labels (the first images of each official batch)"
    ),
}
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PUBLISHED = 92.72
"""Per cent of the 1,017 test images that the pretrained network gets right: 943 of them."""

BATCH_SIZE = 128
FEW_IMAGES = cpd.DistillConfig(kd="mse", features=("layer3",), kd_weight=10.0, task_weight=0.0)
"""The training on 5,085 images, in batches of 32: the teacher's last feature map, since labels are learned by heart."""

BORDER = 4
"""Pixels of black around a training image, out of which it is cropped at random."""


class Data(NamedTuple):
    """The data set, normalised."""

    loader: AugmentedLoader
    test_images: Tensor
    test_labels: Tensor


class MissingDataError(Exception):
    """The data directory lacks a file, or a file is not what its name says."""


def check_files(folder: Path, files: Mapping[str, str] = FILES) -> None:
    """Raise `MissingDataError`, saying what to fetch, unless every file is there."""
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        found = f"{folder} lacks {len(missing)} of {len(files)} files" if folder.is_dir() else f"No folder {folder}"
        wanted = "\n".join(f"  {name}: {files[name]}" for name in missing)
        raise MissingDataError(f"{found}. Put there, and pass the folder as DATA_DIR:\n{wanted}")


def normalise(images: np.ndarray[Any, np.dtype[np.uint8]], border: int = 0) -> Tensor:
    """`[N, H, W, 3]` bytes to `[N, 3, H + 2 * border, W + 2 * border]`, normalised; the border is black."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return ((F.pad(pixels, [border] * 4) - mean) / deviation).contiguous()


def load_data(folder: Path, seed: int) -> Data:
    """Both parts of the data set; training images are cropped and mirrored at random, in batches of 128."""
    file = folder / "cifar10-subset.npz"
    try:
        with np.load(file, allow_pickle=False) as archive:
            part = {name: archive[name] for name in archive.files}
        labels = {name: torch.from_numpy(part[f"{name}_labels"]).long() for name in ("train", "test")}
        train, test = normalise(part["train_images"], BORDER), normalise(part["test_images"])
    except (KeyError, ValueError, OSError) as error:
        raise MissingDataError(f"{file} cannot be read ({error}). It holds {FILES[file.name]}.") from error
    side = test.shape[-1]
    loader = AugmentedLoader(train, labels["train"], crop=side, batch_size=BATCH_SIZE, flip=True, seed=seed)
    return Data(loader, test, labels["test"])


def load_model(folder: Path) -> CifarResNet:
    """The pretrained network."""
    file = folder / "resnet56-cifar10.safetensors"
    try:
        return resnet56(file)
    except Exception as error:  # safetensors raises its own class for a truncated file, torch others for shapes
        raise MissingDataError(f"{file} cannot be read ({error}). It holds the {FILES[file.name]}.") from error


def table(report: Report, title: str) -> Table:
    """Before and after."""
    before, after = report.original, report.result
    rows = Table("", "before", "after", "change", title=title)
    for column in rows.columns[1:]:
        column.justify = "right"
    if before.metric is not None and after.metric is not None:
        change = f"{after.metric - before.metric:+.2f} points"
        rows.add_row("Accuracy (1,017 test images)", f"{before.metric:.2f} %", f"{after.metric:.2f} %", change)
    for label, was, now in (
        ("Parameters", before.parameters, after.parameters),
        ("MACs", before.macs, after.macs),
    ):
        rows.add_row(label, human(was), human(now), f"{100 * (now / was - 1):+.1f} %")
    if before.latency_ms is not None and after.latency_ms is not None:
        label = f"ONNX Runtime latency ({report.call.get('threads', 1)} thread)"
        rows.add_row(label, f"{before.latency_ms:.3f} ms", f"{after.latency_ms:.3f} ms", speedup_text(report))
    return rows


def speedup_text(report: Report) -> str:
    """The measured speed-up, with its interval where there is one."""
    low, high = ((report.latency or {}).get(f"speedup_{end}") for end in ("low", "high"))
    interval = "" if low is None or high is None else f" ({low:.2f} to {high:.2f})"
    return "" if report.speedup is None else f"{report.speedup:.2f}x{interval}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compress a pretrained CIFAR-10 ResNet-56 with cpd.")
    parser.add_argument("data_dir", type=Path, nargs="?", metavar="DATA_DIR", help=f"folder with {', '.join(FILES)}")
    parser.add_argument("--target-speedup", type=float, default=2.0, help="ONNX Runtime speed-up (default: 2)")
    parser.add_argument("--epochs", type=float, default=15, help="of distillation (default: 15)")
    parser.add_argument("--lr", type=float, default=0.01, help="peak learning rate (default: 0.01)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of ONNX Runtime (default: 1)")
    parser.add_argument("--output-dir", type=Path, help="where the artifacts go")
    parser.add_argument("--json", type=Path, help="where the report goes, as JSON")
    return parser.parse_args(arguments)


def benchmark(options: argparse.Namespace, console: Console) -> Report:
    """Load, check, compress."""
    check_files(options.data_dir)
    data, model = load_data(options.data_dir, options.seed), load_model(options.data_dir)
    data.loader.batch_size = 32
    evaluate = partial(accuracy, images=data.test_images, labels=data.test_labels)
    console.print(f"Pretrained: {evaluate(model):.2f} % correct ({PUBLISHED} % expected).", highlight=False)
    result = cpd.compress(
        model,
        target_speedup=options.target_speedup,
        data=data.loader,
        example_inputs=data.test_images[:1],
        evaluate=evaluate,
        epochs=options.epochs,
        lr=options.lr,
        training=FEW_IMAGES,
        score_batches=32,
        output_dir=options.output_dir,
        seed=options.seed,
        threads=options.threads,
    )
    return result.report


def show(report: Report, options: argparse.Namespace, console: Console) -> None:
    """Print the report's figures; write all of it as JSON if asked to."""
    title = f"ResNet-56 on CIFAR-10, target {options.target_speedup:g}x, {options.epochs:g} epochs, seed {options.seed}"
    console.print(table(report, title))
    for note in report.notes:
        console.print(note, style="dim", highlight=False)
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in report.seconds.items())
    console.print(f"Seconds: {stages} (sum {sum(report.seconds.values()):.0f})", highlight=False)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        results.write(options.json, report.to_dict())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code is 2 for missing data, 1 if the compression failed."""
    options, console = parse(arguments), Console()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("cpd").setLevel(logging.INFO)
    try:
        if options.data_dir is None:
            wanted = "\n".join(f"  {name}: {content}" for name, content in FILES.items())
            raise MissingDataError(f"Pass DATA_DIR, a folder that holds\n{wanted}")
        show(benchmark(options, console), options, console)
    except MissingDataError as error:
        print(error, file=sys.stderr)
        return 2
    except CPDError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
