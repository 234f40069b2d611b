"""Folders of images on the command line: one folder a class, or images with label maps.

torch and timm are imported inside the functions, so that `cpd --help` answers at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cpd.cli.arguments import parse_numbers
from cpd.errors import InputError
from cpd.tasks.metric import named

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import DataLoader

TRAIN_FOLDERS = ("train", "training")
VALIDATION_FOLDERS = ("val", "validation", "valid", "test")

#: How training images are changed at random.
AUGMENTATIONS = ("none", "light", "imagenet")
#: Of light augmentation: the share of an image that is cut out, its height to its width; factors of label maps.
LIGHT_SCALE, LIGHT_RATIO, LIGHT_SCALES = (0.7, 1.0), (6 / 7, 7 / 6), (0.8, 1.25)

log = logging.getLogger("cpd.cli")


def image_folders(root: Path) -> tuple[Path, Path | None]:
    """The folders of training and validation images under `root`.

    Raises:
        InputError: if `root` is no folder, or holds no folder of images a class.
    """
    if not root.is_dir():
        raise InputError(
            f"--data {root} is not a folder. Pass one that holds train/ and val/, or one folder for each class."
        )
    train = next((root / name for name in TRAIN_FOLDERS if (root / name).is_dir()), None)
    validation = next((root / name for name in VALIDATION_FOLDERS if (root / name).is_dir()), None)
    if train is None and validation is not None:
        raise InputError(f"--data {root} holds {validation.name}/ but no train/ to train on.")
    if train is None:
        train = root
    if not any(item.is_dir() for item in train.iterdir()):
        raise InputError(f"--data: {train} holds no folders of images (one for each class, or images/ and labels/).")
    return train, validation


@dataclass(frozen=True)
class Loaded:
    """A folder of images, as batches.

    Attributes:
        training: batches of training images, augmented.
        plain: batches of the same images as the model meets them in use.
        evaluate: the metric on the validation images; None where there are none.
    """

    training: DataLoader[Any]
    plain: DataLoader[Any]
    evaluate: Callable[[nn.Module], float] | None


@dataclass(frozen=True)
class Images:
    """How images are loaded; checked on construction.

    Attributes:
        folder: holds them; None: there are none.
        batch_size: images a step.
        workers: processes that load images.
        seed: of the order of the images.
        augment: one of `AUGMENTATIONS`.
        auto_augment: a policy of timm beside it.
        random_erasing: chance that a patch of an image is erased.
        mean: of each channel, with commas between; None: the model's own.
        std: likewise.
        model: the name of the model that they are for; that of some libraries reads data by its name.

    Raises:
        InputError: if one of them is not what it may be, or they contradict each other.
    """

    folder: Path | None
    batch_size: int = 64
    workers: int = 0
    seed: int = 0
    augment: str = "none"
    auto_augment: str | None = None
    random_erasing: float = 0.0
    mean: str | None = None
    std: str | None = None
    model: str = ""

    def __post_init__(self) -> None:
        if self.augment not in AUGMENTATIONS:
            raise InputError(f"--augment must be one of {', '.join(AUGMENTATIONS)}; got {self.augment!r}.")
        if self.augment == "none" and self._more:
            raise InputError(
                "--auto-augment and --random-erasing add to an augmentation: use --augment light or imagenet."
            )
        if (self.mean is None) != (self.std is None):
            raise InputError("--mean and --std belong together: pass both, or neither to use the model's own.")
        for name in ("mean", "std"):
            numbers = self._numbers(name)
            if numbers is not None and (len(numbers) not in (1, 3) or (name == "std" and min(numbers) <= 0)):
                wanted = "one number, or three with commas between them" + ", above 0" * (name == "std")
                raise InputError(f"--{name} takes {wanted}, as in 0.485,0.456,0.406; got {getattr(self, name)!r}.")
        if self.by_name and (self._more or self.mean is not None):
            raise InputError(
                "--auto-augment, --random-erasing, --mean and --std do not apply to models of ultralytics."
            )
        if self.folder is not None and not self.by_name:
            image_folders(self.folder)

    @property
    def by_name(self) -> bool:
        """Whether the task of the model reads the data, whose name is given."""
        return self.model.startswith("ultralytics:")

    @property
    def _more(self) -> bool:
        return self.auto_augment is not None or self.random_erasing > 0

    def _numbers(self, name: str) -> list[float] | None:
        given = getattr(self, name)
        return None if given is None else parse_numbers(given, f"--{name}")

    @property
    def have_maps(self) -> bool:
        """Whether there are label maps, rather than a folder a class."""
        from cpd.tasks.segmentation import has_maps

        return self.folder is not None and not self.by_name and has_maps(image_folders(self.folder)[0])

    def load(self, model: nn.Module, example_inputs: Any) -> Loaded:
        """Batches of the images, of the size and the channels of the example inputs, [1, C, H, W].

        Raises:
            InputError: if the model takes no images, or the folders' classes are not the model's or each other's.
        """
        import torch
        from torch.utils.data import DataLoader

        assert self.folder is not None
        if self.by_name:
            return self._read_by_task(model, example_inputs)
        if not isinstance(example_inputs, torch.Tensor) or example_inputs.dim() != 4:
            raise InputError(
                f"--data reads folders of images, but {type(model).__name__} takes other inputs. "
                "Call cpd.compress(model, data=your_loader, loss=…) from Python."
            )
        folders, config = image_folders(self.folder), self._preprocessing(model, example_inputs)
        of = self._maps if self.have_maps else self._classes
        training, plain, validation, evaluate = of(model, folders, example_inputs, config)
        if validation is None:
            return Loaded(self._shuffled(training), self._shuffled(plain), None)
        images: DataLoader[Any] = DataLoader(validation, batch_size=self.batch_size, num_workers=self.workers)
        return Loaded(self._shuffled(training), self._shuffled(plain), partial(evaluate, images=images))

    def _read_by_task(self, model: nn.Module, example_inputs: Tensor) -> Loaded:
        """What the library of the model makes of the data, at the size of the example inputs."""
        from cpd.tasks.yolo import Yolo

        assert self.folder is not None
        task = Yolo(self.batch_size, int(example_inputs.shape[-1]), self.augment != "none", self.workers, self.seed)
        found = task.load(model, str(self.folder))
        plain: Any = found.training if found.plain is None else found.plain
        return Loaded(cast("DataLoader[Any]", found.training), plain, found.evaluate)

    def _preprocessing(self, model: nn.Module, example_inputs: Tensor) -> dict[str, Any]:
        """The arguments of timm's transforms: those given, those of the model's own weights, else ImageNet's."""
        from timm.data import resolve_data_config

        _, channels, height, width = example_inputs.shape
        if channels not in (1, 3):
            raise InputError(f"Image files have 1 or 3 channels, but the model takes {channels}.")
        config: dict[str, Any] = resolve_data_config({"input_size": (channels, height, width)}, model=model)
        own = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
        whose = "the model's own" if "mean" in own else "ImageNet's"
        for name in ("mean", "std"):
            given = self._numbers(name)
            if given is not None:
                whose = "as given"
                if len(given) > channels:
                    raise InputError(f"--{name} holds {len(given)} numbers, but the model takes {channels} channel.")
                config[name] = tuple(given * channels)[:channels]
            elif channels == 1 and len(config[name]) == 3:
                config[name] = (sum(config[name]) / 3,)
        mean, std = (", ".join(f"{number:.3g}" for number in config[name]) for name in ("mean", "std"))
        log.info("Images: %d x %d pixels, mean %s, std %s (%s).", height, width, mean, std, whose)
        return config

    def _classes(
        self, model: nn.Module, folders: tuple[Path, Path | None], example_inputs: Tensor, config: Mapping[str, Any]
    ) -> tuple[Any, Any, Any, Callable[..., float]]:
        """Training images augmented and plain, validation images, and the metric, of a folder a class."""
        from timm.data import create_transform

        plain = create_transform(**config)
        training = plain if self.augment == "none" else create_transform(**config, **self._augmentation())
        mode = "L" if example_inputs.shape[1] == 1 else "RGB"
        augmented = read_classes(folders[0], training, mode)
        _check_classes(model, folders[0], augmented.classes, example_inputs)
        validation = None if folders[1] is None else read_classes(folders[1], plain, mode)
        if validation is not None and validation.classes != augmented.classes:
            raise InputError(f"{folders[0]} and {folders[1]} hold different classes: their folders' names differ.")
        return augmented, replace(augmented, transform=plain), validation, accuracy

    def _augmentation(self) -> dict[str, Any]:
        """Arguments of `timm.data.create_transform` for training images."""
        more = {"is_training": True, "auto_augment": self.auto_augment, "re_prob": self.random_erasing}
        if self.augment == "imagenet":
            return more
        return {**more, "scale": LIGHT_SCALE, "ratio": LIGHT_RATIO, "color_jitter": None}

    def _maps(
        self, model: nn.Module, folders: tuple[Path, Path | None], example_inputs: Tensor, config: Mapping[str, Any]
    ) -> tuple[Any, Any, Any, Callable[..., float]]:
        """Training images augmented and plain, validation images, and the metric, of images with label maps."""
        import torch

        from cpd.model.inputs import evaluating, logits
        from cpd.tasks.segmentation import SCALES, SegmentationFolder

        if self._more:
            raise InputError(
                "--auto-augment and --random-erasing apply to folders of classes, not to label maps: leave them out."
            )
        with torch.no_grad(), evaluating(model):
            shape = logits(model(example_inputs)).shape
        if len(shape) != 4:
            raise InputError(
                f"{folders[0]} holds label maps, but the output of the model is not a map of classes: its shape is "
                f"{list(shape)}."
            )
        size = (int(example_inputs.shape[2]), int(example_inputs.shape[3]))

        def maps(folder: Path, augment: str) -> SegmentationFolder:
            return SegmentationFolder(
                folder, shape[1], size, training=augment != "none", mean=config["mean"], std=config["std"],
                scales=SCALES if augment == "imagenet" else LIGHT_SCALES,
            )  # fmt: skip

        validation = None if folders[1] is None else maps(folders[1], "none")
        evaluate = partial(overlap, classes=shape[1])
        return maps(folders[0], self.augment), maps(folders[0], "none"), validation, evaluate

    def _shuffled(self, dataset: Any) -> DataLoader[Any]:
        """Batches in a new order each time; without the rest that would make a small batch."""
        import torch
        from torch.utils.data import DataLoader

        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=True,
            num_workers=self.workers,
            drop_last=len(dataset) > self.batch_size,
            generator=torch.Generator().manual_seed(self.seed),
        )


@dataclass(frozen=True)
class ClassFolder:
    """Images of one folder a class, and the numbers of their classes.

    Attributes:
        samples: (file, number of its class).
        classes: {folder: number of the class}.
        transform: from a PIL image to a tensor.
        mode: what PIL converts an image to: "RGB" or "L".
    """

    samples: Sequence[tuple[str, int]]
    classes: Mapping[str, int]
    transform: Callable[[Any], Tensor]
    mode: str

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image and its class; raises `InputError` if it cannot be read."""
        from cpd.tasks.segmentation import opened

        path, label = self.samples[index]
        return self.transform(opened(path, self.mode)), label


def read_classes(folder: Path, transform: Callable[[Any], Tensor], mode: str) -> ClassFolder:
    """The images of a folder, one folder a class, as timm numbers them.

    Raises:
        InputError: if it holds no images, or of one class only.
    """
    from timm.data import create_dataset

    try:
        reader = create_dataset("", root=str(folder), search_split=False).reader
    except RuntimeError as error:
        raise InputError(f"{folder} holds no images that can be read: {error}") from error
    if len(reader.class_to_idx) < 2:
        raise InputError(
            f"{folder} holds images of only one class ({', '.join(reader.class_to_idx)}/): it must hold one folder for "
            "each class, and at least two classes."
        )
    return ClassFolder(tuple(reader.samples), dict(reader.class_to_idx), transform, mode)


def _check_classes(model: nn.Module, folder: Path, found: Mapping[str, int], example_inputs: Tensor) -> None:
    """Labels are numbered by folder; they mean something to the model only if it has as many outputs."""
    import torch

    from cpd.model.inputs import logits

    with torch.no_grad():
        outputs = logits(model(example_inputs)).shape[1]
    classes = len(found)
    if classes != outputs:
        raise InputError(
            f"{folder} holds {classes} classes (folders), but the model has {outputs} outputs. Pass a model trained on "
            "these classes, as package.module:factory."
        )


def each_right(model: nn.Module, images: Iterable[Any]) -> Tensor:
    """`[N]`: 100 for each image whose highest logit is the label's, else 0; the model's mode is left as found."""
    import torch

    from cpd.model.inputs import batches, device_of, evaluating, logits, move

    device, right = device_of(model), []
    with torch.no_grad(), evaluating(model):
        for batch in batches(images):
            predicted = logits(batch.to(device).on(model)).argmax(1)
            right.append((predicted == move(batch.target, device)).cpu())
    return 100.0 * torch.cat(right)


@named("top-1 accuracy [%]", each=each_right)
def accuracy(model: nn.Module, images: Iterable[Any]) -> float:
    """Per cent of the images whose highest logit is the label's; the model's mode is left as found."""
    right = each_right(model, images) > 0
    return 100 * int(right.sum()) / len(right)


@named("mean IoU [%]")
def overlap(model: nn.Module, images: Iterable[Any], classes: int) -> float:
    """`cpd.tasks.segmentation.mean_iou`, which is loaded when it is called."""
    from cpd.tasks.segmentation import mean_iou

    return mean_iou(model, images, classes)
