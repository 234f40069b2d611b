"""Detectors of torchvision: their own losses, raw predictions to mimic, mean average precision.

A detector returns losses in train mode and boxes in eval mode, and neither can be compared with a teacher's. So a
student imitates the predictions at every location, before boxes are selected, and learns from the detector's own
losses, during which norms keep their mode. Latencies are of the same part of the model, without the selection of boxes,
which pruning does not change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpd.errors import InputError, needs_extra
from cpd.model.arguments import DATA, MODEL
from cpd.model.inputs import Call, device_of, evaluating, move
from cpd.options import checked
from cpd.tasks.metric import named
from cpd.tasks.task import Task, as_itself

#: Where classes of detectors, of their heads and of their proposals lie.
_LIBRARY = "torchvision.models.detection"
#: The parts of a second stage, by their names in torchvision.
STAGES = ("box", "mask", "keypoint")
#: The boxes for which the second stage is evaluated, relative to the image: the whole, its quarters, its center.
PLACES = (
    (0, 0, 1, 1),
    (0, 0, 0.5, 0.5),
    (0.5, 0, 1, 0.5),
    (0, 0.5, 0.5, 1),
    (0.5, 0.5, 1, 1),
    (0.25, 0.25, 0.75, 0.75),
)


class Detection(Task):
    """Detectors of torchvision: Faster R-CNN, Mask R-CNN, Keypoint R-CNN, RetinaNet, FCOS, SSD.

    Batches are (images, targets) as torchvision's references collate them: images `[3, H, W]` in a list, tuple or
    tensor, and a dict of "boxes" `[boxes, 4]` in pixels and "labels" `[boxes]` for each. Images of several sizes are
    padded to the largest, at the right and below, where boxes stay as they are.
    """

    name: ClassVar[str] = "torchvision detection"

    def read(self, model: nn.Module, item: Any) -> Any:
        """Put the images into one tensor, `[N, 3, H, W]`, beside a list of targets."""
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise InputError(
                f"A batch of a detector is (images, targets), in lists; the loader gave {type(item).__name__}."
            )
        images, targets = item
        return (padded(images),), None if targets is None else list(targets)

    def learn(self, model: nn.Module, call: Call, target: Any) -> tuple[Any, Tensor | None]:
        """The raw predictions, and the sum of the model's own losses; norms and dropout keep their mode."""
        images = list(call.args[0])
        output = raw_predictions(model, call.args[0])
        if target is None:
            return output, None
        with as_itself(model), _losing(model):
            losses = model(images, [dict(item) for item in target])
        return output, torch.stack([value.float().sum() for value in losses.values()]).sum()

    def mimicked(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The predictions at every location, before boxes are selected."""
        return raw_predictions(model, args[0])

    def example_inputs(self, model: nn.Module) -> Any:
        """One image, in a tensor."""
        found = super().example_inputs(model)
        return None if found is None else padded(found[0])

    def training(self, model: nn.Module) -> Mapping[str, Any]:
        """Distill the features that the heads read."""
        found = feature_modules(model)
        return {"kd": "mse", "features": found} if found else {"kd": "none"}


def padded(images: Tensor | Sequence[Tensor]) -> Tensor:
    """Images as one tensor, `[N, 3, H, W]`; smaller ones are padded with zeros at the right and below."""
    if isinstance(images, Tensor):
        return images
    height, width = (max(image.shape[dim] for image in images) for dim in (-2, -1))
    return torch.stack([F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2])) for image in images])


@contextmanager
def _losing(model: nn.Module) -> Iterator[None]:
    """A `with` block in which a detector returns its losses: the modules of torchvision's detection are in train mode.

    Norms and dropout are modules of other packages and keep their mode.
    """
    switched = [
        module
        for module in model.modules()
        if not module.training and any(kind.__module__.startswith(_LIBRARY) for kind in type(module).__mro__)
    ]
    for module in switched:
        module.training = True
    try:
        yield
    finally:
        for module in switched:
            module.training = False


def raw_predictions(model: Any, images: Tensor) -> Tensor:
    """The outputs of a detector's heads at every location, `[N, numbers]`.

    A second stage is evaluated for fixed boxes (`PLACES`), which are the same for a student and its teacher.
    """
    transformed, _ = model.transform(list(images), None)
    features = _features(model, transformed.tensors)
    stages = [model.rpn.head] if hasattr(model, "rpn") else [model.head]
    found = [leaf for stage in stages for leaf in _leaves(stage(list(features.values())))]
    if hasattr(model, "roi_heads"):
        heads, sizes = model.roi_heads, transformed.image_sizes
        boxes = [_boxes(height, width, images.device) for height, width in sizes]
        for kind in STAGES:
            pool, head, predictor = (
                getattr(heads, f"{kind}_{part}", None) for part in ("roi_pool", "head", "predictor")
            )
            if pool is not None and head is not None and predictor is not None:
                given = predictor(head(_pooled(pool, features, boxes, sizes)))
                found += [leaf.unflatten(0, (len(images), len(PLACES))) for leaf in _leaves(given)]
    return torch.cat([leaf.flatten(1) for leaf in found], 1)


def _pooled(pool: Any, features: Mapping[str, Tensor], boxes: list[Tensor], sizes: Sequence[Any]) -> Tensor:
    """Pooled features of boxes, averaged over the levels, since a pool would pick the level by the size of the box."""
    from torchvision.ops import roi_align

    width = max(size[1] for size in sizes)
    levels = [features[name] for name in pool.featmap_names if name in features]
    boxes = [places.to(levels[0].dtype) for places in boxes]
    each = [roi_align(level, boxes, pool.output_size, level.shape[-1] / width, pool.sampling_ratio) for level in levels]
    return torch.stack(each).mean(0)


def _features(model: Any, images: Tensor) -> dict[str, Tensor]:
    features = model.backbone(images)
    return {"0": features} if isinstance(features, Tensor) else dict(features)


def _leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value
    return [leaf for item in items for leaf in _leaves(item)]


def _boxes(height: int, width: int, device: torch.device) -> Tensor:
    return torch.tensor(PLACES, device=device) * torch.tensor([width, height, width, height], device=device)


@torch.no_grad()
def feature_modules(model: Any) -> tuple[str, ...]:
    """Names of the modules of a detector's backbone whose outputs its heads read."""
    names, outputs = [], []
    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: outputs.append((name, output)))
        for name, module in model.backbone.named_modules()
        if name
    ]
    try:
        with evaluating(model):
            image = torch.zeros(1, 3, 256, 256, device=device_of(model))
            found = _features(model, image.to(next(model.parameters()).dtype))
    finally:
        for handle in handles:
            handle.remove()
    for feature in found.values():
        names += [name for name, output in outputs if output is feature][:1]
    return tuple(f"backbone.{name}" for name in dict.fromkeys(names))


@named("mAP50-95 [%]")
@checked(model=MODEL, data=DATA)
@torch.no_grad()
def mean_average_precision(model: nn.Module, data: Iterable[Any]) -> float:
    """The mean average precision over overlaps from 50 to 95 % (COCO), in per cent.

    Args:
        model: a detector of torchvision; its mode is left as it was.
        data: batches of (images, targets), as for `Detection`.

    Raises:
        InputError: if torchmetrics or pycocotools is not installed.
    """
    with needs_extra("detection", "The mean average precision"):
        from torchmetrics.detection import MeanAveragePrecision

        metric = MeanAveragePrecision()
    metric.warn_on_many_detections = False  # COCO looks at the 100 surest of an image
    device = device_of(model)
    with evaluating(model):
        for images, targets in data:
            found = model([image.to(device) for image in images])
            metric.update(move(found, "cpu"), move(list(targets), "cpu"))
    return 100 * float(cast(Any, metric.compute())["map"])
