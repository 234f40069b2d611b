"""How a compression scales from one process to two, and what more would take: `python benchmarks/scaling.py`.

The same compression of the same random images by one process and by two (gloo on CPUs, NCCL on two GPUs), each process
with its share of every batch: the seconds of each stage. Of two figures a stage t(n) = serial + parallel / n follows
(Amdahl 1967), what the processes exchange counting as serial; that is what `--predict` processes are told by. It
assumes that what is exchanged takes as long among more processes, and says nothing of a machine on which they share
caches, memory and cores: run it where nothing else does, with a core or a GPU for each process.

    python benchmarks/scaling.py timm:resnet18 --size 96 --batch 64 --predict 8 --json runs/scaling.json
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import results
import torch
from models import randomize
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset

import cpd
from cpd import processes
from cpd.model import sources


def split(one: float, two: float) -> tuple[float, float]:
    """The serial and the parallel seconds of what takes `one` second in one process and `two` in two."""
    parallel = min(max(2 * (one - two), 0.0), one)
    return one - parallel, parallel


def predicted(one: Mapping[str, float], two: Mapping[str, float], count: int) -> dict[str, float]:
    """The seconds of each stage in so many processes."""
    found = {}
    for stage, seconds in one.items():
        serial, parallel = split(seconds, two.get(stage, seconds))
        found[stage] = serial + parallel / count
    return found


def work(options: argparse.Namespace) -> None:
    """What each process does; the first prints the seconds of every stage."""
    processes.start()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    model = randomize(sources.resolve(options.model).build(num_classes=10), options.seed).to(device).eval()
    images = torch.randn(options.batch * options.batches, 3, options.size, options.size)
    data = DataLoader(TensorDataset(images, torch.arange(len(images)) % 10), options.batch // processes.count())
    result = cpd.compress(
        model, target_macs=0.5, data=data, epochs=options.epochs, lr=0.001, criterion=options.criterion, seed=0,
        progress=False,
    )  # fmt: skip
    weights = [float(value.double().sum()) for value in result.model.state_dict().values()]
    if processes.rank() == 0:
        print("FOUND" + json.dumps({"seconds": result.report.seconds, "plan": result.plan.digest, "sums": weights}))


def measured(count: int, options: argparse.Namespace) -> dict[str, Any]:
    """The seconds of every stage in so many processes; the median of several runs."""
    runs = [_run(count) for _ in range(options.runs)]
    names = runs[0]["seconds"]
    seconds = {name: statistics.median(run["seconds"].get(name, 0.0) for run in runs) for name in names}
    return {"processes": count, "seconds": seconds, "plan": runs[0]["plan"], "sums": runs[0]["sums"]}


def _run(count: int) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--work"], stdout=subprocess.PIPE, text=True,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]  # fmt: skip
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit(f"A process failed: {[process.returncode for process in started]}")
    return json.loads(said[0][said[0].index("FOUND") + 5 :].splitlines()[0])  # type: ignore[no-any-return]


def table_of(rows: Sequence[Mapping[str, Any]], count: int) -> Table:
    """Every stage with its seconds, measured and predicted."""
    one, two = rows[0]["seconds"], rows[1]["seconds"]
    more = predicted(one, two, count)
    table = Table("stage", "1 process [s]", "2 processes [s]", "times", "serial [s]", f"{count} predicted [s]")
    for stage in one:
        serial, _ = split(one[stage], two.get(stage, one[stage]))
        times = one[stage] / max(two.get(stage, one[stage]), 1e-9)
        figures = (f"{one[stage]:.2f}", f"{two.get(stage, 0.0):.2f}", f"{times:.2f}", f"{serial:.2f}")
        table.add_row(stage, *figures, f"{more[stage]:.2f}")
    totals = [sum(found.values()) for found in (one, two, more)]
    times = f"{totals[0] / totals[1]:.2f}"
    table.add_row("all", f"{totals[0]:.2f}", f"{totals[1]:.2f}", times, "", f"{totals[2]:.2f}", style="bold")
    return table


def main() -> int:
    """Run both, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="timm:resnet18")
    parser.add_argument("--size", type=int, default=96, help="pixels")
    parser.add_argument("--batch", type=int, default=32, help="of all processes together")
    parser.add_argument("--batches", type=int, default=8, help="an epoch")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--criterion", default="obs")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--runs", type=int, default=1, help="whose median is taken")
    parser.add_argument("--predict", type=int, default=8, help="processes that the table tells the time of")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options)
        return 0
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    rows = [measured(count, options) for count in (1, 2)]
    Console().print(table_of(rows, options.predict))
    print(f"The same plan: {rows[0]['plan'] == rows[1]['plan']}. Load of the machine before: {load:.1f}.")
    if options.json:
        results.write(options.json, [{key: row[key] for key in row if key != "sums"} for row in rows], load=load)
    return 0


if __name__ == "__main__":
    sys.exit(main())
