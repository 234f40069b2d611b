"""Is it the weights that pruning keeps, or the shape? Pruned models beside the same shapes trained anew.

Liu et al. 2019 ("Rethinking the value of network pruning", arXiv 1810.05270) train the pruned shape from scratch: for
as many epochs as all training of the pruned model took (E), or for as much compute (B). Frankle and Carbin 2019 ("The
lottery ticket hypothesis", arXiv 1803.03635) put the weights that stay back to what they were at first, or after some
epochs (late). Here both, of single weights and of channels. A dense model is trained from scratch for each seed, with
the pruned ones after it; no weights are chosen by test images, the last count.

    python benchmarks/rethinking.py digits --seeds 0 1 2 --json runs/rethinking.json
    python benchmarks/rethinking.py resnet20 --data-dir DATA_DIR --sparsity 0.8 0.95 --macs 0.5
    python benchmarks/rethinking.py digits --epochs 1 --after 1 --sparsity 0.9 --macs 0.5      # to see that it runs
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import results
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import cpd
from cpd.demo import DigitsNet, accuracy, digits
from cpd.distillation.distiller import distill

Data = tuple[Iterable[Any], Callable[[nn.Module], float], Tensor]


@dataclass(frozen=True)
class Setting:
    """A model, its data, and how it is trained.

    Attributes:
        make: the model, with random weights.
        data: (folder, seed) -> (training loader, evaluate, example inputs).
        dense: the training from scratch.
        after: that of a pruned model.
    """

    make: Callable[[], nn.Module]
    data: Callable[[Path | None, int], Data]
    dense: cpd.DistillConfig
    after: cpd.DistillConfig


def digits_data(folder: Path | None, seed: int) -> Data:
    """The digits of scikit-learn."""
    loader, images, labels = digits(seed=seed)
    return loader, partial(accuracy, images=images, labels=labels), images[:1]


def image_data(folder: Path | None, seed: int) -> Data:
    """5,085 images of CIFAR-10."""
    from train_and_prune import exact_images

    if folder is None:
        raise SystemExit("This model needs --data-dir.")
    return exact_images(folder, seed, 128)


def resnet20() -> nn.Module:
    """The CIFAR ResNet-20."""
    from models import CifarResNet

    return CifarResNet(3)


_plain = cpd.DistillConfig(kd="none", keep_best=False)
SETTINGS = {
    "digits": Setting(
        DigitsNet, digits_data, replace(_plain, epochs=12, lr=0.05), replace(_plain, epochs=6, lr=0.01)
    ),
    "resnet20": Setting(
        resnet20, image_data, replace(_plain, epochs=60, lr=0.1), replace(_plain, epochs=20, lr=0.01)
    ),
}  # fmt: skip


class Bench:
    """One seed: its dense model, the weights that this had at first and a few epochs later, and what is made of it."""

    def __init__(self, setting: Setting, seed: int, options: argparse.Namespace) -> None:
        self.setting, self.seed, self.folder = setting, seed, options.data_dir
        self.epochs = options.epochs or setting.dense.epochs
        self.after = options.after or setting.after.epochs
        torch.manual_seed(seed)
        self.model = setting.make()
        self.first = copy.deepcopy(self.model.state_dict())
        early = copy.deepcopy(self.model)
        self.trained(early, options.late)
        self.early = early.state_dict()
        self.dense = self.trained(self.model, self.epochs)

    def data(self) -> Data:
        """Fresh loaders: every training sees the same batches."""
        return self.setting.data(self.folder, self.seed)

    def trained(self, model: nn.Module, epochs: float, masks: cpd.Masks | None = None) -> float:
        """Train a model from scratch, some weights zero; per cent right in the end."""
        loader, evaluate, _ = self.data()
        config = replace(self.setting.dense, epochs=epochs, seed=self.seed)
        distill(model, None, loader, config=config, pruner=None if masks is None else Fixed(model, masks))
        return evaluate(model.eval())

    def weights(self, share: float) -> Iterator[tuple[str, float, float]]:
        """(what is done, epochs of the sparse model, per cent right) of masks on single weights."""
        masks, whole = cpd.mask(self.model, share), self.epochs + self.after
        yield "fine-tuned", self.after, self.tuned(masks)
        yield "cpd.sparsify", self.after, self.of_cpd(cpd.sparsify, sparsity=share)
        for name, state in (("lottery ticket", self.first), ("lottery ticket, late", self.early)):
            model = self.setting.make()
            model.load_state_dict(state)
            yield name, self.epochs, self.trained(masks.apply(model), self.epochs, masks)
        for name, epochs in (("from scratch", self.epochs), ("from scratch, all epochs", whole)):
            yield name, epochs, self.trained(masks.apply(self.fresh()), epochs, masks)

    def channels(self, share: float) -> Iterator[tuple[str, float, float]]:
        """The same of shapes of so many MACs."""
        loader, _, example = self.data()
        options: dict[str, Any] = {"target_macs": share, "round_to": 1, "branches": False}
        plan = cpd.compress(
            self.model, data=loader, example_inputs=example, criterion="magnitude", compensation=False, epochs=0,
            progress=False, **options,
        ).plan  # fmt: skip
        whole = self.epochs + self.after
        yield "fine-tuned", self.after, self.tuned(None, plan)
        yield "cpd.compress", self.after, self.of_cpd(cpd.compress, **options)
        for name, state in (("lottery ticket", self.first), ("lottery ticket, late", self.early)):
            model = self.setting.make()
            model.load_state_dict(state)
            yield name, self.epochs, self.trained(cpd.shrink(model, plan), self.epochs)
        scratch = {"all epochs": whole, "same compute": self.epochs / share + self.after}
        for name, epochs in {"": self.epochs, **scratch}.items():
            model = cpd.shrink(self.fresh(), plan)
            _anew(model, self.seed)
            yield f"from scratch, {name}".removesuffix(", "), epochs, self.trained(model, epochs)

    def fresh(self) -> nn.Module:
        """The model with other random weights than it had."""
        torch.manual_seed(self.seed + 1000)
        return self.setting.make()

    def tuned(self, masks: cpd.Masks | None, plan: cpd.Plan | None = None) -> float:
        """Fine-tuned by cross-entropy alone."""
        loader, evaluate, _ = self.data()
        model = copy.deepcopy(self.model)
        if plan is not None:
            cpd.shrink(model, plan)
        pruner = None if masks is None else Fixed(masks.apply(model), masks)
        distill(
            model, None, loader, config=replace(self.setting.after, epochs=self.after, seed=self.seed), pruner=pruner
        )
        return evaluate(model.eval())

    def of_cpd(self, job: Callable[..., Any], **options: Any) -> float:
        """As cpd does it: by data, refitted, distilled."""
        loader, evaluate, example = self.data()
        config = replace(self.setting.after, epochs=self.after, seed=self.seed, kd="kl")
        result = job(
            self.model, data=loader, example_inputs=example, training=config, seed=self.seed, progress=False, **options
        )
        return evaluate(result.model)


class Fixed:
    """Masks that `distill` keeps as they are.

    Args:
        model: that is trained.
        masks: which weights stay.
    """

    done = True

    def __init__(self, model: nn.Module, masks: cpd.Masks) -> None:
        self.model, self.masks, self._kept = model, masks, None

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """That trains the model; its hooks keep the masks."""
        return None

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self.masks.keep(self.model, optimizer)

    def step(self) -> bool:
        """Nothing changes."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Nothing is kept."""
        return {}

    def load_state_dict(self, state: Any) -> None:
        """Nothing is taken up."""


def _anew(model: nn.Module, seed: int) -> None:
    """New random weights, of the widths that there are."""
    torch.manual_seed(seed + 1000)
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()


def table(rows: list[dict[str, Any]]) -> Table:
    """One line for all seeds of what is done: mean and spread."""
    found = Table("model", "pruned", "what is done", "epochs", "seeds", "dense", "per cent right", "change")
    keys = ("model", "pruned", "what", "epochs")
    for key in dict.fromkeys(tuple(row[name] for name in keys) for row in rows):
        alike = [row for row in rows if tuple(row[name] for name in keys) == key]
        metrics, dense = ([row[name] for row in alike] for name in ("metric", "dense"))
        spread = f" ± {statistics.stdev(metrics):.2f}" if len(metrics) > 1 else ""
        mean, whole = statistics.fmean(metrics), statistics.fmean(dense)
        found.add_row(
            *key[:3], f"{key[3]:g}", str(len(alike)), f"{whole:.2f}", f"{mean:.2f}{spread}", f"{mean - whole:+.2f}"
        )
    return found


def main() -> int:
    """Run every seed, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(SETTINGS))
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--sparsity", nargs="*", type=float, default=[0.8, 0.95], help="shares of single weights")
    parser.add_argument("--macs", nargs="*", type=float, default=[0.5, 0.25], help="shares of the MACs that are kept")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, help="of the dense model, and of what is trained from scratch")
    parser.add_argument("--after", type=float, help="of a pruned model")
    parser.add_argument("--late", type=float, default=1, help="epochs after which a late ticket is taken")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = results.read(options.json)
    for seed in options.seeds:
        if any(row["model"] == options.model and row["seed"] == seed for row in rows):
            continue
        bench, mine = Bench(SETTINGS[options.model], seed, options), list[dict[str, Any]]()
        asked = [(f"{share:.0%} of the weights", bench.weights(share)) for share in options.sparsity]
        asked += [(f"to {share:.0%} of the MACs", bench.channels(share)) for share in options.macs]
        for pruned, found in asked:
            start = time.perf_counter()
            for what, epochs, metric in found:
                mine.append({
                    "model": options.model, "seed": seed, "pruned": pruned, "what": what, "epochs": epochs,
                    "dense": bench.dense, "metric": metric, "seconds": time.perf_counter() - start,
                })  # fmt: skip
                start = time.perf_counter()
                print(mine[-1], file=sys.stderr, flush=True)
        rows += mine
        if options.json:
            results.write(options.json, rows)
    Console(width=150).print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
