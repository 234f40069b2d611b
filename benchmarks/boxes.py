"""Detectors of torchvision, trained here, compressed by their own losses: `python benchmarks/boxes.py [--json F]`.

Each is trained from random weights on shapes with exact boxes, drawn on the spot (`shapes.py`), and kept in the cache;
then `cpd.compress` takes MACs away and trains it back. A row "longer" is the unpruned detector trained on for as many
epochs: what training on alone gives. No network.

| column | what it is |
|---|---|
| unpruned, pruned, trained back | mAP50-95 on other shapes, by torchmetrics, in per cent |
| MACs, parameters | the share that is left |
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import platformdirs
import results
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from shapes import NAMES, batch_of_boxes
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import cpd
from cpd.tasks.detection import mean_average_precision

Batch = tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]
CLASSES, BATCH, RATE = len(NAMES) + 1, 8, 1e-3
MODELS = ("fasterrcnn", "retinanet", "fcos", "ssdlite")


def built(name: str, side: int) -> nn.Module:
    """A detector with random weights, small enough to be trained here."""
    torch.manual_seed(0)
    if name == "ssdlite":
        return detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES)
    sizes: dict[str, Any] = {"min_size": side, "max_size": side}
    if name == "fasterrcnn":
        return detection.fasterrcnn_mobilenet_v3_large_fpn(
            weights=None, weights_backbone=None, num_classes=CLASSES, **sizes
        )
    pyramid = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5,
        returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256),
    )  # fmt: skip
    made = {"retinanet": detection.RetinaNet, "fcos": detection.FCOS}[name]
    return made(pyramid, CLASSES, **sizes)


def batches(images: int, side: int, seed: int) -> list[Batch]:
    """Batches as torchvision's detectors take them."""
    return [batch_of_boxes(BATCH, side, seed=1000 * seed + number) for number in range(images // BATCH)]


def trained(model: nn.Module, data: list[Batch], epochs: int) -> nn.Module:
    """The detector after so many epochs of its own losses, by AdamW and one cycle of its rate."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=1e-3)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=epochs * len(data))
    for epoch in range(epochs):
        generator, total = torch.Generator().manual_seed(epoch), 0.0
        for index in torch.randperm(len(data), generator=generator).tolist():
            images, targets = data[index]
            loss = sum(model(list(images), list(targets)).values())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            cycle.step()
            total += float(loss.detach())
        print(f"epoch {epoch + 1}: loss {total / len(data):.3f}", file=sys.stderr, flush=True)
    return model.eval()


def examine(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One detector: trained, compressed, and trained back."""
    learn, test = (batches(count, options.side, seed) for count, seed in ((options.images, 1), (options.test, 2)))
    file = options.cache / f"{name}-{options.side}-{options.images}-{options.epochs}.safetensors"
    model, score = built(name, options.side), partial(mean_average_precision, data=test)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {key: value.contiguous() for key, value in trained(model, learn, options.epochs).state_dict().items()}, file
        )
    model.load_state_dict(load_file(file))
    model.eval()
    start, parameters = time.perf_counter(), sum(p.numel() for p in model.parameters())
    found = cpd.compress(
        model, target_macs=options.macs, data=learn, evaluate=score, epochs=options.recovery, progress=False
    )  # fmt: skip
    report = found.report
    return {
        "asked": options.macs,
        "dense": report.original.metric,
        "pruned": next((row["metric"] for row in report.history if not row["epoch"]), None),
        "after": report.result.metric,
        "macs_left": report.result.macs / report.original.macs,
        "parameters": parameters,
        "parameters_left": sum(p.numel() for p in found.model.parameters()) / parameters,
        "removed": len(found.plan.removed),
        "notes": list(report.notes),
        "seconds": time.perf_counter() - start,
        "longer": score(trained(model, learn, options.recovery)),
    }


def main() -> int:
    """Run the detectors asked for and print the table; exit code 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"default: {' '.join(MODELS)}")
    parser.add_argument("--macs", type=float, default=0.6, help="the share of the MACs to keep")
    parser.add_argument("--side", type=int, default=128, help="pixels of the images")
    parser.add_argument("--images", type=int, default=512, help="to train on")
    parser.add_argument("--test", type=int, default=256, help="images to judge by")
    parser.add_argument("--epochs", type=int, default=16, help="of the training of the unpruned detector")
    parser.add_argument("--recovery", type=int, default=4, help="epochs that the result is trained back")
    parser.add_argument("--cache", type=Path, default=platformdirs.user_cache_path("cpd") / "benchmarks" / "boxes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--trace", action="store_true", help="let an error end the run")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    one = partial(examine, options=options)
    rows = results.examined(options.models or MODELS, one, options.json, trace=options.trace)
    table = Table(
        "detector", "unpruned", "pruned", "trained back", "longer", "MACs", "parameters", "s", title="mAP50-95"
    )
    for row in rows:
        if "failed" in row:
            table.add_row(row["model"], "", "", row["failed"])
            continue
        pruned = "" if row["pruned"] is None else f"{row['pruned']:.1f}"
        table.add_row(
            row["model"], f"{row['dense']:.1f}", pruned, f"{row['after']:.1f}", f"{row['longer']:.1f}",
            f"{row['macs_left']:.1%}", f"{row['parameters_left']:.1%}", f"{row['seconds']:.0f}",
        )  # fmt: skip
    Console(width=140).print(table)
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
