"""What accuracy masks leave, without a gradient step and after some epochs: `python benchmarks/sparsity.py DATA_DIR`.

The pretrained CIFAR-10 ResNet-56 (1,024 training images to refit on, 1,017 test images) and a real ImageNet model
(`tf_efficientnet_lite0`, 400 images to refit on, 300 others). For each pattern the accuracy of the masks alone
(magnitude), with BatchNorm recalibrated, and refitted in closed form; seconds on one core; and the bytes of the
weights. `--epochs` also trains ResNet-56 at 80 and 95 %. `--runtimes` times dense and sparse models in every runtime
that is installed, 2:4 by `torch.sparse` where there is a GPU, and tells the bytes of their files. A table is printed;
`--json` keeps all rows.

    python benchmarks/sparsity.py DATA_DIR --json runs/sparsity.json
    python benchmarks/sparsity.py DATA_DIR --models resnet56 --only 80 --epochs 3
    python benchmarks/sparsity.py DATA_DIR --models resnet56 --only none --runtimes
"""

from __future__ import annotations

import argparse
import copy
import lzma
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import results
import torch
from imagenet import load as load_imagenet
from imagenet import sample
from resnet56_cifar10 import BORDER, load_data, load_model
from rich.console import Console
from rich.table import Table
from safetensors.torch import save
from torch import Tensor, nn

import cpd
from cpd.demo import accuracy
from cpd.deploy.runtimes.catalogue import installed
from cpd.errors import first_line
from cpd.model.inputs import evaluating
from cpd.report.artifacts import unique_tensors
from cpd.report.packed import pack
from cpd.surgery.batchnorm import recalibrate_batchnorm

#: Name -> options of `cpd.mask`, and what is asked for after the refit.
RESNET: dict[str, tuple[dict[str, Any], float | None]] = {
    "80 %": ({"sparsity": 0.8}, 91.8),
    "90 %": ({"sparsity": 0.9}, 86.0),
    "2:4": ({"pattern": "2:4"}, 92.5),
    "4:8": ({"pattern": "4:8"}, 92.5),
    "kernel 50 %": ({"sparsity": 0.5, "pattern": "kernel"}, 91.5),
    "1x3 70 %": ({"sparsity": 0.7, "pattern": "1x3"}, 91.3),
    "4x1 70 %": ({"sparsity": 0.7, "pattern": "4x1"}, 89.0),
    "70 %": ({"sparsity": 0.7}, None),
    "95 %": ({"sparsity": 0.95}, None),
    "80 % per layer": ({"sparsity": 0.8, "scope": "layer"}, None),
    "80 % ERK": ({"sparsity": 0.8, "ratios": "erk"}, None),
    "80 % LAMP": ({"sparsity": 0.8, "ratios": "lamp"}, None),
}
LITE0: dict[str, tuple[dict[str, Any], float | None]] = {
    "50 %": ({"sparsity": 0.5}, 82.0),
    "2:4": ({"pattern": "2:4"}, 76.0),
    "70 %": ({"sparsity": 0.7}, None),
    "80 %": ({"sparsity": 0.8}, None),
    "50 % ERK": ({"sparsity": 0.5, "ratios": "erk"}, None),
    "50 % LAMP": ({"sparsity": 0.5, "ratios": "lamp"}, None),
}


class Bench:
    """One model and its images."""

    def __init__(self, name: str, folder: Path, cache: Path) -> None:
        self.name = name
        if name == "resnet56":
            data = load_data(folder, 0)
            self.model, self.rows, self.loader = load_model(folder).eval(), RESNET, data.loader
            images = data.loader.images[:1024, :, BORDER:-BORDER, BORDER:-BORDER]
            self.test = (data.test_images, data.test_labels)
            self.batches: list[Tensor] = list(images.split(64))
        else:
            self.model, self.rows = load_imagenet("tf_efficientnet_lite0", folder, cache).eval(), LITE0
            self.batches = list(sample("tf_efficientnet_lite0", folder, "calibration")[0].split(25))
            self.test = sample("tf_efficientnet_lite0", folder, "test")

    def right(self, model: nn.Module) -> float:
        """Per cent of the test images."""
        return accuracy(model.eval(), *self.test)

    def row(self, label: str, options: dict[str, Any], wanted: float | None) -> dict[str, Any]:
        """One pattern, without a gradient step."""
        raw = cpd.mask(self.model, **options).apply(copy.deepcopy(self.model))
        recalibrated = copy.deepcopy(raw)
        recalibrate_batchnorm(recalibrated, self.batches)
        student = copy.deepcopy(self.model)
        start, before = time.perf_counter(), time.process_time()
        sparsifier = cpd.Sparsifier(student, **options, steps=0, data=self.batches)
        sparsifier.prune()
        seconds, of_cpu = time.perf_counter() - start, time.process_time() - before
        tensors = unique_tensors(student)
        plain = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        assert sparsifier.recovery is not None
        return {
            "model": self.name,
            "masks": label,
            "zeros": cpd.get_sparsity(student),
            "raw": self.right(raw),
            "recalibrated": self.right(recalibrated),
            "refitted": self.right(student),
            "wanted": wanted,
            "seconds": seconds,
            "cpu_seconds": of_cpu,
            "kept": sparsifier.recovery.chosen,
            "packed": len(pack(tensors)) / plain,
            "packed_int8": len(pack(tensors, int8=True)) / plain,
        }

    def trained(self, sparsity: float, epochs: float, seed: int) -> dict[str, Any]:
        """A whole run with distillation."""
        start = time.perf_counter()
        self.loader.batch_size = BATCH
        result = cpd.sparsify(
            self.model, sparsity, data=self.loader, calibration=self.batches, evaluate=self.right, epochs=epochs,
            seed=seed, training=TRAINING,
        )  # fmt: skip
        history = {row["epoch"]: row["metric"] for row in result.report.history}
        return {
            "model": self.name, "masks": f"{sparsity:.0%}, {epochs:g} epochs", "zeros": result.sparsity,
            "refitted": history[0], "trained": result.report.result.metric, "history": history,
            "seconds": time.perf_counter() - start, "seed": seed,
        }  # fmt: skip


#: Of few images labels are learned by heart, and the teacher's last feature map, which teaches a narrower model well
#: (`resnet56_cifar10.py`), leaves the classifier of a very sparse one behind: its logits teach all of it.
TRAINING, BATCH = cpd.DistillConfig(kd="kl", lr=0.03, task_weight=0.0), 32


def runtimes(bench: Bench, shares: Sequence[float], seconds: float) -> Iterator[dict[str, Any]]:
    """What zeros do: dense and sparse models, timed in turn in each runtime that is installed, and their bytes."""
    models = {"dense": bench.model}
    for share in shares:
        models[f"{share:.0%}"] = cpd.mask(bench.model, share).apply(copy.deepcopy(bench.model))
    models["2:4"] = cpd.mask(bench.model, pattern="2:4").apply(copy.deepcopy(bench.model))
    inputs = bench.test[0][:1]
    for runtime in installed():
        try:
            table = cpd.measure_latency(models, inputs, runtime=runtime, seconds=seconds, calibration=bench.batches)
        except cpd.CPDError as error:
            yield {"model": bench.name, "runtime": runtime, "error": first_line(error)}
            continue
        for row in table.rows:
            yield {"model": bench.name, "runtime": runtime, "zeros_of": row.name, "ms": row.median_ms,
                   "speedup": row.speedup}  # fmt: skip
    if torch.cuda.is_available():
        yield from on_tensor_cores()
    for name, model in models.items():
        yield {"model": bench.name, "stored": name, **stored(model, inputs)}


def on_tensor_cores(size: int = 4096, rounds: int = 50) -> Iterator[dict[str, Any]]:
    """A linear layer in fp16 on a GPU, dense and as `torch.sparse` runs it where 2 of 4 of its weights stay."""
    layer = nn.Linear(size, size)
    layer = cpd.mask(layer, pattern="2:4").apply(layer).half().cuda()
    x = torch.randn(size, size, device="cuda", dtype=torch.half)
    sparse = copy.deepcopy(layer)
    sparse.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(layer.weight))
    times = {}
    with torch.inference_mode():
        difference = float((sparse(x) - layer(x)).abs().max())
        for name, module in {"dense": layer, "2:4": sparse}.items():
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            for step in range(2 * rounds):
                if step == rounds:  # those before have warmed it up
                    events[0].record()
                module(x)
            events[1].record()
            torch.cuda.synchronize()
            times[name] = events[0].elapsed_time(events[1]) / rounds
    for name, found in times.items():
        yield {"model": f"Linear {size}", "runtime": "torch.sparse, fp16, CUDA", "zeros_of": name, "ms": found,
               "speedup": times["dense"] / found, "difference": difference}  # fmt: skip


def stored(model: nn.Module, inputs: Tensor) -> dict[str, float]:
    """The bytes of a model in files of several kinds."""
    tensors = unique_tensors(model)
    onnx = cpd.export_onnx(model, inputs)
    return {
        "safetensors": len(save(tensors)), "onnx": len(onnx), "onnx.xz": len(lzma.compress(onnx)),
        "packed": len(pack(tensors)), "packed-int8": len(pack(tensors, int8=True)),
    }  # fmt: skip


def truth(rows: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """What zeros do to time and to bytes."""
    timed = [row for row in rows if "runtime" in row]
    if timed:
        table = Table("model", "runtime", "zeros", "ms", "times as fast", title="Latency, one sample, one thread")
        for row in timed:
            told = (
                (row["zeros_of"], f"{row['ms']:.3f}", f"{row['speedup']:.2f}")
                if "ms" in row
                else ("", "", row["error"][:90])
            )
            table.add_row(row["model"], row["runtime"], *told)
        yield table
    kinds = ("safetensors", "onnx", "onnx.xz", "packed", "packed-int8")
    files = [row for row in rows if "stored" in row]
    if files:
        table = Table("model", "zeros", *kinds, title="Bytes, relative to dense fp32")
        for row in files:
            dense = next(item for item in files if item["model"] == row["model"] and item["stored"] == "dense")
            table.add_row(row["model"], row["stored"], *(f"{row[kind] / dense['safetensors']:.3f}" for kind in kinds))
        yield table


def shown(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows as a table."""
    names = (
        "model",
        "masks",
        "zeros",
        "raw",
        "recalibrated",
        "refitted",
        "wanted",
        "trained",
        "s",
        "CPU s",
        "fp32",
        "int8",
    )
    table = Table(*names, title="Per cent right; seconds on one core; bytes of the weights relative to dense fp32")
    for row in rows:

        def figure(key: str, form: str = "{:.2f}", row: dict[str, Any] = row) -> str:
            value = row.get(key)
            return "" if value is None else form.format(value)

        missed = row.get("wanted") is not None and row["refitted"] < row["wanted"]
        table.add_row(
            row["model"], row["masks"], figure("zeros", "{:.2%}"), figure("raw"), figure("recalibrated"),
            figure("refitted"), figure("wanted", ">= {:g}") + (" missed" if missed else ""), figure("trained"),
            figure("seconds", "{:.0f}"), figure("cpu_seconds", "{:.0f}"), figure("packed", "{:.3f}"),
            figure("packed_int8", "{:.3f}"),
        )  # fmt: skip
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What accuracy masks leave.")
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--models", nargs="*", default=["resnet56", "lite0"], choices=["resnet56", "lite0"])
    parser.add_argument("--only", default="", help="rows whose name begins with this, as 2:4; none: no such row")
    parser.add_argument("--epochs", type=float, default=0, help="also train ResNet-56 at --trained for so long")
    parser.add_argument("--trained", type=float, nargs="*", default=[0.8])
    parser.add_argument("--runtimes", action="store_true", help="also what zeros do to time and bytes, everywhere")
    parser.add_argument("--seconds", type=float, default=15, help="that a runtime is timed")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "cpd-benchmarks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = results.read(options.json)

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            results.write(options.json, rows)

    for name in options.models:
        bench = Bench(name, options.data_dir, options.cache)
        with evaluating(bench.model):
            add({"model": name, "masks": "none", "zeros": 0.0, "refitted": bench.right(bench.model)})
        for label, (wanted_options, wanted) in bench.rows.items():
            known = any(row["model"] == name and row.get("masks") == label for row in rows)
            if label.startswith(options.only) and not known:
                add(bench.row(label, wanted_options, wanted))
        for share in options.trained if options.epochs and name == "resnet56" else []:
            add(bench.trained(share, options.epochs, options.seed))
        for row in runtimes(bench, (0.8, 0.95), options.seconds) if options.runtimes else ():
            add(row)
    console = Console(width=170)
    console.print(shown([row for row in rows if "masks" in row]))
    for table in truth(rows):
        console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
