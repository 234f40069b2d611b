"""A plan made for INT8 beside the float plan quantized afterwards, at equal measured speed: `python … DATA_DIR`.

`tf_efficientnet_lite0`, one-shot with the 400 calibration images, accuracy on the 300 test images (of the training set:
for comparison within this run alone). Both speeds are against the dense INT8 model. The float plan is asked for other
speeds until its INT8 model is as fast as the other plan's, or for so many tries as are allowed.

    python benchmarks/int8_target.py DATA_DIR --speedup 2 --json runs/int8_target.json
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import imagenet
import platformdirs
import results
import torch
from rich.console import Console
from rich.table import Table

import cpd
from cpd.demo import accuracy

NAME = "tf_efficientnet_lite0"


def main() -> int:
    """Run both, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--speedup", type=float, default=2.0)
    parser.add_argument("--runtime", default="onnxruntime:int8")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cache = Path(platformdirs.user_cache_dir("cpd-benchmarks"))
    model = imagenet.load(NAME, options.data_dir, cache)
    images, labels = (tensor[: options.images] for tensor in imagenet.sample(NAME, options.data_dir, "calibration"))
    data = list(zip(images.split(50), labels.split(50), strict=True))
    test = imagenet.sample(NAME, options.data_dir, "test")

    def evaluate(one: torch.nn.Module) -> float:
        return accuracy(one, *test)

    evaluate.metric = "top-1 accuracy [%]"  # type: ignore[attr-defined]
    rows: list[dict[str, Any]] = []

    def note(**row: Any) -> None:
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            results.write(options.json, rows)

    def compressed(runtime: str, speedup: float) -> tuple[cpd.Result, float]:
        start = time.perf_counter()
        found = cpd.compress(
            model, target_speedup=speedup, data=data, epochs=0, evaluate=evaluate, runtime=runtime, progress=False
        )  # fmt: skip
        return found, round(time.perf_counter() - start, 1)

    result, seconds = compressed(options.runtime, options.speedup)
    report = result.report
    note(plan="dense", runtime=options.runtime, speedup=1.0, top1=report.original.metric, notes=report.notes)
    note(
        plan=f"for {options.runtime}", asked=options.speedup, speedup=result.speedup, top1=report.result.metric,
        macs_left=report.result.macs / report.original.macs, seconds=seconds,
    )  # fmt: skip
    goal, asked = result.speedup or options.speedup, options.speedup
    for _ in range(options.tries):
        other, seconds = compressed("onnxruntime", asked)
        both = cpd.compare_latency(
            model, other.model, images[:1], runtime=options.runtime, calibration=data, seconds=15, precision=0.01
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            made = cpd.quantize_onnx(
                cpd.export_onnx(other.model, images[:1]), data, f"{folder}/int8.onnx", evaluate=evaluate, seconds=0.5,
                limit=2,
            )  # fmt: skip
        note(
            plan="for onnxruntime, quantized afterwards", asked=asked, speedup=both.speedup, top1=made.metric,
            float_speedup=other.speedup, float_top1=other.report.result.metric, seconds=seconds,
            macs_left=other.report.result.macs / other.report.original.macs,
        )  # fmt: skip
        if abs(both.speedup / goal - 1) < 0.03:
            break
        asked = max(asked * math.exp(math.log(goal / both.speedup) * 1.5), 1.05)
    table = Table("plan", "asked", "speed-up in INT8", "top-1 of the INT8 model", "MACs left", "s")
    for row in rows:
        left = f"{row['macs_left']:.1%}" if "macs_left" in row else ""
        table.add_row(
            row["plan"], f"{row.get('asked', ''):.4}" if "asked" in row else "", f"{row['speedup']:.2f}",
            f"{row['top1']:.1f}", left, str(row.get("seconds", "")),
        )  # fmt: skip
    Console(width=140).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
