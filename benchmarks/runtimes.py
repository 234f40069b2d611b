"""Asked = measured, in the runtime that ships: `python benchmarks/runtimes.py [MODEL …] --runtimes … --speedups …`.

Each cell compresses a model (random weights, magnitudes, nothing trained) to a speed-up in a runtime, saves it,
and has a *second process* measure both again there: original and result in turn, medians of the ratios within the
rounds, 95 % intervals. A target out of reach is counted apart, with the best figure. `--plan onnxruntime` measures the
plan made for ONNX Runtime in each runtime, beside; `--plan peer` Torch-Pruning's model (uniform ratio, group magnitude,
widths in multiples of 8) with as many MACs as the plan made for the runtime has left, which the file must tell.
`--data DATA_DIR` gives compress `--images` images of the ImageNet sample, so that it scores by them and refits, and
goes on searching where the last timing missed (`tf_efficientnet_lite0` has its trained weights then).

    python benchmarks/runtimes.py timm:resnet18 --runtimes openvino openvino:int8 --speedups 1.5 2 3 --json F
    python benchmarks/runtimes.py timm:resnet18 --runtimes openvino --plan peer --json F
    python benchmarks/runtimes.py timm:ghostnet_100 --runtimes onnxruntime --speedups 1.25 1.5 2 --data DATA_DIR
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

import imagenet
import platformdirs
import results
import torch
from peer import with_macs
from rich.console import Console
from rich.table import Table

import cpd
from cpd.model import sources

MODELS = (
    "timm:resnet18", "timm:resnet50", "timm:mobilenetv2_100", "timm:efficientnet_b0", "timm:convnext_tiny",
    "timm:deit_small_patch16_224",
)  # fmt: skip
SECONDS = 10.0
#: The peer among the plans; its model in a folder, as PyTorch saves a whole one; seconds that it may take for one.
PEER, WHOLE, PEER_SECONDS = "peer", "model.pt", 120


def built(name: str) -> torch.nn.Module:
    """A model with weights from a fixed seed."""
    torch.manual_seed(0)
    return sources.resolve(name).build().eval()


def of_sample(name: str, folder: Path, count: int) -> tuple[torch.nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A model, trained where the sample has weights of it, and batches of so many images as that one takes them."""
    known, cache = "tf_efficientnet_lite0", platformdirs.user_cache_path("cpd") / "benchmarks"
    images, labels = (tensor[:count] for tensor in imagenet.sample(known, folder, "calibration"))
    model = imagenet.load(known, folder, cache) if name == f"timm:{known}" else built(name)
    return model.eval(), list(zip(images.split(32), labels.split(32), strict=True))


def measure(name: str, folder: Path, runtime: str, threads: int, seconds: float) -> dict[str, Any]:
    """A saved result beside the original, in the process that this is called in."""
    original, whole = built(name), folder / WHOLE
    result = torch.load(whole, weights_only=False) if whole.exists() else cpd.load(folder, model=built(name))
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
    name: str, plan: str, runtimes: list[str], speedup: float, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows of one plan, made for the runtime `plan`, measured in others."""
    row: dict[str, Any] = {"model": name, "plan": plan, "asked": speedup}
    given: dict[str, Any] = {}
    if options.data is None:
        model = built(name)
    else:
        model, given["data"] = of_sample(name, options.data, options.images)
        given["epochs"], row["images"] = 0, options.images
    start = time.perf_counter()
    try:
        found = cpd.compress(
            model, target_speedup=speedup, example_inputs=sources.default_inputs(model), runtime=plan,
            threads=options.threads, progress=False, **given,
        )  # fmt: skip
    except cpd.TargetError as error:
        return [{**row, "runtime": plan, "error": str(error)[:300]}]
    except cpd.CPDError as error:
        return [{**row, "runtime": plan, "failed": f"{type(error).__name__}: {error}"[:300]}]
    row |= {
        "macs_left": found.report.result.macs / found.report.original.macs, "last_timing": found.speedup,
        "candidates": len(found.report.search), "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        found.save(folder)
        return [timed(row, Path(folder), runtime, options.threads, options.seconds) for runtime in runtimes]


def peers_cell(row: dict[str, Any], threads: int, seconds: float) -> dict[str, Any]:
    """The peer's row beside one of a plan made for the runtime that it is measured in."""
    import torch_pruning

    start, found = time.perf_counter(), {key: row[key] for key in ("model", "asked", "runtime")} | {"plan": PEER}
    try:
        model, left = with_macs(torch_pruning, row["model"], row["macs_left"], seconds=PEER_SECONDS)
    except Exception as error:  # whatever the peer raises
        return {**found, "failed": f"{type(error).__name__}: {error}"[:300]}
    found |= {"macs_left": left, "seconds": round(time.perf_counter() - start, 1)}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model, Path(folder, WHOLE))
        return timed(found, Path(folder), row["runtime"], threads, seconds)


def timed(row: dict[str, Any], folder: Path, runtime: str, threads: int, seconds: float) -> dict[str, Any]:
    """A row with what a second process measures of the model in a folder."""
    row = {**row, "runtime": runtime}
    try:
        again = measured_again(row["model"], folder, runtime, threads, seconds)
    except RuntimeError as error:
        return {**row, "failed": str(error)}
    return {
        **row, "second": again["speedup"], "low": again["speedup_low"], "high": again["speedup_high"],
        "ms": again["candidate_ms"], "original_ms": again["original_ms"], "environment": again["environment"],
    }  # fmt: skip


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
            f"{row['last_timing']:.2f}" if "last_timing" in row else "",
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
    parser.add_argument("--plan", help="one runtime that all plans are made for, or 'peer'; default: its own each")
    parser.add_argument("--data", type=Path, metavar="DATA_DIR", help="compress has images of the ImageNet sample")
    parser.add_argument("--images", type=int, default=128, help="of the sample that compress has")
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

    def add(new: list[dict[str, Any]]) -> None:
        rows.extend(new)
        print(rows[-1], file=sys.stderr, flush=True)
        if options.json:
            results.write(options.json, rows)

    for name in options.models:
        for speedup in options.speedups:
            mine = [row for row in rows if (row["model"], row["asked"]) == (name, speedup)]
            for plan in [options.plan] if options.plan else options.runtimes:
                done = {row["runtime"] for row in mine if row["plan"] == plan}
                missing = [one for one in (options.runtimes if options.plan else [plan]) if one not in done]
                if plan == PEER:
                    for row in mine:
                        if row["runtime"] in missing and row["runtime"] == row["plan"] and "macs_left" in row:
                            add([peers_cell(row, options.threads, options.seconds)])
                elif missing:
                    add(cell(name, plan, missing, speedup, options))
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
