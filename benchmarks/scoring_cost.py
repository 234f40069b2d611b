"""What scoring costs: seconds and peak memory of each criterion over one plain forward and backward.

    python benchmarks/scoring_cost.py [--models timm:resnet50 timm:vit_small_patch16_224] [--json FILE]

Both run over the same batches; every measurement has a process of its own (memory is its peak, less what it held
before), and times are medians of several passes, the plain one and the criterion in turn.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import results
import torch
import torch.nn.functional as F
from oracles import build
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import cpd
from cpd.criteria import CRITERIA

PLAIN = "forward and backward"
SETTINGS = ("batch_size", "batches", "repeats")


def peak_mib() -> float:
    """Peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one(name: str, criterion: str, batch_size: int, batches: int, repeats: int) -> dict[str, float]:
    """Seconds of the criterion and of plain passes beside it, and the peak memory of the criterion."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, inputs = build(name)
    model.float()
    x = inputs if isinstance(inputs, Tensor) else inputs[0]
    comb = cpd.comb(model, x.float())
    images = torch.randn(batch_size, *x.shape[1:])
    with torch.no_grad():
        classes = model(images[:1]).shape[1]
    data = [(images, torch.randint(classes, (batch_size,))) for _ in range(batches)]

    def plain() -> None:
        for images, labels in data:
            model.zero_grad(set_to_none=True)
            F.cross_entropy(model(images), labels).backward()

    def scored() -> None:
        cpd.score(model, comb, data, criterion=criterion, limit=batches)

    before = peak_mib()
    (plain if criterion == PLAIN else scored)()
    memory = peak_mib() - before
    times: dict[Callable[[], None], list[float]] = {plain: [], scored: []}
    for _ in range(repeats):
        for function in (plain, *(() if criterion == PLAIN else (scored,))):
            start = time.perf_counter()
            function()
            times[function].append(time.perf_counter() - start)
    seconds = {key: statistics.median(found) for key, found in times.items() if found}
    return {"plain_s": seconds[plain], "score_s": seconds.get(scored, seconds[plain]), "memory_mib": memory}


def main() -> int:
    """Measure each criterion in a process of its own; print a table a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["timm:resnet50", "timm:vit_small_patch16_224"])
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA), choices=[PLAIN, *CRITERIA])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "CRITERION"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(*options.one, options.batch_size, options.batches, options.repeats)))
        return 0
    rows: list[dict[str, Any]] = []
    console = Console(width=120)
    for model in options.models:
        criteria = [PLAIN, *(name for name in options.criteria if name != PLAIN)]
        errors = Console(stderr=True)
        for criterion in track(criteria, description=model, console=errors, disable=not errors.is_terminal):
            settings = [f"--{key.replace('_', '-')}={getattr(options, key)}" for key in SETTINGS]
            command = [sys.executable, __file__, *settings, "--one", model, criterion]
            found = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append({"model": model, "criterion": criterion, **json.loads(found.stdout.splitlines()[-1])})
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                results.write(options.json, rows)
        mine = [row for row in rows if row["model"] == model]
        base = mine[0]["memory_mib"]
        table = Table("criterion", "seconds", "x a forward and backward", "peak MiB", "x", title=model)
        for row in mine:
            ratio = row["score_s"] / row["plain_s"]
            table.add_row(
                row["criterion"], f"{row['score_s']:.2f}", f"{ratio:.2f}", f"{row['memory_mib']:.0f}",
                f"{row['memory_mib'] / base:.2f}",
            )  # fmt: skip
        console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
