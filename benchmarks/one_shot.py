"""What accuracy one-shot pruning keeps, without a gradient step: `python benchmarks/one_shot.py DATA_DIR`.

Criteria x normalization x fewer MACs x {raw, recalibrated, compensated}, for the pretrained CIFAR-10 ResNet-56 and for
a small ViT that the script trains (or loads: `--vit-weights`). Calibration data are training images; the
1,017 test images are looked at only to report. `--peer` runs Torch-Pruning's importances beside them. A table is
printed; `--json` keeps all rows and goes on where it ended, `--plot` draws them.

    python benchmarks/one_shot.py DATA_DIR --json runs/one_shot.json --plot runs/one_shot.svg --peer
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import results
import torch
import torch.nn.functional as F
from coverage import PEER, installed_peer
from models import CifarResNet, counted_macs
from resnet56_cifar10 import BORDER, check_files, load_data, load_model
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import cpd
from cpd.criteria import CRITERIA
from cpd.demo import accuracy
from cpd.model.inputs import as_call
from cpd.selection.limits import Limits
from cpd.selection.selector import SCOPES, Selector
from cpd.selection.weighing import NORMALIZATIONS, Weighing
from cpd.surgery.batchnorm import recalibrate_batchnorm
from cpd.surgery.compensation import compensate
from cpd.surgery.shrink import shrink

BATCH = 128
FEWER = (2.11, 2.55, 4.0)
#: Per cent right, by how the narrower model was treated.
TREATMENTS = ("raw", "recalibrated", "compensated")
#: Of the peer, from the whole model to the narrowest.
STEPS = 200
PEERS = {
    "magnitude": "GroupMagnitudeImportance",
    "taylor": "GroupTaylorImportance",
    "hessian": "GroupHessianImportance",
    "bn_scale": "BNScaleImportance",
    "lamp": "LAMPImportance",
    "fpgm": "FPGMImportance",
    "random": "RandomImportance",
}

Images = tuple[Tensor, Tensor]
Batches = Sequence[Images]


class Bench:
    """One model, its data, and what is done to it."""

    def __init__(self, name: str, model: nn.Module, train: Images, test: Images, options: argparse.Namespace) -> None:
        self.name, self.model, self.test = name, model.eval(), test
        self.batches = list(zip(train[0].split(BATCH), train[1].split(BATCH), strict=True))[: options.batches]
        self.scoring, self.calibration = options.score_batches, options.batches
        self.comb = cpd.comb(model, test[0][:1])
        self.full = self.comb.cost({}).macs

    def right(self, model: nn.Module) -> float:
        """Per cent of the test images."""
        return accuracy(model.eval(), *self.test)

    def treated(self, narrow: nn.Module, compensated: Callable[[nn.Module], object] | None) -> dict[str, float]:
        """Accuracy raw, with BatchNorm recalibrated, and compensated (where that is possible)."""
        again = copy.deepcopy(narrow)
        recalibrate_batchnorm(again, self.batches, limit=self.calibration)
        found = {"raw": self.right(narrow), "recalibrated": self.right(again)}
        if compensated is not None:
            start = time.perf_counter()
            compensated(narrow)
            found |= {"compensated": self.right(narrow), "compensation_s": time.perf_counter() - start}
        return found

    def rows(
        self, criterion: str, known: set[tuple[Any, ...]], options: argparse.Namespace
    ) -> Iterator[dict[str, Any]]:
        """Every row of one criterion."""
        wanted = [
            (scope, normalization, fewer)
            for scope in options.scopes
            for normalization in (options.normalizations if scope == "global" else ["none"])
            for fewer in options.fewer
            if (self.name, criterion, scope, normalization, fewer) not in known
        ]
        if not wanted:
            return
        start = time.perf_counter()
        scores = cpd.score(
            self.model, self.comb, self.batches, criterion=criterion, limit=self.scoring, seed=options.seed
        )
        seconds = time.perf_counter() - start
        selectors = {
            key: Selector(self.comb, scores, Limits(round_to=1), key[0], Weighing(key[1]))
            for key in dict.fromkeys(item[:2] for item in wanted)
        }
        for scope, normalization, fewer in wanted:
            selector = selectors[scope, normalization]
            counts = selector.meet(lambda figures: figures.macs * fewer, self.full)  # noqa: B023
            plan = selector.plan(counts)
            narrow = shrink(copy.deepcopy(self.model), plan)
            yield {
                "model": self.name,
                "criterion": criterion,
                "scope": scope,
                "normalization": normalization,
                "fewer": fewer,
                "macs_left": self.comb.cost(counts).macs / self.full,
                "score_s": seconds,
                **self.treated(
                    narrow, lambda m, p=plan: compensate(m, self.model, p, self.batches, limit=self.calibration)
                ),
            }

    def peer_rows(
        self, importance: str, known: set[tuple[Any, ...]], options: argparse.Namespace
    ) -> Iterator[dict[str, Any]]:
        """Torch-Pruning, global; widths of residual streams are left alone where its graph cannot follow them."""
        import torch_pruning as tp

        for fewer in options.fewer:
            if (self.name, f"torch-pruning {importance}", "global", "its own", fewer) in known:
                continue
            narrow = peer_narrowed(tp, importance, self.model, self.test[0][:1], fewer, self.batches[: self.scoring])
            call = as_call(self.test[0][:1])
            left = counted_macs(narrow, call) / counted_macs(self.model, call)
            yield {
                "model": self.name,
                "criterion": f"torch-pruning {importance}",
                "scope": "global",
                "normalization": "its own",
                "fewer": fewer,
                "macs_left": left,
                **self.treated(narrow, None),
            }


def peer_narrowed(
    tp: Any, importance: str, model: nn.Module, example: Tensor, fewer: float, batches: Batches = ()
) -> nn.Module:
    """A copy pruned step by step until it has the MACs asked for."""
    goal = counted_macs(model, as_call(example)) / fewer
    for narrow in peer_steps(tp, importance, model, example, batches):
        if counted_macs(narrow, as_call(example)) <= goal:
            break
    narrow.zero_grad()
    return narrow


def peer_steps(
    tp: Any, importance: str, model: nn.Module, example: Tensor, batches: Batches = (), round_to: int | None = None
) -> Iterator[nn.Module]:
    """One copy, narrower at each step; the importance is scored on the batches where it asks for gradients."""
    with torch.no_grad():
        classes = model(example).shape[1]
    model = copy.deepcopy(model)
    heads, ignored = {}, []
    for path, module in model.named_modules():
        if classes in (getattr(module, "out_features", None), getattr(module, "out_channels", None)):
            ignored.append(module)
        if hasattr(module, "num_heads"):
            heads[module.qkv] = module.num_heads
        if isinstance(model, CifarResNet) and isinstance(module, nn.Conv2d) and not path.endswith("conv1"):
            ignored.append(module)  # its graph does not follow channels padded with zeros
    if isinstance(model, CifarResNet):
        ignored.append(model.conv1)
    scored = getattr(tp.importance, PEERS[importance])()
    pruner = tp.pruner.BasePruner(
        model, example, importance=scored, global_pruning=True, pruning_ratio=0.95, max_pruning_ratio=0.95,
        iterative_steps=STEPS, ignored_layers=ignored, num_heads=heads, prune_num_heads=False, prune_head_dims=True,
        round_to=round_to,
    )  # fmt: skip
    for images, labels in batches if importance in ("taylor", "hessian") else ():
        if importance == "taylor":
            F.cross_entropy(model(images), labels).backward()
            continue
        for image, label in zip(images.split(1), labels.split(1), strict=True):
            model.zero_grad()
            F.cross_entropy(model(image), label).backward()
            scored.accumulate_grad(model)
    for _ in range(STEPS):
        pruner.step()
        for module in model.modules():
            if hasattr(module, "num_heads") and module.qkv in pruner.num_heads:
                module.num_heads = pruner.num_heads[module.qkv]
                module.attn_dim = module.qkv.out_features // 3  # timm's own names, as its example sets them
                module.head_dim = module.attn_dim // module.num_heads
        yield model


def vit() -> nn.Module:
    """A small ViT for 32x32 images: patches of 4, 6 blocks of width 128, 4 heads."""
    import timm

    return timm.models.VisionTransformer(
        img_size=32, patch_size=4, embed_dim=128, depth=6, num_heads=4, mlp_ratio=4, num_classes=10, class_token=False,
        global_pool="avg",
    )  # fmt: skip


def trained_vit(loader: Any, weights: Path | None, epochs: int, seed: int) -> nn.Module:
    """The ViT with the weights in a file; trained, and written there, if there is none."""
    torch.manual_seed(seed)
    model = vit()
    if weights is not None and weights.exists():
        model.load_state_dict(load_file(weights))
        return model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, epochs * len(loader))
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        for _ in bar.track(range(epochs), description="training the ViT"):
            for images, labels in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(images), labels, label_smoothing=0.1).backward()
                optimizer.step()
                schedule.step()
    if weights is not None:
        weights.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), weights)
    return model.eval()


def tables(rows: list[dict[str, Any]], fewer: list[float]) -> Iterator[Table]:
    """One table a model: per cent right, raw / recalibrated / compensated."""
    for model in dict.fromkeys(row["model"] for row in rows):
        table = Table("criterion", "scope", "normalized by", *(f"{f:g}x fewer MACs" for f in fewer), "score s")
        dense = next(row["dense"] for row in rows if row["model"] == model)
        table.title = f"{model}: {dense:.1f} % unpruned; raw / {' / '.join(TREATMENTS[1:])}"
        keys = dict.fromkeys(
            (row["criterion"], row["scope"], row["normalization"]) for row in rows if row["model"] == model
        )
        for key in keys:
            found = {
                row["fewer"]: row
                for row in rows
                if row["model"] == model and (row["criterion"], row["scope"], row["normalization"]) == key
            }
            cells = [
                " / ".join(f"{found[f][name]:.1f}" for name in TREATMENTS if name in found[f]) if f in found else "-"
                for f in fewer
            ]
            seconds = max((row.get("score_s", 0.0) for row in found.values()), default=0.0)
            table.add_row(*key, *cells, f"{seconds:.0f}" if seconds else "")
        yield table


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy over MACs left: of every criterion its best normalization, compensated, and the peer recalibrated."""
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in rows))
    colours = dict(zip(CRITERIA, plt.get_cmap("tab20").colors, strict=False))  # the peer's like-named one is dashed
    figure, plots = plt.subplots(1, len(models), figsize=(8.5 * len(models), 5), squeeze=False)
    for model, area in zip(models, plots[0], strict=True):
        mine = [row for row in rows if row["model"] == model]
        for criterion in dict.fromkeys(row["criterion"] for row in mine):
            best: dict[float, dict[str, Any]] = {}
            for row in mine:
                if row["criterion"] == criterion:
                    value = row.get("compensated", row["recalibrated"])
                    if row["fewer"] not in best or value > best[row["fewer"]]["value"]:
                        best[row["fewer"]] = {**row, "value": value}
            points = sorted((row["macs_left"], row["value"]) for row in best.values())
            style, colour = "--" if criterion.startswith("torch-pruning") else "-", colours[criterion.split()[-1]]
            area.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=criterion, color=colour)
        area.set(title=model, xlabel="share of MACs left", ylabel="% right, no gradient step")
        area.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> int:
    """Run what is asked for, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--models", nargs="+", default=["resnet56", "vit"], choices=("resnet56", "vit"))
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA), choices=list(CRITERIA))
    parser.add_argument(
        "--normalizations",
        nargs="+",
        default=["none", "memory", "macs"],
        choices=[n for n in NORMALIZATIONS if n != "latency"],
    )
    parser.add_argument("--scopes", nargs="+", default=["global"], choices=SCOPES)
    parser.add_argument("--fewer", nargs="+", type=float, default=list(FEWER), help="times fewer MACs")
    parser.add_argument("--batches", type=int, default=8, help="of 128 images, to calibrate on")
    parser.add_argument("--score-batches", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vit-weights", type=Path, help="safetensors; written if there is none")
    parser.add_argument("--vit-epochs", type=int, default=40)
    parser.add_argument("--peer", action="store_true", help=f"run {PEER} too")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    check_files(options.data_dir)
    data = load_data(options.data_dir, options.seed)
    images = data.loader.images[:, :, BORDER:-BORDER, BORDER:-BORDER]
    train, test = (images, data.loader.labels), (data.test_images, data.test_labels)
    rows = results.read(options.json)
    known = {(r["model"], r["criterion"], r["scope"], r["normalization"], r["fewer"]) for r in rows}
    console = Console(width=200)
    with installed_peer(options.peer) as folder:
        sys.path[:0] = [folder] if folder else []
        for name in options.models:
            model = (
                load_model(options.data_dir) if name == "resnet56"
                else trained_vit(data.loader, options.vit_weights, options.vit_epochs, options.seed)
            )  # fmt: skip
            bench = Bench(name, model, train, test, options)
            dense = bench.right(model)
            sources: list[Iterator[dict[str, Any]]] = [bench.rows(each, known, options) for each in options.criteria]
            normed = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
            peers = [each for each in PEERS if normed or each != "bn_scale"] if options.peer else []
            sources += [bench.peer_rows(each, known, options) for each in peers]
            for source in sources:
                for row in source:
                    rows.append({**row, "dense": dense})
                    print(
                        " ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()), file=sys.stderr
                    )
                    if options.json:
                        options.json.parent.mkdir(parents=True, exist_ok=True)
                        results.write(options.json, rows)
    for table in tables(rows, options.fewer):
        console.print(table)
    if options.plot:
        plot(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
