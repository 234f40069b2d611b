"""Models that torchvision builds by name."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import nn

# torchvision warns that these two change their initialization unless told which one to use.
_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
}


def build(name: str, pretrained: bool, options: Mapping[str, Any]) -> nn.Module:
    """A model, with torchvision's default weights or without any."""
    from torchvision import models

    defaults = dict(_OPTIONS.get(name, {}))
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        defaults["weights_backbone"] = None  # else the builder downloads weights that nobody asked for
    weights = "DEFAULT" if pretrained else None
    return cast(nn.Module, models.get_model(name, weights=weights, **{**defaults, **options}))


def names() -> list[str]:
    """Every name that torchvision knows."""
    from torchvision import models

    return list(models.list_models())


def arguments_of(model: nn.Module) -> Iterator[dict[str, Any]]:
    """The arguments by which the model may differ from its builder's defaults."""
    kwargs: dict[str, Any] = {}
    if isinstance(getattr(model, "image_size", None), int):
        kwargs["image_size"] = model.image_size
    if isinstance(getattr(model, "aux_logits", None), bool):
        kwargs |= {"aux_logits": model.aux_logits, "transform_input": model.transform_input}
    if getattr(model, "aux_classifier", None) is not None:
        kwargs["aux_loss"] = True
    classes = [found for module in model.modules() if isinstance(found := getattr(module, "num_classes", None), int)]
    predictor = getattr(getattr(getattr(model, "roi_heads", None), "box_predictor", None), "cls_score", None)
    if isinstance(predictor, nn.Linear):
        classes = [predictor.out_features]
    if classes:  # a detector's
        yield {**kwargs, "num_classes": classes[0]}
    parameters = list(model.parameters())
    if parameters and parameters[-1].dim():
        yield {**kwargs, "num_classes": parameters[-1].shape[0]}  # the classifier comes last
    yield kwargs


def builders_of(model: nn.Module) -> list[str]:
    """Builders of the model's class, nearest in number of parameters first (the head may differ)."""
    from torchvision import models

    size = sum(parameter.numel() for parameter in model.parameters())

    def distance(name: str) -> float:
        weights = getattr(models.get_model_weights(name), "DEFAULT", None)
        return math.inf if weights is None else abs(weights.meta["num_params"] - size)

    return sorted((name for name in names() if _built_class(name) is type(model)), key=distance)


def _built_class(name: str) -> object:
    """The class that a builder of torchvision is annotated to return."""
    from torchvision import models

    return typing.get_type_hints(models.get_model_builder(name)).get("return")


def published_size(name: str) -> int | None:
    """The crop [pixels] that the default weights of a torchvision classifier were evaluated at."""
    from torchvision import models

    weights = getattr(models.get_model_weights(name), "DEFAULT", None)
    crop = None if weights is None else getattr(weights.transforms(), "crop_size", None)
    return int(crop[0]) if crop else None
