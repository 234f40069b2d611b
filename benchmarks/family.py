"""A family beside runs of its members' own: ResNet-56 on the exact CIFAR-10 images, time and accuracy of both.

python benchmarks/family.py DATA_DIR --speedups 1.25 1.5 2 3 4 --epochs 0 --json benchmarks/results/family.json
python benchmarks/family.py DATA_DIR --speedups 1.5 2 3 --epochs 30 --together --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import results
from resnet56_cifar10 import FEW_IMAGES, load_data, load_model
from rich.console import Console
from rich.table import Table

import cpd
from cpd.demo import accuracy


def main() -> int:
    """Run both, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--speedups", nargs="+", type=float, default=[1.25, 1.5, 2.0, 3.0, 4.0])
    parser.add_argument("--epochs", type=float, default=0.0, help="of each member and each run; 0: one-shot")
    parser.add_argument("--together", action="store_true", help="the family is trained as one set of weights")
    parser.add_argument("--no-single", action="store_true", help="the family alone")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model, rows = load_model(options.data_dir), list[dict[str, Any]]()
    training = cpd.DistillConfig(task_weight=0.0) if options.together else FEW_IMAGES
    for seed in options.seeds:
        data = load_data(options.data_dir, seed)
        given = {
            "data": data.loader, "example_inputs": data.test_images[:1],
            "evaluate": partial(accuracy, images=data.test_images, labels=data.test_labels),
            "epochs": options.epochs, "training": training,
            "score_batches": 32, "seed": seed,
        }  # fmt: skip
        start = time.perf_counter()
        found = cpd.family(copy.deepcopy(model), options.speedups, together=options.together, **given)
        seconds = time.perf_counter() - start
        for member in found.members:
            rows.append(row("family", member.asked, member.speedup, member.figures, seconds, seed, options))
        for asked in [] if options.no_single else options.speedups:
            start = time.perf_counter()
            alone = cpd.compress(copy.deepcopy(model), asked, **given)
            rows.append(
                row("alone", asked, alone.speedup, alone.report.result, time.perf_counter() - start, seed, options)
            )
        if options.json:
            results.write(options.json, rows)
    table = Table("by", "asked", "measured", "accuracy", "MACs", "seconds (the family's are of all)", "seed")
    for item in rows:
        cells = (
            item["by"],
            f"{item['asked']:g}",
            f"{item['speedup']:.2f}",
            f"{item['metric']:.2f}",
            f"{item['macs']:,}",
        )
        table.add_row(*cells, f"{item['seconds']:.0f}", str(item["seed"]))
    Console(width=140).print(table)
    return 0


def row(
    by: str, asked: float, speedup: float | None, figures: Any, seconds: float, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """One model, as it is written."""
    return {
        "by": by, "asked": asked, "speedup": speedup or 0.0, "metric": figures.metric, "macs": figures.macs,
        "seconds": seconds, "seed": seed, "epochs": options.epochs, "together": options.together,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
