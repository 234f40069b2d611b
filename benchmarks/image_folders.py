"""ImageNet and ADE20K as they are handed out, in folders, for benchmarks: nothing is unpacked or copied.

    imagenet/train/n01440764/*.JPEG          imagenet/val/n01440764/*.JPEG
    ADEChallengeData2016/images/training/*.jpg       …/annotations/training/*.png       …/validation/…

A folder of a class whose name is a number is of the class of that index, so that a part of the classes will do.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from cpd.model.inputs import evaluating
from cpd.tasks.metric import named
from cpd.tasks.segmentation import SegmentationFolder, class_iou, mean_iou

#: Labels of ADE20K are 1 to 150; 0 is of no class.
ADE20K_CLASSES = 150
ADE20K_PARTS = ("training", "validation")


class Classes(ImageFolder):
    """Images in a folder for each class; a name that is a number is the index of the class."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """The names of the folders, and the index of each."""
        names, indices = super().find_classes(directory)
        if all(name.isdecimal() for name in names):
            indices = {name: int(name) for name in names}
        return names, indices


class ImageNet:
    """Loaders of a folder with train/ and val/, prepared as a model of timm takes its images.

    Attributes:
        training: augmented, shuffled.
        plain: the training images without augmentation, shuffled.
        validation: all images of val/.
        classes: how many there are at least.
    """

    def __init__(self, folder: Path, name: str, batch: int, *, seed: int = 0, workers: int = 0) -> None:
        if missing := [part for part in ("train", "val") if not (folder / part).is_dir()]:
            raise SystemExit(f"{folder} holds no {' and no '.join(f'{part}/' for part in missing)}.")
        config = resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        size, plain = config["input_size"], create_transform(**config, is_training=False)
        augmented = create_transform(
            size, is_training=True, mean=config["mean"], std=config["std"], interpolation=config["interpolation"]
        )
        train, calibration, test = (
            Classes(str(folder / part), transform)
            for part, transform in (("train", augmented), ("train", plain), ("val", plain))
        )
        self.classes = 1 + max(*train.class_to_idx.values(), *test.class_to_idx.values())
        make = partial(DataLoader, batch_size=batch, num_workers=workers)

        def shuffled(data: Any) -> DataLoader[Any]:
            return make(data, shuffle=True, generator=torch.Generator().manual_seed(seed))

        self.training, self.plain, self.validation = shuffled(train), shuffled(calibration), make(test)

    @property
    def example(self) -> Tensor:
        """One image, as the model takes it."""
        image: Tensor = self.validation.dataset[0][0]
        return image[None]

    def top1(self) -> Callable[[nn.Module], float]:
        """A metric: the share of the validation images that a model classes rightly."""

        @named("top-1 accuracy [%]")
        def accuracy(model: nn.Module) -> float:
            predicted, labels = self.predicted(model)
            return 100 * float((predicted == labels).double().mean())

        return accuracy

    @torch.no_grad()
    def predicted(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """The class of every validation image that a model says, and the true one."""
        device, found, labels = next(model.parameters()).device, [], []
        with evaluating(model):
            for images, target in self.validation:
                found.append(model(images.to(device)).argmax(1).cpu())
                labels.append(target)
        return torch.cat(found), torch.cat(labels)


def ade20k_names(folder: Path) -> list[str]:
    """The names of the classes, of `objectInfo150.txt` where it is there."""
    file = folder / "objectInfo150.txt"
    if not file.exists():
        return [str(index) for index in range(ADE20K_CLASSES)]
    lines = file.read_text(encoding="utf-8").splitlines()[1:]
    return [line.split("\t")[-1].split(",")[0].strip() for line in lines]


def ade20k(
    folder: Path, seed: int, batch: int, size: tuple[int, int] = (512, 512), workers: int = 0
) -> tuple[Iterable[Any], Callable[[nn.Module], float], Tensor]:
    """ADE20K's challenge of 150 classes: a training loader, the mean IoU of the validation images, an example."""
    parts = {part: _view(folder, part) for part in ADE20K_PARTS}
    make = partial(SegmentationFolder, classes=ADE20K_CLASSES, size=size, first=1)
    loader = DataLoader(
        make(parts["training"], training=True), batch_size=batch, shuffle=True,
        generator=torch.Generator().manual_seed(seed), num_workers=workers,
    )  # fmt: skip
    test = DataLoader(make(parts["validation"]), batch_size=batch, num_workers=workers)
    return loader, scored(test, ADE20K_CLASSES, ade20k_names(folder)), next(iter(test))[0][:1]


def _view(folder: Path, part: str) -> Path:
    """A folder with images/ and labels/, which are ADE20K's own under other names; removed when the process ends."""
    sources = {"images": folder / "images" / part, "labels": folder / "annotations" / part}
    for source in sources.values():
        if not source.is_dir():
            raise SystemExit(f"{folder} is not laid out as ADEChallengeData2016 is: it holds no {source}.")
    view = Path(tempfile.mkdtemp(prefix="ade20k-"))
    atexit.register(shutil.rmtree, view, ignore_errors=True)  # the links, not what they lead to
    for name, source in sources.items():
        (view / name).symlink_to(source.resolve(), target_is_directory=True)
    return view


def scored(data: Iterable[Any], classes: int, names: list[str]) -> Callable[[nn.Module], float]:
    """The mean IoU over some batches; its attribute `by_class` is {class: IoU} of a model, without those not seen."""

    @named("mean IoU [%]")
    def evaluate(model: nn.Module) -> float:
        return mean_iou(model, data, classes)

    def by_class(model: nn.Module) -> dict[str, float]:
        found = class_iou(model, data, classes)
        return {name: value for name, value in zip(names, found, strict=True) if value == value}

    evaluate.by_class = by_class  # type: ignore[attr-defined]
    return evaluate
