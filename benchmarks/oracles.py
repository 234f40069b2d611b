"""Comb, shrink by 30 % at random, and check: `python benchmarks/oracles.py [MODEL …] [--json FILE]`.

For each model: groups, share of parameters in open groups, masked equals shrunk in float64 (all open groups) and in
float32 (exact groups alone), parameters left, and seconds. Weights are random, norms and their statistics too.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from models import resnet56
from rich.console import Console
from rich.table import Table
from torch import nn

import cpd
from cpd import sources
from cpd.oracle import masked_error

MODELS = [
    "timm:resnet18", "timm:resnet50", "timm:mobilenetv2_100", "timm:densenet121", "timm:convnext_atto",
    "timm:vit_tiny_patch16_224", "torchvision:swin_t", "torchvision:shufflenet_v2_x1_0", "resnet56",
]  # fmt: skip


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights at which a wrong slice shows: matrices of deviation 1/sqrt(fan_in), random norms and statistics."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=g)
            if tensor.dim() > 1:
                tensor.copy_(noise / tensor[0].numel() ** 0.5)
            elif "bias" in name or "mean" in name:
                tensor.copy_(0.3 * noise)
            else:
                tensor.copy_(torch.rand(tensor.shape, generator=g) + 0.5)
    return model


def check(name: str, share: float, seed: int) -> dict[str, Any]:
    """One model through comb, plan, shrink and the oracle."""
    if name == "resnet56":
        model, inputs = resnet56(), torch.randn(1, 3, 32, 32)
    else:
        model = sources.resolve(name).build()
        inputs = sources.default_inputs(model)
    model = randomize(model.eval())
    start = time.perf_counter()
    comb = cpd.comb(model, inputs)
    row: dict[str, Any] = {"model": name, "comb_s": time.perf_counter() - start, "groups": len(comb.groups)}
    row |= {
        "open": len(comb.open),
        "exact": sum(g.exact for g in comb.open),
        "open_share": comb.open_share["parameters"],
    }
    rng = random.Random(seed)
    kept = {g.name: sorted(rng.sample(range(g.size), g.size - int(share * g.size))) for g in comb.open}
    exact = {g.name: kept[g.name] for g in comb.open if g.exact}
    for label, keep, dtype in (("error32_exact", exact, torch.float32), ("error64_all", kept, torch.float64)):
        dense = copy.deepcopy(model).to(dtype)
        again = cpd.comb(dense, inputs.to(dtype))
        plan = again.plan(keep)
        small = copy.deepcopy(dense)
        start = time.perf_counter()
        cpd.shrink(small, plan)
        row["shrink_s"] = time.perf_counter() - start
        row[label] = masked_error(dense, small, again, plan)
    row["parameters_left"] = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    return row


def main() -> int:
    """Check every model named; exit code 1 if an oracle fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--share", type=float, default=0.3, help="of every open group that goes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    columns = [
        "model",
        "groups",
        "open",
        "exact",
        "open_share",
        "error32_exact",
        "error64_all",
        "parameters_left",
        "comb_s",
    ]
    table, rows = Table(*columns, title=f"{options.share:.0%} of every open group removed"), []
    for name in options.models:
        rows.append(check(name, options.share, options.seed))
        table.add_row(*(f"{v:.3g}" if isinstance(v := rows[-1][column], float) else str(v) for column in columns))
    Console(width=160).print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return int(any(row["error32_exact"] > 1e-4 or row["error64_all"] > 1e-9 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
