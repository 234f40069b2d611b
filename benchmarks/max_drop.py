"""`max_drop`: as fast as can be within so many points, and whether that holds on images that the search never saw.

    python benchmarks/max_drop.py DATA_DIR --models resnet56 --seeds 10 --json runs/max_drop.json
    python benchmarks/max_drop.py --read runs/max_drop.json

Each seed draws anew which images channels are scored on, which the search is judged by, and which it never sees. For
ResNet-56 they are CIFAR-10 as JPEG files (not the official pixels: its accuracy is compared with the unpruned network's
on the same files, never with published ones). For `tf_efficientnet_lite0` they are 700 images of ImageNet's training
set, which are few: where they are too few to be sure of any speed, that is what the row says. Speeds are as the search
has measured them, in this process. Rows are added to the file one by one.
"""

from __future__ import annotations

import argparse
import sys
import time
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import imagenet
import numpy as np
import platformdirs
import results
import torch
from PIL import Image
from resnet56_cifar10 import load_model, normalise
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import cpd
from cpd.demo import accuracy

#: Images that channels are scored on, and that the search is judged by; the rest is never seen.
PARTS = {"resnet56": (1000, 2000), "tf_efficientnet_lite0": (200, 250)}
Images = tuple[Tensor, Tensor]


def cifar_files(folder: Path, part: str, count: int, seed: int) -> Images:
    """So many images of a part of CIFAR-10 as JPEG files, drawn by a seed; all where there are no more."""
    with zipfile.ZipFile(folder / "cifar10-jpeg.zip") as archive:
        files = sorted(file for file in archive.namelist() if file.startswith(f"{part}/") and file.endswith(".jpg"))
        classes = sorted({file.split("/")[1] for file in files})
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))[:count].tolist()
        images, labels = [], []
        for file in (files[index] for index in order):
            with archive.open(file) as content:
                images.append(np.asarray(Image.open(content).convert("RGB")))
            labels.append(classes.index(file.split("/")[1]))
    return normalise(np.stack(images)), torch.tensor(labels)


def loaded(name: str, folder: Path, seed: int, cache: Path) -> tuple[nn.Module, Images, Images, Images]:
    """The model; images for scores, for the search, and never seen."""
    scored, judged = PARTS[name]
    if name == "resnet56":
        images, labels = cifar_files(folder, "test", 10_000, seed)
        held, unseen = (images[:judged], labels[:judged]), (images[judged:], labels[judged:])
        return load_model(folder).eval(), cifar_files(folder, "train", scored, seed), held, unseen
    pairs = zip(imagenet.sample(name, folder, "calibration"), imagenet.sample(name, folder, "test"), strict=True)
    images, labels = (torch.cat(both) for both in pairs)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).split(
        [scored, judged, len(images) - scored - judged]
    )
    return imagenet.load(name, folder, cache), *((images[part], labels[part]) for part in order)


def run(name: str, seed: int, options: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """One search, and what its result loses on images that it never saw."""
    start, (model, scored, held, unseen) = time.perf_counter(), loaded(name, options.data_dir, seed, cache)
    batches = list(zip(scored[0].split(50), scored[1].split(50), strict=True))
    row: dict[str, Any] = {
        "model": name, "seed": seed, "max_drop": options.max_drop, "confidence": options.confidence,
        "epochs": options.epochs, "judged": len(held[0]), "unseen": len(unseen[0]),
    }  # fmt: skip
    try:
        found = cpd.compress(
            model, max_drop=options.max_drop, confidence=options.confidence, data=batches, epochs=options.epochs,
            evaluate=partial(accuracy, images=held[0], labels=held[1]), example_inputs=held[0][:1], seed=seed,
            runtime=options.runtime, progress=False,
        )  # fmt: skip
    except cpd.TargetError as error:
        return {**row, "error": str(error), "seconds": round(time.perf_counter() - start, 1)}
    report = found.report
    before, after = (accuracy(one, *unseen) for one in (model, found.model))
    chosen = [item for item in report.tried if item["holds"]][-1]
    return {
        **row, "speedup": found.speedup, "macs_left": report.result.macs / report.original.macs,
        "drop": chosen["drop"], "upper": chosen["upper"], "before": before, "after": after,
        "unseen_drop": before - after, "tried": [dict(item) for item in report.tried],
        "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    """A row a seed, and in how many the limit held."""
    table = Table("model", "seed", "speed-up", "MACs left", "loses (judged by)", "at most", "loses (never seen)", "s")
    for row in rows:
        head = row["model"], str(row["seed"])
        if "error" in row:
            table.add_row(*head, "none is sure", "", "", "", "", f"{row['seconds']:g}")
            continue
        table.add_row(
            *head, f"{row['speedup']:.2f}", f"{row['macs_left']:.1%}", f"{row['drop']:.2f} ({row['judged']:,} images)",
            f"{row['upper']:.2f}", f"{row['unseen_drop']:.2f} ({row['unseen']:,} images)", f"{row['seconds']:g}",
        )  # fmt: skip
    console = Console(width=140)
    console.print(table)
    for name in dict.fromkeys(row["model"] for row in rows):
        chosen = [row for row in rows if row["model"] == name and "error" not in row]
        held = sum(row["unseen_drop"] <= row["max_drop"] for row in chosen)
        none = sum(row["model"] == name and "error" in row for row in rows)
        console.print(f"{name}: held in {held} of {len(chosen)}; in {none} no speed-up was sure enough.")


def main() -> int:
    """Run what is asked for, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path, nargs="?")
    parser.add_argument("--models", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--max-drop", type=float, default=1.0)
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--epochs", type=float, default=0)
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--read", type=Path, help="print the table of a file")
    options = parser.parse_args()
    if options.read:
        show(results.read(options.read))
        return 0
    if options.data_dir is None:
        parser.error("DATA_DIR is needed, unless --read is given")
    cache = Path(platformdirs.user_cache_dir("cpd-benchmarks"))
    rows = results.read(options.json)
    done = {(row["model"], row["seed"], row["max_drop"], row["confidence"], row["epochs"]) for row in rows}
    for seed in range(options.seeds):
        for name in options.models:
            if (name, seed, options.max_drop, options.confidence, options.epochs) in done:
                continue
            rows.append(run(name, seed, options, cache))
            print({key: value for key, value in rows[-1].items() if key != "tried"}, file=sys.stderr, flush=True)
            if options.json:
                results.write(options.json, rows)
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
