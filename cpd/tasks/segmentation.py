"""Segmentation: folders of images with label maps, the mean intersection over union, and an encoder-decoder.

    train/images/0001.jpg   train/labels/0001.png      a label map holds the class of every pixel, from 0
    val/images/…            val/labels/…

Distill with `kd="cwd"`; the loss inferred is cross-entropy over pixels, those of class -100 left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from cpd.errors import InputError, first_line, needs_extra, of_the_user
from cpd.model.arguments import DATA, MODEL
from cpd.model.inputs import batches, device_of, evaluating, logits
from cpd.options import FLAG, PATH, Check, checked, integer, number, several, shown, text
from cpd.tasks.loss import IGNORED_CLASS
from cpd.tasks.metric import named

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: Training images are scaled by a factor of this range before they are cropped.
SCALES = (0.5, 2.0)


#: Where images with label maps lie.
IMAGES, LABELS = "images", "labels"


def _three_of(check: Check) -> Check:
    return several(check.accepts, f"three numbers, each {check.wanted}", 3)


_CLASSES, _SEVERAL, _PIXELS = integer(1, 65536), integer(2, 65536), integer(1, 65536)
_SIZE = several(_PIXELS.accepts, "two integers of pixels, (height, width)", 2)
_MEAN = _three_of(number("from -1000 to 1000", lambda value: abs(value) <= 1000))
_POSITIVE = number("above 0", lambda value: value > 0)
_STD = _three_of(_POSITIVE)
_FIRST = integer(0, 255)
_SCALES = several(_POSITIVE.accepts, "two numbers above 0, the least and the largest factor", 2)


@checked(folder=PATH)
def has_maps(folder: Path) -> bool:
    """Whether a folder holds images with label maps."""
    folder = Path(folder)
    return (folder / IMAGES).is_dir() and (folder / LABELS).is_dir()


class SegmentationFolder(Dataset[tuple[Tensor, Tensor]]):
    """Images and their label maps: `[3, H, W]`, normalised, and `[H, W]` of int64, -100 where not of a class.

    Args:
        root: holds `images` and `labels` with files of the same stem.
        classes: how many there are; higher labels (void) are ignored.
        size: (H, W) in pixels that images are brought to.
        training: scale, crop and mirror at random.
        mean: of each channel, for the normalisation.
        std: likewise.
        scales: range of the factor by which training images are scaled.
        first: the label of the first class, where those below it are of none: 1 for ADE20K.

    Raises:
        InputError: if a folder is missing or empty, or an image has no label map.
    """

    @checked(
        root=PATH,
        classes=_CLASSES,
        size=_SIZE,
        training=FLAG,
        mean=_MEAN,
        std=_STD,
        scales=_SCALES,
        first=integer(0, 255),
    )
    def __init__(
        self,
        root: Path,
        classes: int,
        size: tuple[int, int],
        *,
        training: bool = False,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        scales: tuple[float, float] = SCALES,
        first: int = 0,
    ) -> None:
        from torchvision.transforms import v2

        root, size = Path(root), (int(size[0]), int(size[1]))
        if not has_maps(root):
            raise InputError(f"{root} holds no folders {IMAGES}/ and {LABELS}/.")
        labels = {path.stem: path for path in sorted((root / LABELS).iterdir())}
        self.images = [path for path in sorted((root / IMAGES).iterdir()) if not path.name.startswith(".")]
        missing = [path.name for path in self.images if path.stem not in labels]
        if missing or not self.images:
            raise InputError(f"{root / IMAGES} holds {len(self.images)} images; without label maps: {missing[:3]}.")
        self.labels = [labels[path.stem] for path in self.images]
        self.classes, self.first = classes, first
        crop = [
            v2.ScaleJitter(size, scales),
            v2.RandomCrop(size, pad_if_needed=True, fill={_mask(): IGNORED_CLASS, "others": 0}),
            v2.RandomHorizontalFlip(),
        ]
        plain = [v2.Resize(size)]
        normal = [v2.ToDtype({_image(): torch.float32, "others": None}, scale=True), v2.Normalize(mean, std)]
        self.transform = v2.Compose([*(crop if training else plain), *normal])

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One image and its labels."""
        pixels = torch.from_numpy(np.array(opened(self.images[index], "RGB"))).permute(2, 0, 1)
        labels = torch.from_numpy(np.array(opened(self.labels[index]))).long()
        if labels.shape != pixels.shape[1:]:
            raise InputError(
                f"{self.labels[index]} is no label map of {self.images[index]}: a number a pixel is wanted, "
                f"{list(pixels.shape[1:])}; it holds {list(labels.shape)}."
            )
        labels = labels - self.first
        labels = labels.where((labels >= 0) & (labels < self.classes), IGNORED_CLASS)
        image, target = self.transform(_image()(pixels), _mask()(labels))
        return image.as_subclass(Tensor), target.as_subclass(Tensor).long()


def opened(path: str | Path, mode: str | None = None) -> Image.Image:
    """An image file, in a mode of PIL if one is given.

    Raises:
        InputError: if it cannot be read.
    """
    try:
        with Image.open(path) as file:
            return file.copy() if mode is None else file.convert(mode)
    except Exception as error:  # PIL's plugins raise whatever they like
        raise InputError(f"{path} cannot be read as an image: {first_line(error)}. Repair or remove it.") from error


@named("mean IoU [%]")
@checked(model=MODEL, data=DATA, classes=_SEVERAL)
def mean_iou(model: nn.Module, data: Iterable[Any], classes: int) -> float:
    """The mean over classes of the intersection over union of predicted and true pixels, in per cent.

    Args:
        model: gives logits `[N, classes, H, W]`, or a mapping that holds them as "out".
        data: batches of images and label maps; pixels labelled -100 are left out.
        classes: how many there are; those that neither occur nor are predicted are left out of the mean.
    """
    return 100 * float(_jaccard(model, data, classes).compute())


@checked(model=MODEL, data=DATA, classes=_SEVERAL)
def class_iou(model: nn.Module, data: Iterable[Any], classes: int) -> list[float]:
    """The intersection over union of each class, in per cent; NaN for one that neither occurs nor is predicted.

    Args:
        model: as for `mean_iou`, which is the mean of those that are numbers.
        data: likewise.
        classes: how many there are.
    """
    pixels = _jaccard(model, data, classes).confmat.double()
    both = pixels.diagonal()
    found: list[float] = (100 * both / (pixels.sum(0) + pixels.sum(1) - both)).tolist()
    return found


def _jaccard(model: nn.Module, data: Iterable[Any], classes: int) -> Any:
    """The metric, of all predicted and true pixels."""
    with needs_extra("segmentation", "The mean intersection over union"):
        from torchmetrics.classification import MulticlassJaccardIndex

    device = device_of(model)
    metric = MulticlassJaccardIndex(classes, ignore_index=IGNORED_CLASS).to(device)
    with torch.no_grad(), evaluating(model):
        for batch in batches(data):
            batch = batch.to(device)
            predicted = logits(batch.on(model)).argmax(1)
            if not isinstance(batch.target, Tensor) or batch.target.shape != predicted.shape:
                raise InputError(
                    f"The label maps of {batch.place} must be a tensor of shape {list(predicted.shape)}, as what the "
                    f"model predicts; they are {shown(getattr(batch.target, 'shape', batch.target))}."
                )
            metric.update(predicted, batch.target)
    return metric


class EncoderDecoder(nn.Module):
    """A backbone of timm and a top-down decoder: each stage's features brought to one width, the deeper added.

    Args:
        backbone: name of a timm model that gives feature maps.
        classes: of the logits.
        width: channels of the decoder.
        pretrained: whether the backbone's weights are timm's.

    Its forward takes images `[N, 3, H, W]` and gives logits `[N, classes, H, W]`.
    """

    @checked(backbone=text("the name of a timm model"), classes=_CLASSES, width=integer(1, 65536), pretrained=FLAG)
    def __init__(self, backbone: str, classes: int, width: int = 64, *, pretrained: bool = False) -> None:
        import timm

        super().__init__()
        with of_the_user("timm", f"for the backbone {backbone!r}"):
            self.encoder = timm.create_model(backbone, pretrained=pretrained, features_only=True)
        channels = self.encoder.feature_info.channels()[1:]
        self.lateral = nn.ModuleList(nn.Conv2d(count, width, 1) for count in channels)
        self.smooth = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits at the size of the images."""
        found: Tensor | None = None
        for lateral, features in reversed(list(zip(self.lateral, self.encoder(x)[1:], strict=True))):
            y = lateral(features)
            found = y if found is None else y + F.interpolate(found, y.shape[-2:], mode="bilinear")
        assert found is not None
        return F.interpolate(self.head(self.smooth(found)), x.shape[-2:], mode="bilinear")


def _image() -> Any:
    from torchvision.tv_tensors import Image as ImageTensor

    return ImageTensor


def _mask() -> Any:
    from torchvision.tv_tensors import Mask

    return Mask
