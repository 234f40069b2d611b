"""Folders of images on the command line: one folder a class, or images with label maps.

torch and timm are imported inside the functions, so that `cpd --help` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpd.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import DataLoader

TRAIN_FOLDERS = ("train", "training")
VALIDATION_FOLDERS = ("val", "validation", "valid", "test")


def image_folders(root: Path) -> tuple[Path, Path | None]:
    """The folders of training and validation images under `root`.

    Raises:
        InputError: if `root` is no folder, or holds no folder of images a class.
    """
    if not root.is_dir():
        raise InputError(f"--data {root} is not a folder. Give one that holds train/ and val/, or a folder a class.")
    train = next((root / name for name in TRAIN_FOLDERS if (root / name).is_dir()), None)
    validation = next((root / name for name in VALIDATION_FOLDERS if (root / name).is_dir()), None)
    if train is None and validation is not None:
        raise InputError(f"--data {root} holds {validation.name}/ but no train/ to train on.")
    if train is None:
        train = root
    if not any(item.is_dir() for item in train.iterdir()):
        raise InputError(f"--data: {train} holds no folders, one a class, of images, nor images/ and labels/.")
    return train, validation


def load_folder(
    model: nn.Module, folders: tuple[Path, Path | None], example_inputs: Any, **loading: Any
) -> tuple[DataLoader[Any], Callable[[nn.Module], float] | None]:
    """`load_maps` where there are label maps, else `load_images`; arguments and errors are theirs."""
    from cpd.segmentation import has_maps

    load = load_maps if has_maps(folders[0]) else load_images
    return load(model, folders, example_inputs, **loading)


def load_images(
    model: nn.Module,
    folders: tuple[Path, Path | None],
    example_inputs: Any,
    *,
    batch_size: int,
    workers: int,
    seed: int,
    augmentation: Mapping[str, Any] | None = None,
) -> tuple[DataLoader[Any], Callable[[nn.Module], float] | None]:
    """A loader of the training images, and the accuracy on the validation images where there are any.

    Args:
        model: names its own preprocessing, if it is timm's; ImageNet's otherwise.
        folders: of training and of validation images.
        example_inputs: [1, C, H, W], the size that images are brought to.
        batch_size: images a step.
        workers: processes that load images.
        seed: of the order of the images.
        augmentation: further arguments of `timm.data.create_transform` for the training images.

    Raises:
        InputError: if the model takes no images, or the folders' classes are not the model's or not each other's.
    """
    import torch
    from torch.utils.data import DataLoader

    if not isinstance(example_inputs, torch.Tensor) or example_inputs.dim() != 4:
        raise InputError(
            f"--data reads folders of images for classifiers; {type(model).__name__} takes something else. "
            "Call cpd.compress(model, data=your_loader, loss=…) from Python."
        )

    training = _dataset(model, folders[0], example_inputs, is_training=True, **(augmentation or {}))
    _check_classes(model, folders[0], training, example_inputs)
    loader = _shuffled(training, batch_size, workers, seed)
    if folders[1] is None:
        return loader, None
    validation = _dataset(model, folders[1], example_inputs)
    if validation.reader.class_to_idx != training.reader.class_to_idx:
        raise InputError(f"{folders[0]} and {folders[1]} hold different classes (folder names).")
    images: DataLoader[Any] = DataLoader(validation, batch_size=batch_size, num_workers=workers)
    return loader, lambda candidate: accuracy(candidate, images)


def load_maps(
    model: nn.Module,
    folders: tuple[Path, Path | None],
    example_inputs: Any,
    *,
    batch_size: int,
    workers: int,
    seed: int,
) -> tuple[DataLoader[Any], Callable[[nn.Module], float] | None]:
    """A loader of the training images with their label maps, and the mean IoU on the validation images, if any.

    Args:
        model: gives logits `[1, classes, H, W]` of the example inputs; labels from `classes` on are ignored.
        folders: as for `load_images`, each with images/ and labels/.
        example_inputs: [1, 3, H, W], the size that images are brought to.
        batch_size: images a step.
        workers: processes that load images.
        seed: of the order of the images.

    Raises:
        InputError: if the model gives no maps of classes, or a folder is not complete.
    """
    import torch
    from torch.utils.data import DataLoader

    from cpd.model.inputs import evaluating, logits
    from cpd.segmentation import SegmentationFolder, mean_iou

    with torch.no_grad(), evaluating(model):
        shape = logits(model(example_inputs)).shape
    if len(shape) != 4:
        raise InputError(f"{folders[0]} holds label maps, but the model gives {list(shape)}, no map of classes.")
    from timm.data import resolve_data_config

    config = resolve_data_config({"input_size": tuple(example_inputs.shape[1:])}, model=model)
    size = (int(example_inputs.shape[2]), int(example_inputs.shape[3]))

    def maps(folder: Path, training: bool) -> SegmentationFolder:
        return SegmentationFolder(folder, shape[1], size, training=training, mean=config["mean"], std=config["std"])

    training = maps(folders[0], True)
    loader = _shuffled(training, batch_size, workers, seed)
    if folders[1] is None:
        return loader, None
    images: DataLoader[Any] = DataLoader(maps(folders[1], False), batch_size=batch_size, num_workers=workers)
    return loader, lambda candidate: mean_iou(candidate, images, shape[1])


def _shuffled(dataset: Any, batch_size: int, workers: int, seed: int) -> DataLoader[Any]:
    """Batches of training images in a new order each time; without the rest that would make a small batch."""
    import torch
    from torch.utils.data import DataLoader

    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=True,
        num_workers=workers,
        drop_last=len(dataset) > batch_size,
        generator=torch.Generator().manual_seed(seed),
    )


def _dataset(model: nn.Module, folder: Path, example_inputs: Tensor, **transform: Any) -> Any:
    """A folder of images through timm's reader and transforms."""
    from timm.data import create_dataset, create_transform, resolve_data_config

    channels = example_inputs.shape[1]
    if channels not in (1, 3):
        raise InputError(f"Image files have 1 or 3 channels, the model takes {channels}.")
    config = resolve_data_config({"input_size": tuple(example_inputs.shape[1:])}, model=model)
    if channels == 1 and len(config["mean"]) == 3:
        config |= {key: (sum(config[key]) / 3,) for key in ("mean", "std")}
    mode = "L" if channels == 1 else "RGB"
    try:
        dataset = create_dataset("", root=str(folder), search_split=False, input_img_mode=mode)
    except RuntimeError as error:
        raise InputError(f"{folder} holds no images that can be read: {error}") from error
    dataset.transform = create_transform(**config, **transform)
    return dataset


def _check_classes(model: nn.Module, folder: Path, dataset: Any, example_inputs: Tensor) -> None:
    """Labels are numbered by folder; they mean something to the model only if it has as many outputs."""
    import torch

    from cpd.model.inputs import logits

    with torch.no_grad():
        outputs = logits(model(example_inputs)).shape[1]
    classes = len(dataset.reader.class_to_idx)
    if classes != outputs:
        raise InputError(
            f"{folder} holds {classes} classes (folders), the model has {outputs} outputs. Give a model trained on "
            "these classes, as package.module:factory."
        )


def accuracy(model: nn.Module, images: Iterable[Any]) -> float:
    """Share of the images [0 to 1] whose highest logit is the label's; the model's mode is left as found."""
    import torch

    from cpd.model.inputs import batches, device_of, evaluating, logits, move

    device, right, total = device_of(model), 0, 0
    with torch.no_grad(), evaluating(model):
        for batch in batches(images):
            target = batch.target
            predicted = logits(batch.to(device).on(model)).argmax(1)
            right += int((predicted == move(target, device)).sum())
            total += len(target)
    return right / total
