"""Ask for speed-ups, no data, and measure them again apart: `python benchmarks/onnx_latency.py [MODEL …]`.

Each cell is a model, a target and a number of threads. `again` is a second measurement, by plain ONNX Runtime sessions
in a process of their own: the two models in turn, each running for 100 ms. `predicted` is what the latency model said
of the first candidate, before it was measured. `--peer` puts Torch-Pruning beside (uniform ratio, group magnitude,
widths in multiples of 8): at the same MACs, timed in turn with ours, and at the same measured speed-up, its ratio found
by bisection. Weights are random. Cells that the JSON file holds are not run again.

    python benchmarks/onnx_latency.py --json runs/onnx_latency.json --plot runs/onnx_latency.svg
    python benchmarks/onnx_latency.py --threads 2 --json runs/onnx_latency.json
    python benchmarks/onnx_latency.py --peer --json runs/onnx_latency_peer.json
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import results
import torch
from coverage import PEER, installed_peer
from peer import with_macs, with_ratio
from rich.console import Console
from rich.table import Table

import cpd
from cpd.model import sources

MODELS = [
    "timm:resnet18", "timm:resnet50", "timm:resnext50_32x4d", "timm:mobilenetv2_100", "timm:mobilenetv3_large_100",
    "timm:efficientnet_b0", "timm:regnety_008", "timm:densenet121", "timm:convnext_tiny",
    "timm:deit_small_patch16_224", "timm:swin_tiny_patch4_window7_224", "torchvision:lraspp_mobilenet_v3_large",
]  # fmt: skip
TARGETS = [1.5, 2.0, 3.0]
#: Seconds that the peer may take for one model.
PEER_SECONDS = 120
#: How long each model runs before the other takes its turn, in the second measurement.
BLOCK_SECONDS = 0.1
#: How near the peer's measured speed-up comes to ours, and steps of the bisection.
NEAR, STEPS = 0.03, 6


def again(original: Path, candidate: Path, threads: int, pairs: int) -> float:
    """Median over pairs of original time / candidate time, in sessions of this file's own."""
    sessions = []
    for path in (original, candidate):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        sessions.append(onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]))
    name, shape = sessions[0].get_inputs()[0].name, sessions[0].get_inputs()[0].shape
    feed = {name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    ratios = []
    for _ in range(pairs + 2):
        times = []
        for one in sessions:
            start, runs = time.perf_counter(), 0
            while (elapsed := time.perf_counter() - start) < BLOCK_SECONDS:
                one.run(None, feed)
                runs += 1
            times.append(elapsed / runs)
        ratios.append(times[0] / times[1])
    return statistics.median(ratios[2:])


def separately(original: Path, candidate: Path, threads: int, pairs: int = 60) -> float:
    """`again` in a process of its own."""
    command = [sys.executable, __file__, "--again", str(original), str(candidate), str(threads), str(pairs)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def cell(name: str, target: float, threads: int, folder: Path) -> dict[str, Any]:
    """One model brought to one target."""
    torch.manual_seed(0)
    model = sources.resolve(name).build().eval()
    start = time.perf_counter()
    try:
        result = cpd.compress(model, target_speedup=target, threads=threads, output_dir=folder / "ours")
    except cpd.TargetError as error:
        return {"seconds": time.perf_counter() - start, "error": str(error)}
    seconds = time.perf_counter() - start
    dense = cpd.export_onnx(model, sources.default_inputs(model), folder / "dense.onnx")
    first = result.report.search[0]
    before, after = result.report.original, result.report.result
    return {
        "measured": result.speedup,
        "again": separately(dense, folder / "ours" / "model.onnx", threads),
        "predicted": first["predicted"],
        "first": first["speedup"],
        "exports": len(result.report.search) + 2,
        "macs_left": after.macs / before.macs,
        "parameters_left": after.parameters / before.parameters,
        "latency_ms": before.latency_ms,
        "seconds": seconds,
    }


# ---------------------------------------------------------------------------------- the peer


def beside(tp: Any, name: str, row: dict[str, Any], threads: int, folder: Path) -> dict[str, Any]:
    """The peer at the MACs that ours has, and at its measured speed-up."""
    model = sources.resolve(name).build()
    inputs, parameters = sources.default_inputs(model), sum(p.numel() for p in model.parameters())
    equal = with_macs(tp, name, row["macs_left"], seconds=PEER_SECONDS)
    theirs = cpd.export_onnx(equal[0], inputs, folder / "theirs.onnx")
    files = {"original": folder / "dense.onnx", "theirs": theirs, "ours": folder / "ours" / "model.onnx"}
    timed = cpd.measure_latency({key: str(path) for key, path in files.items()}, inputs, threads=threads, seconds=15)
    found = {
        "peer_macs_left": equal[1],
        "peer_speedup": timed["theirs"].speedup,
        "ours_beside": timed["ours"].speedup,
    }
    low, high = 0.0, 0.95
    best: tuple[float, Any, float] | None = None
    for _ in range(STEPS):
        ratio = (low + high) / 2
        candidate, macs = with_ratio(tp, name, ratio)
        speedup = cpd.compare_latency(files["original"], candidate, inputs, threads=threads, seconds=4).speedup
        off = math.log(speedup / row["measured"])
        if best is None or abs(off) < abs(best[0]):
            best = off, candidate, macs
        if abs(off) < NEAR:
            break
        low, high = (ratio, high) if off < 0 else (low, ratio)
    assert best is not None
    return found | {
        "same_speed": row["measured"] * math.exp(best[0]),
        "same_speed_macs_left": best[2],
        "same_speed_parameters_left": sum(p.numel() for p in best[1].parameters()) / parameters,
    }


# ---------------------------------------------------------------------------------- what is printed


def table(rows: list[dict[str, Any]]) -> Table:
    """One line a cell."""
    heads = ("model", "asked", "threads", "measured", "again", "off", "first: predicted, measured", "exports")
    found = Table(
        *heads, "MACs left", "parameters left", "s", "peer at our MACs", "at our speed: MACs, parameters left"
    )
    for row in rows:
        if row.get("error"):
            found.add_row(row["model"], f"{row['asked']:g}", str(row["threads"]), "out of reach", row["error"][:80])
            continue
        beside = row.get("peer_error", "")
        same = ""
        if "peer_speedup" in row:
            beside = f"{row['peer_speedup']:.2f} (ours {row['ours_beside']:.2f}, at {row['peer_macs_left']:.1%})"
            same = (
                f"{row['same_speed_macs_left']:.1%}, {row['same_speed_parameters_left']:.1%} ({row['same_speed']:.2f})"
            )
        found.add_row(
            row["model"], f"{row['asked']:g}", str(row["threads"]), f"{row['measured']:.3f}", f"{row['again']:.3f}",
            f"{row['again'] / row['asked'] - 1:+.1%}", f"{row['predicted']:.2f}, {row['first']:.2f}",
            str(row["exports"]), f"{row['macs_left']:.1%}", f"{row['parameters_left']:.1%}", f"{row['seconds']:.0f}",
            beside, same,
        )  # fmt: skip
    return found


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """What the issue asks for, in sentences."""
    told = []
    for threads, bound in ((1, 0.05), (2, 0.1)):
        mine = [row for row in rows if row["threads"] == threads]
        reached = [row for row in mine if not row.get("error")]
        within = [row for row in reached if abs(row["again"] / row["asked"] - 1) <= bound]
        if reached:
            told.append(
                f"{threads} thread(s): {len(within)} of {len(reached)} reachable cells within {bound:.0%} of the "
                f"target by the second measurement; {len(mine) - len(reached)} out of reach."
            )
    reached = [row for row in rows if not row.get("error")]
    errors = [abs(row["predicted"] / row["first"] - 1) for row in reached]
    told.append(f"Latency predicted before any measurement: median error {statistics.median(errors):.1%}.")
    seconds = statistics.median(row["seconds"] for row in reached)
    told.append(f"Exports a target: {max(row['exports'] for row in reached)} at most; {seconds:.0f} s in the median.")
    both = [row for row in reached if "peer_speedup" in row]
    if both:
        faster = statistics.median(row["ours_beside"] / row["peer_speedup"] for row in both)
        macs = statistics.median(row["macs_left"] / row["same_speed_macs_left"] for row in both)
        parameters = statistics.median(row["parameters_left"] / row["same_speed_parameters_left"] for row in both)
        told.append(
            f"Beside {PEER} in {len(both)} cells, medians: at equal MACs {faster:.2f} times as fast; at equal speed "
            f"{macs:.2f} times the MACs and {parameters:.2f} times the parameters."
        )
    return told


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Asked against measured, a mark a cell."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="constrained")
    area = figure.add_subplot()
    reached = [row for row in rows if not row.get("error")]
    for name in dict.fromkeys(row["model"] for row in reached):
        mine = [row for row in reached if row["model"] == name]
        area.plot([row["asked"] for row in mine], [row["again"] for row in mine], "o", ms=5, label=name.split(":")[1])
    most = max(row["asked"] for row in reached)
    area.plot([1, most], [1, most], color="grey", lw=1)
    area.fill_between([1, most], [0.95, 0.95 * most], [1.05, 1.05 * most], color="grey", alpha=0.15)
    area.set(xlabel="speed-up asked for", ylabel="speed-up, measured again apart")
    area.legend(fontsize=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> int:
    """Run what is asked for, print the table."""
    if sys.argv[1:2] == ["--again"]:
        original, candidate, threads, pairs = sys.argv[2:]
        print(again(Path(original), Path(candidate), int(threads), int(pairs)))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--targets", nargs="+", type=float, default=TARGETS)
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--peer", action="store_true", help=f"beside {PEER}")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    rows = results.read(options.json)
    with installed_peer(options.peer) as installed:
        sys.path[:0] = [installed] if installed else []
        for name in options.models:
            for target in options.targets:
                for threads in options.threads:
                    head = {"model": name, "asked": target, "threads": threads}
                    if any(head.items() <= row.items() for row in rows):
                        continue
                    with tempfile.TemporaryDirectory() as folder:
                        row = head | cell(name, target, threads, Path(folder))
                        if options.peer and not row.get("error"):
                            import torch_pruning as tp

                            try:
                                row |= beside(tp, name, copy.deepcopy(row), threads, Path(folder))
                            except Exception as error:  # whatever it raises, or makes of the model
                                row["peer_error"] = f"{type(error).__name__}: {error}"[:100]
                    rows.append(row)
                    print(row, file=sys.stderr, flush=True)
                    if options.json:
                        options.json.parent.mkdir(parents=True, exist_ok=True)
                        results.write(options.json, rows)
    console = Console(width=220)
    console.print(table(rows))
    for text in summary(rows):
        console.print(text)
    if options.plot:
        plot(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
