"""A trained detector, faster: `python benchmarks/detector.py [--json F]`.

A YOLO11n is trained on shapes with exact boxes, drawn on the spot (`shapes.py`); no network. `cpd.compress` and
Torch-Pruning bring it to the same measured speed, and both are trained back for the same number of steps. What comes of
them is kept beside the weights, so that `--again` can measure its speed once more where the machine was busy.

| column | what it is |
|---|---|
| measured apart | times as fast as the unpruned one in ONNX Runtime, one thread, as another process measures it |
| mAP50-95 | by ultralytics' own validator, in per cent: unpruned, pruned, trained back |

Torch-Pruning is driven as its YOLOv8 example does: group magnitude, one ratio for all layers, two convolutions in the
place of each that is split, the head ignored, then ultralytics' trainer. For a YOLO11 its attention has to be ignored
too, without which its groups never end (its issue 430). The ratio is the smallest that is as fast. The row "unpruned"
is the same training of the model as it is: what training on alone gives.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import platformdirs
import results
import torch
from coverage import PEER, installed_peer
from models import counted_macs
from onnx_latency import separately
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from shapes import NAMES, write_yolo
from torch import Tensor, nn

import cpd
from cpd.model import sources
from cpd.model.inputs import as_call
from cpd.tasks.yolo import Yolo, as_yolo, validated

NAME, BATCH = "yolo11n", 16
#: How near the peer must come to the speed-up asked for, its step from ratio to ratio, and how long each is timed.
AS_FAST, STEP, SECONDS = 0.98, 1 / 32, 2.0


class Detector:
    """The trained model and its data, made where they are not in the cache yet."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        name = f"shapes-{options.side}-{options.images}-{options.epochs:g}"
        self.folder = options.cache / name
        self.data = self.folder / "shapes.yaml"
        if not self.data.exists():
            write_yolo(self.folder, train=options.images, val=options.images // 2, side=options.side)
        self.example = torch.rand(1, 3, options.side, options.side, generator=torch.Generator().manual_seed(0))

    def fresh(self) -> nn.Module:
        """The model with random weights."""
        torch.manual_seed(0)
        return sources.resolve(f"ultralytics:{NAME}.yaml,nc={len(NAMES)}").build()

    def trained(self) -> nn.Module:
        """The model with its weights."""
        model, file = self.fresh(), self.folder / f"{NAME}.safetensors"
        if not file.exists():
            model = self.trained_on(model, self.options.epochs)
            save_file({key: value.float().contiguous() for key, value in model.state_dict().items()}, file)
        model = self.fresh()
        model.load_state_dict(load_file(file))
        return model.eval()

    def trained_on(self, model: nn.Module, epochs: int) -> nn.Module:
        """The model after some epochs in ultralytics' own trainer, without mosaics: shapes are large and few."""
        yolo = as_yolo(model)
        with tempfile.TemporaryDirectory() as folder:
            yolo.train(
                data=str(self.data), epochs=epochs, imgsz=self.options.side, batch=BATCH, workers=0, device="cpu",
                mosaic=0.0, plots=False, verbose=False, val=False, cache="ram", project=folder, name="train", seed=0,
            )  # fmt: skip
        found: nn.Module = yolo.model
        return found.float().eval()

    def score(self, model: nn.Module) -> float:
        """mAP50-95 by ultralytics' validator, in per cent."""
        return validated(model, str(self.data), self.options.side, BATCH)

    def file(self, head: dict[str, Any]) -> Path:
        """Where the ONNX file of a row is kept."""
        return self.folder / "{by}-{asked:g}-{epochs}.onnx".format(**head)

    def speed(self, head: dict[str, Any]) -> float:
        """How many times as fast the kept model of a row is, as another process measures it."""
        return separately(self.folder / f"{NAME}.onnx", self.file(head), threads=1)

    def judged(self, dense: nn.Module, model: nn.Module, head: dict[str, Any]) -> dict[str, Any]:
        """What came of a model: its speed as another process measures it, its mAP and its size."""
        cpd.export_onnx(dense, self.example, self.folder / f"{NAME}.onnx")
        cpd.export_onnx(model, self.example, self.file(head))
        call = as_call(self.example)
        return {
            "speedup": self.speed(head),
            "after": self.score(model),
            "macs_left": counted_macs(model, call) / counted_macs(dense, call),
            "parameters_left": parameters(model) / parameters(dense),
        }


def parameters(model: nn.Module) -> int:
    """How many there are."""
    return sum(parameter.numel() for parameter in model.parameters())


# ---------------------------------------------------------------------------------- those who prune


def ours(detector: Detector, dense: nn.Module, head: dict[str, Any]) -> dict[str, Any]:
    """`cpd.compress` with what it does by itself."""
    options = detector.options
    task = Yolo(batch_size=BATCH, imgsz=options.side)
    result = cpd.compress(
        dense,
        target_speedup=head["asked"],
        data=detector.data,
        task=task,
        epochs=options.recovery,
        threads=1,
        progress=False,
    )
    history = result.report.history
    return {
        "pruned": next((row["metric"] for row in history if not row["epoch"]), None),
        "said": result.speedup,
        "history": [row["metric"] for row in history],
        "removed": len(result.plan.removed),
        "notes": list(result.report.notes),
        **detector.judged(dense, result.model, head),
    }


def theirs(detector: Detector, dense: nn.Module, head: dict[str, Any]) -> dict[str, Any]:
    """Torch-Pruning at the smallest ratio that is as fast, trained back by ultralytics."""
    for ratio in (step * STEP for step in range(1, round(0.95 / STEP))):
        narrow = torch_pruned(dense, detector.example, ratio)
        speed = cpd.compare_latency(dense, narrow, detector.example, seconds=SECONDS, threads=1).speedup
        if speed >= AS_FAST * head["asked"]:
            break
    found = {"pruned": detector.score(narrow), "ratio": ratio}
    return {**found, **detector.judged(dense, detector.trained_on(narrow, detector.options.recovery), head)}


def untouched(detector: Detector, dense: nn.Module, head: dict[str, Any]) -> dict[str, Any]:
    """The model as it is, trained as long."""
    return detector.judged(dense, detector.trained_on(copy.deepcopy(dense), detector.options.recovery), head)


BY = {"unpruned": untouched, "cpd": ours, "Torch-Pruning": theirs}


def torch_pruned(dense: nn.Module, example: Tensor, ratio: float) -> nn.Module:
    """Narrower by Torch-Pruning, which follows neither channels that are split nor the attention."""
    import torch_pruning as tp
    from ultralytics.nn.modules import Detect
    from ultralytics.nn.modules.block import Attention

    class Whole(tp.BasePruningFunc):  # type: ignore[misc]
        """A layer that keeps its width, and is not looked into."""

        def prune_out_channels(self, layer: Any, idxs: Any) -> nn.Module:
            raise AssertionError(f"{type(layer).__name__} is to be ignored")

        prune_in_channels = prune_out_channels

        def get_out_channels(self, layer: Any) -> int:
            return int(layer.proj.conv.out_channels)

        def get_in_channels(self, layer: Any) -> int:
            return int(layer.qkv.conv.in_channels)

    model = copy.deepcopy(dense).eval().requires_grad_(True)
    taken_apart(model)
    head: Any = model.model[-1]  # type: ignore[index]
    head.forward = lambda maps: [  # before the places of all levels are put in one row
        torch.cat((boxes(each), classes(each)), 1)
        for boxes, classes, each in zip(head.cv2, head.cv3, maps, strict=True)
    ]
    tp.pruner.GroupNormPruner(
        model, example, importance=tp.importance.GroupMagnitudeImportance(), iterative_steps=1, pruning_ratio=ratio,
        round_to=8, customized_pruners={Attention: Whole()},
        ignored_layers=[module for module in model.modules() if isinstance(module, (Detect, Attention))],
    ).step()  # fmt: skip
    del head.forward
    return model


def taken_apart(module: nn.Module) -> None:
    """Blocks that split what a convolution gives get two convolutions in its place."""
    from ultralytics.nn.modules import C2f
    from ultralytics.nn.modules.block import C2PSA

    for name, child in list(module.named_children()):
        if isinstance(child, (C2f, C2PSA)):
            child = Halves(child, keeps_all=isinstance(child, C2f))
            setattr(module, name, child)
        taken_apart(child)


class Halves(nn.Module):
    """A block of ultralytics whose first convolution is two."""

    def __init__(self, block: Any, keeps_all: bool) -> None:
        super().__init__()
        self.left, self.right = half(block.cv1, 0), half(block.cv1, 1)
        self.m, self.cv2, self.keeps_all = block.m, block.cv2, keeps_all
        self.i, self.f, self.type = block.i, block.f, block.type

    def forward(self, x: Tensor) -> Tensor:
        """What the block gives."""
        found = [self.left(x), self.right(x)]
        for each in self.m:
            found.append(each(found[-1]))
        return self.cv2(torch.cat(found if self.keeps_all else [found[0], found[-1]], 1))  # type: ignore[no-any-return]


def half(layer: Any, number: int) -> nn.Module:
    """The first or the second half of the channels that a convolution with its norm gives."""
    found = copy.deepcopy(layer)
    width = layer.conv.out_channels // 2
    mine = slice(number * width, (number + 1) * width)
    found.conv.out_channels = found.bn.num_features = width
    found.conv.weight = nn.Parameter(layer.conv.weight.detach()[mine].clone())
    for name in ("weight", "bias"):
        setattr(found.bn, name, nn.Parameter(getattr(layer.bn, name).detach()[mine].clone()))
    for name in ("running_mean", "running_var"):
        setattr(found.bn, name, getattr(layer.bn, name)[mine].clone())
    return found  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------- rows


def missing(options: argparse.Namespace, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows asked for that are not there yet, by what they are told."""
    for by in options.by:
        for asked in options.speedups if by != "unpruned" else [1.0]:
            head = {"by": by, "asked": asked, "epochs": options.recovery}
            if not any(head.items() <= row.items() for row in rows):
                yield head


def table_of(rows: list[dict[str, Any]]) -> Table:
    """A row a result."""
    heads = ("by", "asked", "measured apart", "unpruned", "pruned", "trained back", "MACs", "parameters", "s")
    table = Table(*heads, title=f"{NAME} on shapes, mAP50-95 [%]")
    for row in sorted(rows, key=lambda row: row["asked"]):
        pruned = "" if row.get("pruned") is None else f"{row['pruned']:.1f}"
        table.add_row(
            row["by"], f"{row['asked']:g}x", f"{row['speedup']:.2f}x", f"{row['dense']:.1f}", pruned,
            f"{row['after']:.1f}", f"{row['macs_left']:.1%}", f"{row['parameters_left']:.1%}", f"{row['seconds']:.0f}",
        )  # fmt: skip
    return table


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speedups", nargs="+", type=float, default=[1.5, 2.0])
    parser.add_argument("--by", nargs="+", choices=list(BY), default=list(BY))
    parser.add_argument("--side", type=int, default=128, help="pixels of the images")
    parser.add_argument("--images", type=int, default=1024, help="to train on; half as many to validate on")
    parser.add_argument("--epochs", type=int, default=24, help="of the training of the unpruned model")
    parser.add_argument("--recovery", type=int, default=6, help="epochs that each result is trained back")
    parser.add_argument("--again", action="store_true", help="measure the speed of kept results once more, and end")
    parser.add_argument("--cache", type=Path, default=platformdirs.user_cache_path("cpd") / "benchmarks")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.again and options.json is None:
        parser.error("--again measures the rows of --json F")
    return options


def main() -> int:
    """Train, prune, train back, and print the table."""
    options = parsed()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    detector, rows = Detector(options), results.read(options.json)
    if options.again:
        rows = [{**row, "speedup": detector.speed(row)} if detector.file(row).exists() else row for row in rows]
        results.write(options.json, rows)
        Console(width=160).print(table_of(rows))
        return 0
    dense = detector.trained()
    score = detector.score(dense)
    print(f"unpruned: {score:.2f}", file=sys.stderr, flush=True)
    with installed_peer("Torch-Pruning" in options.by, PEER) as peers:
        sys.path[:0] = [peers] if peers else []
        for head in list(missing(options, rows)):
            start = time.perf_counter()
            found = BY[head["by"]](detector, copy.deepcopy(dense), head)
            rows.append({**head, "dense": score, **found, "seconds": time.perf_counter() - start})
            print({key: value for key, value in rows[-1].items() if key != "notes"}, file=sys.stderr, flush=True)
            if options.json:
                results.write(options.json, rows)
    Console(width=160).print(table_of(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
