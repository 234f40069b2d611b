"""Costs from the graph alone against torch's own counter: `python benchmarks/cost_model.py [MODEL …]`.

For the smallest model of every timm module (or those named), and for the model after 30 % of every open group is gone:
MACs by `comb.cost` and by `torch.utils.flop_counter`, and parameters counted on the model itself. Both also after
shrinking, where the prediction knows no more than the widths. The last column is candidates a second.

    python benchmarks/cost_model.py --json runs/cost_model.json
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import results
import torch
from coverage import LIMITS, chosen
from models import counted_macs, random_plan
from oracles import build
from rich.console import Console
from rich.progress import track
from rich.table import Table

import cpd
from cpd.model.inputs import as_call

CANDIDATES, REPEATS = 1000, 5


def row(name: str, share: float) -> dict[str, Any]:
    """One model: what is predicted and what is counted, whole and narrower."""
    torch.manual_seed(0)
    model, inputs = build(name)
    model.requires_grad_(False)  # torch's counter fails where a module is given a parameter
    call = as_call(inputs)
    comb = cpd.comb(model, inputs)
    plan = random_plan(comb, share, at_least=1)
    narrow = cpd.shrink(copy.deepcopy(model), plan)
    kept = {group.axis: len(plan.groups[group.name]) for group in comb.groups}
    whole, shrunk = comb.cost({}), comb.cost(kept)
    rng = np.random.default_rng(0)
    widths = np.stack([rng.integers(1, axis.size + 1, CANDIDATES) for axis in comb.cost.axes], 1)
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        comb.cost.many(widths)
        seconds.append(time.perf_counter() - start)
    return {
        "model": name,
        "macs": whole.macs, "counted": counted_macs(model, call),
        "shrunk_macs": shrunk.macs, "shrunk_counted": counted_macs(narrow, call),
        "parameters": whole.parameters, "own": sum(p.numel() for p in model.parameters()),
        "shrunk_parameters": shrunk.parameters, "shrunk_own": sum(p.numel() for p in narrow.parameters()),
        "candidates_s": CANDIDATES / statistics.median(seconds),
    }  # fmt: skip


PAIRS = (
    ("macs", "counted"), ("shrunk_macs", "shrunk_counted"),
    ("parameters", "own"), ("shrunk_parameters", "shrunk_own"),
)  # fmt: skip


def main() -> int:
    """Run the models, print those that differ and a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="library:name; instead of timm's")
    parser.add_argument("--share", type=float, default=0.3, help="of every open group that goes")
    parser.add_argument("--max-parameters", type=float, default=LIMITS["timm"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.library, options.all, options.detection, options.sample = "timm", False, False, 0
    rows: list[dict[str, Any]] = []
    errors = Console(stderr=True)
    names = options.models or chosen(options)
    for name in track(names, description="costs", console=errors, disable=not errors.is_terminal):
        try:
            rows.append(row(name, options.share))
        except Exception as error:  # one model of many
            rows.append({"model": name, "error": f"{type(error).__name__}: {error}"[:200]})
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            results.write(options.json, rows)
    table = Table("model", *(f"{ours} / {theirs}" for ours, theirs in PAIRS), "candidates a second")
    for item in rows:
        if "error" in item:
            table.add_row(item["model"], item["error"])
        elif options.models or any(item[ours] != item[theirs] for ours, theirs in PAIRS):
            found = [(item[ours], item[theirs]) for ours, theirs in PAIRS]
            cells = ("equal" if ours == theirs else f"{ours:,} / {theirs:,}" for ours, theirs in found)
            table.add_row(item["model"], *cells, f"{item['candidates_s']:,.0f}")
    console, ended = Console(width=200), [item for item in rows if "error" not in item]
    console.print(table)
    for ours, theirs in PAIRS:
        console.print(f"{ours} equal to {theirs}: {sum(i[ours] == i[theirs] for i in ended)} of {len(rows)} models")
    if ended:
        console.print(f"candidates a second: at least {min(i['candidates_s'] for i in ended):,.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
