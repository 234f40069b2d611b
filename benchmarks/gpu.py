"""What cpd does on a GPU: `python benchmarks/gpu.py`.

The first table says whether each step gives on the GPU what it gives on the CPU: the comb, every criterion, removal of
channels and branches, compression with a training, masks, a second comb. The second gives steps a second by precision,
before and after; the third milliseconds of PyTorch, compiled and not, by batch, and of matrices with two zeros in every
four. Random weights; nothing is read or fetched.

    python benchmarks/gpu.py --json runs/gpu.json
    python benchmarks/gpu.py --device cpu --quick        # to try the command
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import results
import torch
from models import CifarResNet, randomize
from oracles import check_masked
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import cpd
from cpd.criteria import CRITERIA
from cpd.distillation.distiller import distill

FEWER = 2.55


class Bench:
    """One model on both devices, and images."""

    def __init__(self, device: str, blocks: int, images: int) -> None:
        torch.manual_seed(0)
        self.device = device
        model = randomize(CifarResNet(blocks)).eval()
        self.there, self.here = copy.deepcopy(model).to(device), model
        self.images = torch.randn(images, 3, 32, 32)
        self.labels = torch.randint(0, 10, (len(self.images),))
        size = len(self.images) // 4
        self.batches = list(zip(self.images.split(size), self.labels.split(size), strict=True))

    # ------------------------------------------------------------------------------ alike

    def checks(self) -> dict[str, Callable[[], str]]:
        """What is checked, by name."""
        scores = {f"score, {name}": lambda name=name: self.score(name) for name in CRITERIA if name != "random"}
        return {"comb, shrink": self.comb, **scores, "compress, MACs": self.compress, "compress, speed": self.faster,
                "gradual": self.gradual, "sparsify": self.sparse, "fp16": lambda: self.mixed("fp16"),
                "bf16": lambda: self.mixed("bf16")}  # fmt: skip

    def comb(self) -> str:
        """The same groups; masked = shrunk in float64."""
        there, here = (model.double() for model in copy.deepcopy((self.there, self.here)))
        x = self.images[:4].double()
        combs = [cpd.comb(model, inputs) for model, inputs in ((there, x.to(self.device)), (here, x))]
        groups = [[(group.name, group.size, group.frozen) for group in comb.groups] for comb in combs]
        assert groups[0] == groups[1], "other groups"
        removed = [branch.name for branch in combs[0].branches if not branch.frozen][:2]
        plan = combs[0].plan({group.name: range(0, group.size, 2) for group in combs[0].open}, remove=removed)
        error = check_masked(there, combs[0], plan)
        narrow = cpd.shrink(copy.deepcopy(there), plan)
        with torch.no_grad():
            found, other = narrow(x.to(self.device)).cpu(), cpd.shrink(copy.deepcopy(here), plan)(x)
        apart = float((found - other).abs().max() / other.abs().max())
        assert apart < 1e-9, f"{apart:.1e} from the CPU's"
        assert cpd.comb(narrow, x.to(self.device)).open, "a second comb opens nothing"
        return f"{len(groups[0])} groups, {len(removed)} branches out, masked = shrunk {error}, CPU {apart:.0e}"

    def score(self, criterion: str) -> str:
        """Within rounding of the CPU's scores."""
        found = []
        for model, device in ((self.there, self.device), (self.here, "cpu")):
            comb = cpd.comb(model, self.images[:1].to(device))
            scores = cpd.score(model, comb, criterion=criterion, data=self.batches, seed=0)
            found.append(torch.cat([scores[group.name].cpu().double() for group in comb.open]))
        correlation = float(torch.corrcoef(torch.stack(found))[0, 1])
        assert correlation > 0.99, f"correlation {correlation:.4f} with the CPU's"
        return f"correlation {correlation:.6f}"

    def compress(self) -> str:
        """MACs, with refits and one epoch."""
        result = cpd.compress(self.there, target_macs=1 / 2, data=self.batches, epochs=1, progress=False)
        return self.said(result)

    def faster(self) -> str:
        """A speed-up measured on the CPU, of a model on the GPU."""
        return self.said(cpd.compress(self.there, target_speedup=1.5, data=self.batches, epochs=0, progress=False))

    def gradual(self) -> str:
        """On a schedule, with the streams of the teacher."""
        training = cpd.DistillConfig(epochs=4, lr=0.01, kd="mse")
        result = cpd.compress(
            self.there, target_macs=1 / 2, data=self.batches, training=training, epochs=4, lr=0.01,
            schedule=cpd.Schedule("cubic", end=0.5, interval=2), progress=False,
        )  # fmt: skip
        return self.said(result)

    def mixed(self, precision: str) -> str:
        """A training in lower precision."""
        training = cpd.DistillConfig(epochs=1, lr=0.01, mixed_precision=precision)
        result = cpd.compress(
            self.there, target_macs=1 / 2, data=self.batches, training=training, epochs=1, lr=0.01, progress=False
        )
        return self.said(result)

    def sparse(self) -> str:
        """Masks, refitted."""
        result = cpd.sparsify(self.there, sparsity=0.8, data=self.batches, epochs=0, progress=False)
        return f"{cpd.get_sparsity(result.model):.3f} zeros on {device_of(result.model)}"

    def said(self, result: cpd.Result) -> str:
        """What came of a compression, which must be where the model was."""
        where = device_of(result.model)
        assert where == device_of(self.there), f"the result is on {where}"
        assert device_of(self.there).startswith(self.device), "the user's model was moved"
        with torch.no_grad():
            assert result.model(self.images[:2].to(self.device)).isfinite().all(), "not finite"
        return f"{result.report.original.macs / result.report.result.macs:.2f}x fewer MACs on {where}"

    # ------------------------------------------------------------------------------ how fast

    def steps(self, precision: str) -> dict[str, Any]:
        """Steps a second of a distillation, before and after."""
        images, labels = self.images.to(self.device).repeat(20, 1, 1, 1), self.labels
        labels = labels.to(self.device).repeat(len(images) // len(labels))
        data = list(zip(images.split(128), labels.split(128), strict=True))
        config = cpd.DistillConfig(epochs=2, lr=0.01, kd="kl", mixed_precision=precision)
        narrow = cpd.compress(
            self.there, target_macs=1 / FEWER, data=self.batches, epochs=0, criterion="magnitude", compensation=False,
            branches=False, progress=False,
        ).model  # fmt: skip
        rates = {
            name: distill(copy.deepcopy(model), self.there, data, config=config)[-1].steps_per_second
            for name, model in (("dense", self.there), ("narrow", narrow))
        }
        return {"precision": precision, **rates}

    def latency(self, runtime: str, batch: int) -> dict[str, Any]:
        """Milliseconds of the model before and after, in turn."""
        narrow = cpd.compress(
            self.there, target_macs=1 / FEWER, data=self.batches, epochs=0, round_to=8, criterion="magnitude",
            compensation=False, branches=False, progress=False,
        ).model  # fmt: skip
        x = torch.randn(batch, 3, 32, 32, device=self.device)
        found = cpd.compare_latency(self.there, narrow, x, runtime=runtime, seconds=3, min_runs=6)
        return {"runtime": runtime, "batch": batch, "ms": found.original_ms, "narrow_ms": found.candidate_ms,
                "speedup": found.speedup}  # fmt: skip

    def two_of_four(self, size: int) -> dict[str, Any]:
        """Milliseconds of a half-precision product, dense and by the kernels that know 2:4."""
        from torch.sparse import to_sparse_semi_structured

        layer = nn.Linear(size, size, bias=False, device=self.device, dtype=torch.float16)
        masks = cpd.mask(nn.Sequential(copy.deepcopy(layer).float().cpu(), nn.ReLU()), pattern="2:4")
        kept = next(iter(masks.kept.values())).to(self.device)
        weight = (layer.weight * kept).detach()
        x = torch.randn(size, size, device=self.device, dtype=torch.float16)
        dense, sparse = nn.Parameter(weight), nn.Parameter(to_sparse_semi_structured(weight))
        error = float((nn.functional.linear(x, sparse) - nn.functional.linear(x, dense)).abs().max())
        times = {name: self.timed(lambda w=w: nn.functional.linear(x, w)) for name, w in
                 (("dense_ms", dense), ("sparse_ms", sparse))}  # fmt: skip
        return {"size": size, "error": error, **times}

    def timed(self, run: Callable[[], Tensor], runs: int = 100) -> float:
        """Milliseconds a run."""
        with torch.no_grad():
            for count in (10, runs):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(count):
                    run()
                torch.cuda.synchronize()
        return (time.perf_counter() - start) / runs * 1e3


def device_of(model: nn.Module) -> str:
    """Where its weights are."""
    return str(next(model.parameters()).device)


def tried(name: str, run: Callable[[], Any]) -> dict[str, Any]:
    """What it gave, or raised, and seconds."""
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found, ok = run(), True
    except Exception as error:  # whatever it is goes into the table
        import traceback

        traceback.print_exc()
        found, ok = f"{type(error).__name__}: {error}"[:300], False
    print(name, found, file=sys.stderr, flush=True)
    return {"what": name, "ok": ok, "found": found, "seconds": time.perf_counter() - start}


def main() -> int:
    """Run all, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="a smaller model")
    parser.add_argument("--only", nargs="+", default=["checks", "speed"], choices=("checks", "speed"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if "checks" in options.only:
        bench = Bench(options.device, blocks=1 if options.quick else 3, images=64)
        rows += [tried(name, run) for name, run in bench.checks().items()]
    if "speed" in options.only:
        gpu = options.device != "cpu"
        bench = Bench(options.device, blocks=1 if options.quick else 9, images=16 if options.quick else 256)
        precisions = ("no", "bf16", "fp16")[: 3 if gpu else 1]
        rows += [tried(f"steps, {name}", lambda name=name: bench.steps(name)) for name in precisions]
        rows += [
            tried(f"{runtime}, batch {batch}", lambda runtime=runtime, batch=batch: bench.latency(runtime, batch))
            for runtime in ("torch", "torch.compile") for batch in (1, 256)[: 2 if gpu else 1]
        ]  # fmt: skip
        rows += [tried(f"2:4, {size}", lambda size=size: bench.two_of_four(size)) for size in (1024, 4096, 8192) if gpu]
    table = Table("what", "", "found", "s")
    for row in rows:
        table.add_row(row["what"], "ok" if row["ok"] else "FAILED", str(row["found"]), f"{row['seconds']:.0f}")
    Console(width=180).print(table)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        results.write(options.json, rows)
    return int(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
