"""How far predicted latency is off at widths never measured: `python benchmarks/latency_model.py [MODEL …]`.

For each model `cpd.profile_model` narrows copies at random (every group by a share of its own, a quarter to nine tenths
kept at least), exports and times them beside the original, and compares that with what was predicted before.

    python benchmarks/latency_model.py --check 4 --json runs/latency_model.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import results
import torch
from onnx_latency import MODELS
from rich.console import Console
from rich.table import Table

import cpd
from cpd.model import sources


def main() -> int:
    """Run what is asked for, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--check", type=int, default=4, help="narrower copies of each model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0, help="that each copy is timed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in options.models:
        torch.manual_seed(0)
        model = sources.resolve(name).build().eval()
        found = cpd.profile_model(
            model, sources.default_inputs(model), threads=options.threads, check=options.check, seconds=options.seconds,
            seed=options.seed,
        )  # fmt: skip
        rows.append({"model": name, "ms": found.total_ms, "checks": found.to_dict()["checks"]})
        print(rows[-1], file=sys.stderr, flush=True)
    table = Table("model", "ms", "MACs left", "predicted, measured", "error, median")
    every: list[float] = []
    for row in rows:
        errors = [abs(item["predicted"] / item["measured"] - 1) for item in row["checks"]]
        every += errors
        left = ", ".join(f"{item['macs_left']:.0%}" for item in row["checks"])
        both = "; ".join(f"{item['predicted']:.2f}, {item['measured']:.2f}" for item in row["checks"])
        table.add_row(row["model"], f"{row['ms']:.3g}", left, both, f"{statistics.median(errors):.1%}")
    console = Console(width=180)
    console.print(table)
    console.print(f"{len(every)} copies of {len(rows)} models: median error {statistics.median(every):.1%}.")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        results.write(options.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
