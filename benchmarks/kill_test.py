"""Kill a run again and again, at random moments, and see that it ends as one that nobody disturbed.

A small convnet on scikit-learn's digits is pruned in eight steps while it is distilled, with a checkpoint at every step
of the optimizer, so that many of the kills fall into a shrink or into the writing of a file. After every kill the
folder is read: whatever checkpoint there is must be whole.

    python benchmarks/kill_test.py --kills 20 --json runs/kill_test.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from rich.console import Console
from rich.table import Table

import cpd
from cpd.demo import DigitsNet, digits
from cpd.files.checkpoint import NAME


def run(folder: Path, resume: bool) -> dict[str, Any]:
    """One run to its end; what came of it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = DigitsNet().eval()
    loader, images, _ = digits()
    result = cpd.compress(
        model, target_macs=0.4, data=loader, example_inputs=images[:1], epochs=4, lr=0.02, criterion="taylor",
        schedule=cpd.Schedule("cubic", end=0.9, interval=8), score_batches=2, checkpoint_minutes=1e-6,
        output_dir=folder, resume=resume, progress=False,
    )  # fmt: skip
    weights = sum(float(value.double().abs().sum()) for value in result.model.state_dict().values())
    return {"digest": result.plan.digest, "weights": weights, "macs": result.report.result.macs}


def child(folder: Path, resume: bool) -> subprocess.Popen[str]:
    """The run in a process of its own."""
    command = [sys.executable, __file__, "--child", str(folder), *(["--resume"] if resume else [])]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a run printed at its end."""
    out, error = process.communicate()
    if process.returncode:
        raise SystemExit(f"A run failed:\n{error[-2000:]}")
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def killed(folder: Path, kills: int, longest: float, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A run that is killed so many times, at moments of its training; its result, and each kill."""
    moments, rows = random.Random(seed), list[dict[str, Any]]()
    checkpoint = folder / NAME
    while len(rows) < kills:
        process = child(folder, resume=checkpoint.exists())
        before, start = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0, time.monotonic()
        while process.poll() is None and (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before):
            time.sleep(0.005)  # until it trains
        time.sleep(moments.uniform(0, longest))
        if process.poll() is not None:
            return finished(process), rows
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        with safetensors.safe_open(checkpoint, "pt") as file:  # raises unless it is whole
            state = json.loads(file.metadata()["cpd"])["state"]
            size = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
        left = [path.name for path in folder.iterdir() if path.name != NAME]
        rows.append(
            {
                "after_s": time.monotonic() - start,
                "epoch": state["epoch"],
                "step": state["done"],
                "shrinks": len(state["pruner"]["shrinks"]),
                "numbers": size,
                "half_written": len(left),
            }
        )
    return finished(child(folder, resume=True)), rows


def main() -> int:
    """Run undisturbed, run killed, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--longest", type=float, default=1.5, help="seconds that a run trains before it is killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(run(options.child, options.resume)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        expected = finished(child(Path(folder) / "undisturbed", resume=False))
        (Path(folder) / "killed").mkdir()
        found, rows = killed(Path(folder) / "killed", options.kills, options.longest, options.seed)
    table = Table("kill", "after", "checkpoint: epoch, step", "shrinks", "half-written files beside it")
    for index, row in enumerate(rows):
        table.add_row(
            str(index + 1), f"{row['after_s']:.1f} s", f"{row['epoch']}, {row['step']}", str(row["shrinks"]),
            str(row["half_written"]),
        )  # fmt: skip
    console = Console()
    console.print(table)
    same = {name: found[name] == expected[name] for name in expected}
    console.print(
        f"{len(rows)} kills; every checkpoint was whole; the same plan: {same['digest']}, the same weights: "
        f"{same['weights']}."
    )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"kills": rows, "same": same}, indent=1))
    return 0 if all(same.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
