"""Models of ultralytics (YOLO, RT-DETR): their data files, their own losses, their raw predictions, their own mAP.

    result = cpd.compress("ultralytics:yolo11n.pt", target_speedup=1.5, data="coco8.yaml")
    small = cpd.tasks.yolo.as_yolo(result.model)      # an ultralytics YOLO: train, val, predict, export, save

ultralytics is imported inside the functions: whoever has such a model has installed it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cpd.errors import InputError, first_line
from cpd.model.arguments import MODEL
from cpd.model.inputs import Call, device_of
from cpd.model.outputs import Outputs
from cpd.model.randomness import random_states_kept
from cpd.options import FLAG, PATH, checked, instance, integer
from cpd.tasks.metric import named
from cpd.tasks.task import DataName, Loaded, Task

#: Raw predictions of a head, [N, channels, locations], in the order in which they are distilled.
PREDICTIONS = ("boxes", "scores", "mask_coefficient", "angle", "kpts")
#: Names of the metrics of ultralytics, the preferred first: for keypoints, masks, boxes, classes.
METRICS = ("metrics/mAP50-95(P)", "metrics/mAP50-95(M)", "metrics/mAP50-95(B)", "metrics/accuracy_top1", "metrics/mIoU")
IMAGE_SIZE = 640

_TRAINER = instance(type, "a trainer class of ultralytics, as ultralytics.models.yolo.detect.DetectionTrainer")


@dataclass(frozen=True)
class Yolo(Task):
    """Models of ultralytics: detection, segmentation, poses, oriented boxes, classification.

    Data is the name of a data file of ultralytics ("coco8.yaml"; for classification, a folder), or batches as its
    loaders return them. The loss is the model's own, with the weights of its parts in `model.args`; a student imitates
    the raw predictions at every location.

    Args:
        batch_size: Number of images in a batch.
        imgsz: Height and width of the images in pixels. Default: the size that the model was trained with, else 640.
        augment: Whether training images are augmented as ultralytics does.
        workers: Number of processes that load images.
        seed: Seed of the order of the images.

    Examples:
        >>> task = cpd.tasks.yolo.Yolo(batch_size=8, imgsz=320)
        >>> task.imgsz
        320
    """

    batch_size: int = 16
    imgsz: int | None = None
    augment: bool = True
    workers: int = 0
    seed: int = 0
    name: ClassVar[str] = "ultralytics"

    def __post_init__(self) -> None:
        """Check every argument."""
        integer(1).demand("batch_size", self.batch_size)
        integer(32, 8192).demand("imgsz", self.imgsz, optional=True)
        FLAG.demand("augment", self.augment)
        integer(0).demand("workers", self.workers)

    def read(self, model: nn.Module, item: Any) -> Any:
        """Turn a batch of a loader of ultralytics into (images between 0 and 1, all other tensors of the batch)."""
        if not isinstance(item, Mapping) or "img" not in item:
            return item
        images = item["img"]
        images = images.float() / 255 if images.dtype is torch.uint8 else images
        return images, {name: value for name, value in item.items() if name != "img" and isinstance(value, Tensor)}

    def learn(self, model: nn.Module, call: Call, target: Any) -> tuple[Any, Tensor | None]:
        """The output, and the model's own loss: the sum of its parts, averaged over the images."""
        if not isinstance(target, Mapping):
            return call.on(model), None
        images = call.args[0]
        with _own_arguments(model):
            if _chooses_queries(model):  # trained with noisy boxes among its queries, which its own loss makes
                before = dict(vars(model))
                try:
                    loss, _ = cast(Any, model).loss({**target, "img": images})
                finally:
                    vars(model).clear()
                    vars(model).update(before)
                return None, loss.sum()
            output = call.on(model)
            loss, _ = cast(Any, model).init_criterion()(output, {**target, "img": images})
        return output, loss.sum() / (1 if loss.dim() == 0 else len(images))

    def outputs(self, model: nn.Module) -> Outputs:
        """The raw predictions, in train and in eval mode, without the lists of features beside them."""
        return raw_predictions

    def training(self, model: nn.Module) -> Mapping[str, Any]:
        """Channel-wise distillation of the predictions, which suits sparse objects; of logits for a classifier."""
        if _chooses_queries(model):
            return {"kd": "none", "optimizer": "adamw", "lr": 1e-4}
        return {} if _kind(model) == "classify" else {"kd": "cwd"}

    def example_inputs(self, model: nn.Module) -> Any:
        """One image of the size that the task uses."""
        first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        size = self._size(model)
        images = torch.rand(1, first.in_channels, size, size, generator=torch.Generator().manual_seed(0))
        return images.to(device_of(model))

    def load(self, model: nn.Module, data: DataName) -> Loaded:
        """Load the images of a data file of ultralytics, with and without augmentation, and the model's own metric.

        Raises:
            InputError: if there is no such file, or its classes are not the model's.
        """
        from ultralytics.cfg import get_cfg

        settings = get_cfg(
            overrides={
                "task": _kind(model), "imgsz": self._size(model), "batch": self.batch_size, "data": os.fspath(data),
                "workers": self.workers,
            }
        )  # fmt: skip
        with _quiet():
            found = _described(settings)
            classes = len(found["names"])
            own = _classes(model)
            if own is not None and own != classes:
                raise InputError(
                    f"{os.fspath(data)} has {classes} classes, the model {own}: build one of as many (nc={classes}), "
                    "and train it first."
                )
            training = self._loader(model, settings, found, "train" if self.augment else "val")
            plain = self._loader(model, settings, found, "val") if self.augment else training
        return Loaded(training, plain, self._metric(model, os.fspath(data)) if found.get("val") else None)

    def _loader(self, model: nn.Module, settings: Any, found: dict[str, Any], mode: str) -> DataLoader[Any]:
        """Shuffled batches of the training images, augmented in the mode "train"."""
        stride = max(int(cast(Any, model).stride.max()), 32)
        if settings.task == "classify":
            from ultralytics.data import ClassificationDataset

            dataset: Any = ClassificationDataset(found["train"], settings, augment=mode == "train")
            collate = None
        else:
            from ultralytics.data.build import build_yolo_dataset

            dataset = build_yolo_dataset(
                settings, found["train"], self.batch_size, found, mode=mode, rect=False, stride=stride
            )
            collate = dataset.collate_fn
        return DataLoader(
            dataset, self.batch_size, shuffle=True, num_workers=self.workers, collate_fn=collate,
            drop_last=len(dataset) > self.batch_size, generator=torch.Generator().manual_seed(self.seed),
        )  # fmt: skip

    def _metric(self, model: nn.Module, data: str) -> Any:
        """The metric that `YOLO.val` computes, in per cent."""
        name = "top-1 accuracy [%]" if _kind(model) == "classify" else "mAP50-95 [%]"

        @named(name)
        def evaluate(model: nn.Module) -> float:
            return validated(model, data, self._size(model), self.batch_size)

        return evaluate

    def _size(self, model: nn.Module) -> int:
        given = getattr(model, "args", None)
        given = given.get("imgsz") if isinstance(given, Mapping) else getattr(given, "imgsz", None)
        usual = 224 if _kind(model) == "classify" else IMAGE_SIZE
        if self.imgsz is not None:
            return self.imgsz
        return given if isinstance(given, int) and _kind(model) != "classify" else usual


# ---------------------------------------------------------------------------------- outputs


def raw_predictions(output: Any) -> Any:
    """The predictions of a model of ultralytics before they are decoded, in train mode and in eval mode.

    They are [N, channels, locations], followed by the prototypes of masks if the model has any. A classifier returns
    its logits.
    """
    if isinstance(output, (tuple, list)) and len(output) == 2 and isinstance(output[1], (Mapping, Tensor)):
        output = output[1]
    if not isinstance(output, Mapping):
        return output
    heads = [output[name] for name in ("one2many", "one2one") if isinstance(output.get(name), Mapping)] or [output]
    parts = [head[name] for head in heads for name in PREDICTIONS if isinstance(head.get(name), Tensor)]
    others = [value for head in heads for name, value in head.items() if name == "proto" and isinstance(value, Tensor)]
    found = torch.cat(parts, 1)
    return (found, *others) if others else found


def _kind(model: nn.Module) -> str:
    """detect, segment, pose, obb or classify, as ultralytics calls it."""
    from ultralytics.nn.tasks import guess_model_task

    return str(getattr(model, "task", None) or guess_model_task(model))


def _classes(model: nn.Module) -> int | None:
    """How many classes the model has."""
    head: Any = getattr(model, "model", [None])[-1]
    return next((found for found in (getattr(head, "nc", None),) if isinstance(found, int)), None)


def _chooses_queries(model: nn.Module) -> bool:
    """Whether a model chooses queries for objects, as RT-DETR does; a student chooses others than its teacher."""
    from ultralytics.nn.tasks import RTDETRDetectionModel

    return isinstance(model, RTDETRDetectionModel)


@contextlib.contextmanager
def _own_arguments(model: Any) -> Iterator[None]:
    """A `with` block in which `model.args` has attributes, as losses need it; an untrained model holds a dict."""
    from ultralytics.cfg import get_cfg
    from ultralytics.utils import DEFAULT_CFG_DICT

    before = getattr(model, "args", None)
    if before is None or isinstance(before, Mapping):
        known = {name: value for name, value in (before or {}).items() if name in DEFAULT_CFG_DICT}
        model.args = get_cfg(overrides=known)
    try:
        yield
    finally:
        model.args = before


# ---------------------------------------------------------------------------------- data and metric


def _described(settings: Any) -> dict[str, Any]:
    """The content of a data file, after a check that its images exist."""
    from ultralytics.data.utils import check_cls_dataset, check_det_dataset

    check = check_cls_dataset if settings.task == "classify" else check_det_dataset
    try:
        return dict(check(settings.data))
    except (Exception, SystemExit) as error:  # of ultralytics, its downloads, the disk
        raise InputError(f"ultralytics cannot read the data {settings.data!r}: {first_line(error)}.") from error


@checked(model=MODEL, data=PATH, imgsz=integer(32, 8192), batch=integer(1))
def validated(model: nn.Module, data: str, imgsz: int = IMAGE_SIZE, batch: int = 16) -> float:
    """The metric of ultralytics' own validator, in per cent: mAP50-95 of keypoints, masks or boxes, or accuracy.

    Args:
        model: A model of ultralytics. It is not changed.
        data: Name of a data file.
        imgsz: Height and width of the images in pixels.
        batch: Number of images in a batch.
    """
    with tempfile.TemporaryDirectory() as folder, _quiet(), random_states_kept():
        found = as_yolo(deepcopy(model).float()).val(
            data=data, imgsz=imgsz, batch=batch, plots=False, verbose=False, workers=0, project=folder, name="val",
            device=str(device_of(model)),
        )  # fmt: skip
    results = found.results_dict
    return 100 * float(next(results[name] for name in METRICS if name in results))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A `with` block without output of ultralytics; torch's number of threads, which it sets, is restored."""
    from ultralytics.utils import LOGGER

    level, shown, threads = LOGGER.level, os.environ.get("YOLO_VERBOSE"), torch.get_num_threads()
    LOGGER.setLevel(logging.ERROR)
    try:
        yield
    finally:
        LOGGER.setLevel(level)
        torch.set_num_threads(threads)
        if shown is not None:
            os.environ["YOLO_VERBOSE"] = shown


# ---------------------------------------------------------------------------------- back to ultralytics


@checked(model=MODEL)
def as_yolo(model: nn.Module) -> Any:
    """A compressed model as an `ultralytics.YOLO` (or `RTDETR`): train, val, predict, export, save.

    Its trainer keeps the model, whereas that of a `YOLO` opened from a file would build the unpruned model again from
    its description. `save("small.pt")` writes a file that `YOLO("small.pt")` opens.

    Args:
        model: A model of ultralytics, such as `result.model`. It is not copied.
    """
    from ultralytics import RTDETR, YOLO
    from ultralytics.utils import callbacks

    kind: Any = RTDETR if _chooses_queries(model) else YOLO

    class Compressed(kind):  # type: ignore[misc]
        """The same, with a trainer that keeps the model."""

        def _smart_load(self, key: str) -> Any:
            found = super()._smart_load(key)
            return keeping(found) if key == "trainer" else found

    opened = Compressed.__new__(Compressed)
    nn.Module.__init__(opened)
    name = str((getattr(model, "yaml", None) or {}).get("yaml_file") or "model.yaml")
    for key, value in {
        "callbacks": callbacks.get_default_callbacks(), "predictor": None, "model": model, "trainer": None,
        "ckpt": {"model": model}, "cfg": None, "ckpt_path": None, "metrics": None, "task": _kind(model),
        "overrides": {"model": name, "task": _kind(model)}, "model_name": name,
    }.items():  # fmt: skip
        setattr(opened, key, value)
    if "training" in vars(opened):
        del opened.training  # of the model within
    return opened


@checked(trainer=_TRAINER)
def keeping(trainer: type) -> type:
    """Derive a trainer class that trains the model it is given, rather than building one from its description.

    For a compressed model from a file: `YOLO("small.pt").train(trainer=cpd.tasks.yolo.keeping(DetectionTrainer), …)`.

    Args:
        trainer: A trainer class such as `ultralytics.models.yolo.detect.DetectionTrainer`.
    """

    def get_model(self: Any, cfg: Any = None, weights: nn.Module | None = None, verbose: bool = True) -> nn.Module:
        if not isinstance(weights, nn.Module):
            found: nn.Module = trainer.get_model(self, cfg, weights, verbose)  # type: ignore[attr-defined]
            return found
        classes, own = self.data.get("nc"), _classes(weights)
        if own is not None and classes is not None and own != classes:
            raise InputError(
                f"The data has {classes} classes, the compressed model {own}: its head was trained for those. Train a "
                "model of as many classes, and compress that."
            )
        for parameter in weights.parameters():
            parameter.requires_grad_(True)
        return weights.float().train()

    return type(trainer.__name__, (trainer,), {"get_model": get_model, "__doc__": trainer.__doc__})
