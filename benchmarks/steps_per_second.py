"""Steps per second of one training that prunes as it goes: `python benchmarks/steps_per_second.py`.

Warm-up for a third of the epochs, a linear schedule for a third, fine-tuning for the last: the first epoch is the dense
model's, the last that of the narrowest. Random images, one thread; with `--kd kl` the unpruned teacher's forward pass,
which does not shrink, is part of each step.

    python benchmarks/steps_per_second.py timm:resnet18 --fewer 2.55 --kd none kl --json runs/steps_per_second.json
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from pathlib import Path
from typing import Any

import results
import torch
from rich.console import Console
from rich.table import Table

import cpd
from cpd.distillation.distiller import distill
from cpd.model import sources


def measured(name: str, kd: str, options: argparse.Namespace) -> dict[str, Any]:
    """One training."""
    torch.manual_seed(options.seed)
    size = options.size
    model = sources.resolve(name).build(num_classes=10).to(memory_format=torch.channels_last)
    teacher = copy.deepcopy(model)
    data = [
        (torch.randn(options.batch, 3, size, size), torch.randint(0, 10, (options.batch,)))
        for _ in range(options.batches)
    ]
    epochs = options.epochs
    pruner = cpd.Pruner(
        model, data[0][0][:1], target_macs=1 / options.fewer, steps=epochs * len(data), data=data,
        schedule=cpd.Schedule("linear", start=1 / 3, end=2 / 3, interval=options.interval), criterion="magnitude",
        compensation=False,
    )  # fmt: skip
    records = distill(model, teacher, data, config=cpd.DistillConfig(epochs=epochs, lr=0.01, kd=kd), pruner=pruner)
    speeds = [record.steps_per_second for record in records]
    third = epochs // 3
    first, last = statistics.median(speeds[:third]), statistics.median(speeds[-third:])
    macs = pruner.comb.cost({}).macs / pruner.shrinks[-1].macs
    return {"model": name, "kd": kd, "macs": macs, "steps_per_second": speeds, "first": first, "last": last}


def main() -> int:
    """Run what is asked for, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["timm:resnet18"])
    parser.add_argument("--fewer", type=float, default=2.55, help="times fewer MACs at the end")
    parser.add_argument("--kd", nargs="+", default=["none", "kl"])
    parser.add_argument("--size", type=int, default=96, help="pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, default=12, help="an epoch")
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--interval", type=int, default=6, help="steps between shrinks")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [measured(name, kd, options) for name in options.models for kd in options.kd]
    table = Table("model", "kd", "MACs", "steps/s, dense", "steps/s, after the last shrink", "times")
    for row in rows:
        figures = (f"{row['macs']:.2f}x fewer", f"{row['first']:.2f}", f"{row['last']:.2f}")
        table.add_row(row["model"], row["kd"], *figures, f"{row['last'] / row['first']:.2f}")
    Console().print(table)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        results.write(options.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
