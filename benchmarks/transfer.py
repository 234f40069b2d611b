"""A real ImageNet model on other, small data, as most users have it: the students `lite0-…` of `train_and_prune.py`.

`tf_efficientnet_lite0` with its trained weights gets a new head, and is fine-tuned before it is pruned: on the 5,085
exact CIFAR-10 images and on scikit-learn's digits, both enlarged to 96 pixels, and as the encoder of a segmentation
model on CamVid.

    python benchmarks/train_and_prune.py DATA_DIR lite0-cifar --speedups 1.5 2 3 --parts widths both --by cpd peer \\
        --seeds 0 1 2 --json runs/transfer.json
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from resnet56_cifar10 import DEVIATION, MEAN, check_files, load_data
from safetensors.torch import load_file
from torch import Tensor, nn

from cpd.demo import accuracy, digits
from cpd.tasks.segmentation import EncoderDecoder

NAME = "tf_efficientnet_lite0"
#: Pixels of the enlarged images, and how the model normalises them.
SIDE, CENTRE = 96, 0.5
Found = tuple[Iterable[Any], Callable[[nn.Module], float], Tensor]


class Enlarged:
    """Batches of another loader, each image as the model takes it."""

    def __init__(self, loader: Any, prepare: Callable[[Tensor], Tensor]) -> None:
        self.loader, self.prepare = loader, prepare

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((self.prepare(images), labels) for images, labels in self.loader)


def classifier(classes: int = 10) -> nn.Module:
    """The model with a head of its own, without weights."""
    return timm.create_model(NAME, num_classes=classes)


def trained_classifier(folder: Path) -> nn.Module:
    """The same with the trained weights, but for its head."""
    return _with_weights(classifier(), folder)


def segmenter(classes: int = 11) -> EncoderDecoder:
    """The model as the encoder of a segmentation model, without weights."""
    return EncoderDecoder(NAME, classes)


def trained_segmenter(folder: Path) -> EncoderDecoder:
    """The same, whose encoder has the trained weights."""
    model = segmenter()
    _with_weights(model.encoder, folder)
    return model


def cifar(folder: Path, seed: int, batch: int) -> Found:
    """5,085 training images, cropped and mirrored, and 1,017 test images, enlarged."""
    check_files(folder)
    data = load_data(folder, seed)
    data.loader.batch_size = batch
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))

    def prepare(images: Tensor) -> Tensor:
        return _enlarged(images * deviation + mean)

    return _found(data.loader, prepare, data.test_images, data.test_labels)


def written_digits(folder: Path, seed: int, batch: int) -> Found:
    """1,197 training and 600 test images of handwritten digits, enlarged; scikit-learn brings them."""
    loader, images, labels = digits(batch, seed)
    return _found(loader, lambda grey: _enlarged(grey.expand(-1, 3, -1, -1)), images, labels)


def _found(loader: Any, prepare: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Found:
    test = prepare(images)
    return Enlarged(loader, prepare), partial(accuracy, images=test, labels=labels), test[:1]


def _enlarged(images: Tensor) -> Tensor:
    """Images in [0, 1] as the model takes them."""
    return F.interpolate((images - CENTRE) / CENTRE, size=(SIDE, SIDE), mode="bilinear", align_corners=False)


def _with_weights(model: nn.Module, folder: Path) -> nn.Module:
    """A model with the trained weights, but for heads of other sizes.

    Raises:
        ValueError: a layer other than a head has none in the file.
    """
    own = model.state_dict()
    weights = {key: value for key, value in load_file(folder / f"{NAME}.safetensors").items() if key in own}
    fitting = {key: value for key, value in weights.items() if value.shape == own[key].shape}
    rest = ("classifier.weight", "classifier.bias", "num_batches_tracked")
    missing = [key for key in own if key not in fitting and not key.endswith(rest)]
    if missing:
        raise ValueError(f"{NAME}.safetensors has no weights for {missing[:5]}.")
    model.load_state_dict(fitting, strict=False)
    return model
