"""YOLO models through the whole path, on shapes drawn on the spot: `python benchmarks/yolo.py [--json F] [MODEL …]`.

Random weights, no network. Each is compressed to a measured speed-up with its own loss and data file, and handed back
to ultralytics. Rows of models that are not run again stay in the file.

| column | what it is |
|---|---|
| open | the share of parameters in open groups, of a model that has never run |
| error | masked = shrunk, 30 % of every open group removed at random, relative to the largest output, in float64 |
| asked, speed-up | of ONNX Runtime's latency, one thread |
| trainer, exporter, validator | ultralytics' own, one epoch on eight images, to ONNX, mAP50-95 |
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import results
import torch
from models import random_plan, randomize
from oracles import check_masked, double
from rich.console import Console
from rich.table import Table
from shapes import write_yolo
from torch.utils._pytree import tree_leaves

import cpd
from cpd.model import sources
from cpd.tasks.yolo import Yolo, as_yolo

os.environ.setdefault("YOLO_OFFLINE", "true")
MODELS = ("yolov8n", "yolov10n", "yolo11n", "yolo12n", "yolo11n-seg", "yolov8n-pose")
KINDS = {"-seg": "segment", "-pose": "pose"}


def examine(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One model through everything."""
    start = time.perf_counter()
    kind = next((kind for ending, kind in KINDS.items() if name.endswith(ending)), "detect")
    source = f"ultralytics:{name}.yaml,nc=3" + (",kpt_shape=[4,3]" if kind == "pose" else "")
    task = Yolo(batch_size=4, imgsz=options.side, augment=False)
    torch.manual_seed(0)
    fresh = sources.resolve(source).build()
    images = torch.rand(1, 3, options.side, options.side)
    comb = cpd.comb(fresh, images, outputs=task.outputs(fresh))
    row: dict[str, Any] = {
        "parameters": sum(p.numel() for p in fresh.parameters()),
        "open": comb.open_share["parameters"],
    }
    wide = randomize(double(sources.resolve(source).build()))
    checked = cpd.comb(wide, images.double(), outputs=task.outputs(wide))
    row["error"] = check_masked(wide, checked, random_plan(checked, 0.3, at_least=1))
    with tempfile.TemporaryDirectory() as folder:
        data = write_yolo(Path(folder), kind, side=options.side)
        result = cpd.compress(
            fresh, target_speedup=options.speedup, data=data, task=task, epochs=1, progress=False, threads=1
        )
        row |= {"asked": options.speedup, "speed-up": result.speedup, "source": result.report.source}
        loaded = cpd.load(result.save(Path(folder) / "out"))
        pairs = zip(tree_leaves(loaded(images)), tree_leaves(result.model(images)), strict=True)
        same = all(torch.equal(one, other) for one, other in pairs if isinstance(one, torch.Tensor))
        assert same, "cpd.load gives other outputs"
        yolo, size = as_yolo(result.model), sum(p.numel() for p in result.model.parameters())
        own: dict[str, Any] = {
            "data": str(data), "imgsz": options.side, "workers": 0, "plots": False, "project": folder, "device": "cpu",
            "verbose": False, "batch": 4,
        }  # fmt: skip
        yolo.train(epochs=1, name="train", **own)
        assert sum(p.numel() for p in yolo.model.parameters()) == size, "the trainer built another model"
        row["trainer"] = "ok"
        row["exporter"] = (
            "ok" if Path(yolo.export(format="onnx", imgsz=options.side, simplify=False)).is_file() else "no"
        )
        row["validator"] = float(yolo.val(name="val", **own).box.map)
    return {**row, "left": size, "seconds": time.perf_counter() - start}


def main() -> int:
    """Run the models asked for and print the table; exit code 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"default: {' '.join(MODELS)}")
    parser.add_argument("--speedup", type=float, default=1.5)
    parser.add_argument("--side", type=int, default=160, help="pixels of the images")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--trace", action="store_true", help="let an error end the run")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    one = partial(examine, options=options)
    rows = results.examined(options.models or MODELS, one, options.json, trace=options.trace)
    names = ("open", "error", "asked", "speed-up", "trainer", "exporter", "validator", "s")
    table = Table("model", "params", "left", *names, title="models of ultralytics")
    for row in rows:
        if "failed" in row:
            table.add_row(row["model"], "", "", row["failed"])
            continue
        table.add_row(
            row["model"], f"{row['parameters'] / 1e6:.2f} M", f"{row['left'] / 1e6:.2f} M", f"{row['open']:.1%}",
            row["error"], f"{row['asked']:g}", f"{row['speed-up']:.2f}", row["trainer"], row["exporter"],
            f"{row['validator']:.3f}", f"{row['seconds']:.0f}",
        )  # fmt: skip
    Console(width=160).print(table)
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
