"""Asked = measured, in the runtime that ships: `python benchmarks/runtimes.py [MODEL …] --runtimes … --speedups …`.

Each cell compresses a model (random weights, magnitudes, nothing trained) to a speed-up in a runtime, saves it,
and has a *second process* measure both again there: original and result in turn, medians of the ratios within the
rounds, 95 % intervals. A target out of reach is counted apart, with the best figure. With `--plan onnxruntime` the
plan made for ONNX Runtime is measured in each runtime, beside.

    python benchmarks/runtimes.py timm:resnet18 --runtimes openvino openvino:int8 --speedups 1.5 2 3 --json F
    python benchmarks/runtimes.py --read F            # the table of what was measured before

Rows are added to the file one by one: a run that was killed goes on where it ended.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import results
import torch
from rich.console import Console
from rich.table import Table

import cpd
from cpd.model import sources

MODELS = (
    "timm:resnet18", "timm:resnet50", "timm:mobilenetv2_100", "timm:efficientnet_b0", "timm:convnext_tiny",
    "timm:deit_small_patch16_224",
)  # fmt: skip
SECONDS = 10.0


def built(name: str) -> torch.nn.Module:
    """A model with weights from a fixed seed."""
    torch.manual_seed(0)
    return sources.resolve(name).build().eval()


def measure(name: str, folder: Path, runtime: str, threads: int, seconds: float) -> dict[str, Any]:
    """A saved result beside the original, in the process that this is called in."""
    original = built(name)
    result = cpd.load(folder, model=built(name))
    found = cpd.compare_latency(
        original, result, sources.default_inputs(original), runtime=runtime, threads=threads, seconds=seconds,
        precision=0.01,
    )  # fmt: skip
    return found.to_dict()


def measured_again(name: str, folder: Path, runtime: str, threads: int, seconds: float) -> dict[str, Any]:
    """The same in another process."""
    command = [
        sys.executable, __file__, name, "--measure", str(folder), "--runtimes", runtime, "--threads", str(threads),
        "--seconds", str(seconds),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-500:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def cell(
    name: str, plan: str, runtimes: list[str], speedup: float, threads: int, seconds: float
) -> list[dict[str, Any]]:
    """The rows of one plan, made in the runtime `plan`, measured in others."""
    start, model = time.perf_counter(), built(name)
    row: dict[str, Any] = {"model": name, "plan": plan, "asked": speedup}
    try:
        found = cpd.compress(
            model, target_speedup=speedup, example_inputs=sources.default_inputs(model), runtime=plan, threads=threads,
            progress=False,
        )  # fmt: skip
    except cpd.TargetError as error:
        return [{**row, "runtime": plan, "error": str(error)[:300]}]
    except cpd.CPDError as error:
        return [{**row, "runtime": plan, "failed": f"{type(error).__name__}: {error}"[:300]}]
    row |= {
        "macs_left": found.report.result.macs / found.report.original.macs, "last_timing": found.speedup,
        "candidates": len(found.report.search), "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        found.save(folder)
        for runtime in runtimes:
            try:
                again = measured_again(name, Path(folder), runtime, threads, seconds)
            except RuntimeError as error:
                rows.append({**row, "runtime": runtime, "failed": str(error)})
                continue
            rows.append({
                **row, "runtime": runtime, "second": again["speedup"], "low": again["speedup_low"],
                "high": again["speedup_high"], "ms": again["candidate_ms"], "original_ms": again["original_ms"],
                "environment": again["environment"],
            })  # fmt: skip
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The cells, and how many are within 5 and 10 %."""
    table = Table("model", "plan for", "measured in", "asked", "MACs left", "last timing", "second process", "off", "s")
    by_runtime = defaultdict[tuple[str, str], list[float]](list)
    for row in rows:
        head = row["model"].removeprefix("timm:"), row["plan"], row["runtime"], f"{row['asked']:g}"
        if "second" not in row:
            table.add_row(*head, "", "", (row.get("error") or row.get("failed", ""))[:60], "", "")
            continue
        off = row["second"] / row["asked"] - 1
        by_runtime[row["plan"], row["runtime"]].append(abs(off))
        interval = f"{row['second']:.2f} ({row['low']:.2f}-{row['high']:.2f})"
        table.add_row(
            *head,
            f"{row['macs_left']:.1%}",
            f"{row['last_timing']:.2f}",
            interval,
            f"{off:+.1%}",
            f"{row['seconds']:g}",
        )
    console = Console(width=160)
    console.print(table)
    for (plan, runtime), errors in by_runtime.items():
        out = sum("error" in row and row["plan"] == plan and row["runtime"] == runtime for row in rows)
        five, ten = (sum(error <= limit for error in errors) for limit in (0.05, 0.1))
        console.print(
            f"plan for {plan}, in {runtime}: {five} of {len(errors)} within 5 %, {ten} within 10 %; {out} out of reach."
        )


def main() -> int:
    """Run what is asked for, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--runtimes", nargs="+", default=["openvino"])
    parser.add_argument("--speedups", nargs="+", type=float, default=[1.5, 2.0, 3.0])
    parser.add_argument("--plan", help="one runtime that all plans are made for; default: each for its own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="that the second process times")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--read", type=Path, help="print the table of a file")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        (name,), (runtime,) = options.models, options.runtimes
        print(json.dumps(measure(name, options.measure, runtime, options.threads, options.seconds)))
        return 0
    if options.read:
        show(results.read(options.read))
        return 0
    rows = results.read(options.json)
    done = {(row["model"], row["plan"], row["asked"]) for row in rows}
    for name in options.models:
        for speedup in options.speedups:
            for plan in [options.plan] if options.plan else options.runtimes:
                if (name, plan, speedup) in done:
                    continue
                inside = options.runtimes if options.plan else [plan]
                rows += cell(name, plan, inside, speedup, options.threads, options.seconds)
                print(rows[-1], file=sys.stderr, flush=True)
                if options.json:
                    options.json.parent.mkdir(parents=True, exist_ok=True)
                    results.write(options.json, rows)
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
