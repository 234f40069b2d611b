"""Ask for a speed-up, no data, and measure it again apart: `python benchmarks/speedup.py [MODEL …] [--target 2]`.

The second measurement opens both ONNX files with a plain ONNX Runtime session of its own, in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from rich.console import Console
from rich.table import Table

import cpd
from cpd import sources


def session(path: Path, threads: int) -> Any:
    """A CPU session with a fixed number of threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def ratio(original: Path, candidate: Path, threads: int, runs: int = 100) -> float:
    """Median over pairs of original time / candidate time."""
    sessions = [session(path, threads) for path in (original, candidate)]
    name, shape = sessions[0].get_inputs()[0].name, sessions[0].get_inputs()[0].shape
    feed = {name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    pairs: list[tuple[float, ...]] = []
    for _ in range(runs + 5):
        times = []
        for one in sessions:
            start = time.perf_counter()
            one.run(None, feed)
            times.append(time.perf_counter() - start)
        pairs.append(tuple(times))
    return statistics.median(a / b for a, b in pairs[5:])


def main() -> int:
    """Compress each model and measure twice."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["timm:resnet18"])
    parser.add_argument("--target", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    table, rows = Table("model", "asked", "measured", "again", "MACs left", "parameters left", "seconds"), []
    for name in options.models:
        model = sources.resolve(name).build().eval()
        start = time.perf_counter()
        result = cpd.compress(model, target_speedup=options.target, threads=options.threads)
        seconds = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder:
            dense = cpd.export_onnx(model, sources.default_inputs(model), Path(folder) / "dense.onnx")
            again = ratio(dense, result.save(folder) / "model.onnx", options.threads)
        before, after = result.report.original, result.report.result
        row = {"model": name, "asked": options.target, "measured": result.speedup, "again": again, "seconds": seconds}
        row |= {"macs_left": after.macs / before.macs, "parameters_left": after.parameters / before.parameters}
        rows.append(row)
        order = ("asked", "measured", "again", "macs_left", "parameters_left", "seconds")
        table.add_row(name, *(f"{row[key]:.3g}" for key in order))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
