"""The large detectors of torchvision, shrunk: `python benchmarks/detection.py [--json F] [MODEL …]`.

Random weights, small images, no network. What is combed is what `cpd.compress` combs of a detector: the model up to
what its heads say at every place.

| column | what it is |
|---|---|
| open | the share of parameters in open groups |
| error | masked = shrunk, 30 % of every open group removed at random, relative to the largest output, in float64 |
| left | the share of parameters after that |
| boxes | the shrunk detector, as it is, finds boxes in eval mode and gives its losses in train mode |
| s | of comb and shrink |
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import results
import torch
import torchvision
from models import random_plan, randomize
from oracles import check_masked, double
from rich.console import Console
from rich.table import Table
from shapes import NAMES, batch_of_boxes
from torch import nn

import cpd
from cpd.tasks.task import itself, task_of

MODELS = (
    "fasterrcnn_resnet50_fpn_v2", "retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn", "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn",
)  # fmt: skip
SIDE = 96


def built(name: str) -> nn.Module:
    """A detector for the classes of the shapes, and images of `SIDE` where it does not fix their size."""
    sizes = {} if name.startswith("ssd") else {"min_size": SIDE, "max_size": SIDE}
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=len(NAMES) + 1, **sizes)
    return randomize(model.eval())


def examine(name: str, share: float) -> dict[str, Any]:
    """One detector: comb, plan, masked = shrunk, and what the shrunk one does by itself."""
    model, row = double(built(name)), dict[str, Any]()
    images, targets = batch_of_boxes(2, SIDE)
    start = time.perf_counter()
    with task_of(model).viewed(model):
        comb = cpd.comb(model, images[0][None].double())
        plan = random_plan(comb, share, at_least=1)
        narrow = itself(cpd.shrink(copy.deepcopy(model), plan))
        row["seconds"] = time.perf_counter() - start
        row["open"], row["frozen"] = comb.open_share["parameters"], [str(item) for item in comb.frozen_share[:5]]
        row["error"] = check_masked(model, comb, plan)
    row["parameters"], left = (sum(p.numel() for p in each.parameters()) for each in (model, narrow))
    row["left"] = left / row["parameters"]
    narrow.float()
    with torch.no_grad():
        found = narrow.eval()(images)
        if "mask" in name:
            for target in targets:
                target["masks"] = torch.zeros(len(target["boxes"]), SIDE, SIDE, dtype=torch.uint8)
        if "keypoint" in name:
            for target in targets:
                target["keypoints"] = torch.ones(len(target["boxes"]), 17, 3)
        losses = narrow.train()(images, targets)
    assert all("boxes" in each for each in found)
    assert all(torch.is_tensor(value) for value in losses.values())
    row["boxes"] = "ok"
    return row


def main() -> int:
    """Run the detectors asked for and print the table; exit code 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"default: {' '.join(MODELS)}")
    parser.add_argument("--share", type=float, default=0.3, help="of every open group that goes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--trace", action="store_true", help="let an error end the run")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    one = partial(examine, share=options.share)
    rows = results.examined(options.models or MODELS, one, options.json, trace=options.trace)
    table = Table("detector", "parameters", "open", "error", "left", "boxes", "s", title="detectors of torchvision")
    for row in rows:
        if "failed" in row:
            table.add_row(row["model"], "", "", row["failed"])
            continue
        table.add_row(
            row["model"], f"{row['parameters'] / 1e6:.1f} M", f"{row['open']:.1%}", row["error"], f"{row['left']:.1%}",
            row["boxes"], f"{row['seconds']:.0f}",
        )  # fmt: skip
    Console(width=140).print(table)
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
