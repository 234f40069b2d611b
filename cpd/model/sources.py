"""Models by name: where a fresh copy of a model comes from, and what one input of it looks like.

A `ModelSource` is written `timm:resnet18`, `torchvision:swin_t` or `package.module:factory`, with arguments
of the builder after commas: `timm:resnet18,num_classes=10`. `resolve` reads such a name, `identify` finds the
name of a model that is already built, and says None rather than guess.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import json
import operator
import os
import pkgutil
import random
import re
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from cpd.errors import ArtifactError, InputError
from cpd.model import hf_models, torchvision_models, ultralytics_models
from cpd.model.inputs import check_model
from cpd.model.skeleton import skeleton

Kind = Literal["timm", "torchvision", "hf", "ultralytics", "factory"]

FORMS = "timm:NAME, torchvision:NAME, hf:NAME_OR_FOLDER, ultralytics:NAME or package.module:factory"

_TORCHVISION_SIZES = {"Inception3": 299, "VideoResNet": 112}
#: Frames of the clip that torchvision's video models take, the side [pixels] of what the optical-flow and the
#: detection models take.
_FRAMES, _FLOW_SIZE, _DETECTION_SIZE = 16, 128, 320
_UNSETTLED = ("training", "grad_checkpointing")


BY_NAME = ("timm:", "torchvision:", "hf:", "ultralytics:")
"""Sources that `cpd.load` rebuilds by itself (see `recorded`); of any other a fresh model has to be handed in."""


@dataclass(frozen=True)
class ModelSource:
    """How a fresh copy of a model is built.

    Attributes:
        kind: `timm`, `torchvision`, `hf` (transformers), `ultralytics`, or `factory` (a callable of an importable
            module).
        name: the builder's name; of a factory, `package.module:callable`.
        kwargs: arguments of the builder, JSON types only.
    """

    kind: Kind
    name: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """The form that `resolve` reads."""
        prefix = "" if self.kind == "factory" else f"{self.kind}:"
        pairs = (f",{key}={_written(value)}" for key, value in self.kwargs.items())
        return f"{prefix}{self.name}{''.join(pairs)}"

    @property
    def by_name(self) -> bool:
        """Whether a library knows the name, so that building it runs no code of anybody else's."""
        return self.kind != "factory"

    @property
    def recorded(self) -> str | None:
        """How it is written into a result; None where what it names is of this machine alone, a folder or a file."""
        if (self.kind == "hf" and not hf_models.is_class(self.name)) or self.kind == "ultralytics":
            return None  # what it was built from is found in the model itself
        return str(self)

    def build(self, pretrained: bool = False, **kwargs: Any) -> nn.Module:
        """Build a fresh model.

        Args:
            pretrained: load the library's default weights (downloads them); a factory decides for itself.
            **kwargs: arguments of the builder, over those of the source.

        Raises:
            InputError: if the library cannot build it, or a factory gives no `nn.Module`.
        """
        options = {**self.kwargs, **kwargs}
        if self.kind == "factory":
            with _current_directory_importable():
                return check_model(_find_factory(self.name)(**options))
        try:
            return _BUILDERS[self.kind](self.name, pretrained, options)
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(_build_failure(self, pretrained, error)) from error

    def to_dict(self) -> dict[str, Any]:
        """The source as plain JSON types."""
        return {"kind": self.kind, "name": self.name, "kwargs": dict(self.kwargs)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelSource:
        """The source that `to_dict` wrote; raises `ArtifactError` if it is not one."""
        kind, name, kwargs = (data.get(key) for key in ("kind", "name", "kwargs"))
        if kind not in typing.get_args(Kind) or not isinstance(name, str) or not isinstance(kwargs, Mapping):
            raise ArtifactError(f"This is no model source that cpd wrote: {dict(data)}.")
        return cls(cast(Kind, kind), name, dict(kwargs))


def resolve(name: str) -> ModelSource:
    """Read the name of a model.

    Args:
        name: `timm:NAME`, `torchvision:NAME`, `hf:NAME_OR_FOLDER` or `hf:CLASS`, `ultralytics:NAME`, or
            `package.module:factory` (the current directory is importable), each with optional arguments of the
            builder: `timm:resnet18,num_classes=10`.

    Raises:
        InputError: if the form is another one, or nothing has that name; the message gives close matches.
    """
    spec, *pairs = re.split(r",(?=[A-Za-z_]\w*=)", name.strip())
    kind, colon, rest = spec.partition(":")
    if not colon or not rest:
        raise InputError(f"A model is named {FORMS}; got {name!r}.{_bare_name_hint(spec)}")
    kwargs = dict(_argument(pair) for pair in pairs)
    if kind == "timm":
        _check_timm(rest)
        return ModelSource("timm", rest, kwargs)
    if kind == "torchvision":
        _check_known("torchvision", rest, torchvision_models.names())
        return ModelSource("torchvision", rest, kwargs)
    if kind in ("hf", "ultralytics"):
        return ModelSource(cast(Kind, kind), rest, kwargs)
    with _current_directory_importable():
        _find_factory(spec)
    return ModelSource("factory", spec, kwargs)


def identify(model: nn.Module) -> ModelSource | None:
    """Find the name under which a library builds a model like this one.

    A name counts only if a model built from it (on the meta device) has the same class, the same state dict
    keys and shapes, the same printed structure and the same plain settings on every submodule.

    Returns:
        The source, or None where the model is another one or was changed after it was built.
    """
    for source in _candidates(model):
        if _rebuilds(source, model):
            return source
    return None


def default_inputs(model: nn.Module, source: ModelSource | None = None) -> Any:
    """One input of a timm or a torchvision model, as `cpd.compress` takes `example_inputs`.

    Args:
        model: the model.
        source: where it comes from, as far as known (saves looking it up).

    Returns:
        Normal noise (the same at every call) on the model's device and in its dtype: [1, C, H, W]; [1, 3, T, H, W]
        for video; two images [1, 3, H, W] for optical flow; a list of one image [3, H, W] for detection. None where
        nothing is known about the model's input.
    """
    config = _timm_config(model)
    if config is not None:
        size = _timm_image_size(model) or tuple(config["input_size"][1:])
        inputs = image_inputs(model, size)
        if inputs.shape[1] != config["input_size"][0] and not _takes(model, inputs):
            return _noise(model, (1, *config["input_size"]))  # the first layer is no convolution over the image
        return inputs
    module = type(model).__module__
    if not module.startswith("torchvision.models."):
        return None
    match module.split(".")[2]:
        case "detection":
            return ([_noise(model, (3, _DETECTION_SIZE, _DETECTION_SIZE))],)
        case "optical_flow":
            return tuple(_noise(model, (2, 3, _FLOW_SIZE, _FLOW_SIZE)).chunk(2))
        case "video":
            return _noise(model, (1, 3, _FRAMES, *_torchvision_size(model, source)))
    return image_inputs(model, _torchvision_size(model, source))


def image_inputs(model: nn.Module, size: tuple[int, int]) -> Tensor:
    """Normal noise [1, C, H, W], the same at every call, as the model's first convolution takes it.

    Args:
        model: gives C (3 if it has no convolution), the device and the dtype.
        size: H and W in pixels.
    """
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return _noise(model, (1, 3 if first is None else first.in_channels, *size))


def _takes(model: nn.Module, inputs: Tensor) -> bool:
    """Whether the model runs on inputs of this shape, tried without values."""
    try:
        with torch.no_grad():
            skeleton(model, {}, meta=True).eval()(inputs.to("meta"))
    except Exception:  # the user's forward may raise anything
        return False
    return True


def _noise(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight = next((p for p in model.parameters() if p.is_floating_point() and not p.is_meta), None)
    return noise if weight is None else noise.to(weight.device, weight.dtype)


# ---------------------------------------------------------------------------------- reading a name


def _written(value: Any) -> str:
    """A value as JSON, in which no `=` begins another argument."""
    return json.dumps(value, separators=(",", ":")).replace("=", "\\u003d")


def _argument(pair: str) -> tuple[str, Any]:
    """`num_classes=10` to its key and value; a value that is no JSON is a string."""
    key, _, text = pair.partition("=")
    try:
        return key, json.loads(text)
    except (ValueError, RecursionError):  # no JSON, or more of it than is read
        return key, text


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=20, cutoff=0.6)
    alike = sorted(close, key=lambda other: sum(a != b for a, b in zip_longest(name, other)))  # stable: then as close
    matches = alike[:5]
    return f" Did you mean {', '.join(matches)}?" if matches else ""


def _check_known(library: str, name: str, known: Iterable[str]) -> None:
    names = list(known)
    if name not in names:
        raise InputError(f"{library} has no model {name!r}.{_suggest(name, names)}")


def _bare_name_hint(name: str) -> str:
    """Close matches for a name given without its library."""
    import timm

    known = [f"timm:{item}" for item in timm.list_models()]
    known += [f"torchvision:{item}" for item in torchvision_models.names()]
    exact = [item for item in known if item.endswith(f":{name}")]
    if exact:
        return f" Did you mean {' or '.join(exact)}?"
    return _suggest(f"timm:{name}", known)


def _check_timm(name: str) -> None:
    import timm
    from timm.models import get_arch_pretrained_cfgs

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise InputError(f"timm has no model {name!r}.{_suggest(architecture, timm.list_models())}")
    if tag:
        _check_known("timm", name, get_arch_pretrained_cfgs(architecture))


def _find_factory(name: str) -> Callable[..., Any]:
    """The callable that `package.module:factory` names."""
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in f"{module_name}.{attribute}".split(".")):
        raise InputError(f"A model is named {FORMS}; got {name!r}.")
    module = _import(module_name)
    try:
        factory = operator.attrgetter(attribute)(module)
    except AttributeError:
        known = [key for key, value in vars(module).items() if callable(value)]
        hint = _suggest(attribute, known)
        raise InputError(f"Module {module_name!r} has no {attribute!r}.{hint}") from None
    if not callable(factory):
        raise InputError(f"{name} is a {type(factory).__name__}, not a callable that returns an nn.Module.")
    return cast(Callable[..., Any], factory)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            hint = _suggest(name.partition(".")[0], (item.name for item in pkgutil.iter_modules()))
            raise InputError(f"There is no module {name!r} to take a model from.{hint}") from error
        raise InputError(f"Module {name!r} could not be imported: {error}.") from error


@contextlib.contextmanager
def _current_directory_importable() -> Iterator[None]:
    """Put the current directory on the import path, as `python -m` does, and take it off again."""
    here = os.getcwd()
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        yield
    finally:
        if added:
            sys.path.remove(here)


# ---------------------------------------------------------------------------------- building


def _build_timm(name: str, pretrained: bool, options: Mapping[str, Any]) -> nn.Module:
    import timm

    return cast(nn.Module, timm.create_model(name, pretrained=pretrained, **options))


_BUILDERS: dict[str, Callable[[str, bool, Mapping[str, Any]], nn.Module]] = {
    "timm": _build_timm,
    "torchvision": torchvision_models.build,
    "hf": hf_models.build,
    "ultralytics": ultralytics_models.build,
}


def _build_failure(source: ModelSource, pretrained: bool, error: Exception) -> str:
    what = " with its pretrained weights" if pretrained else ""
    reason = " ".join(str(error).split()).rstrip(".")
    remedy = " Are they within reach of the network? Without them: pretrained=False (--no-pretrained)."
    return f"Could not build {source}{what}: {reason}.{remedy if isinstance(error, OSError) else ''}"


# ---------------------------------------------------------------------------------- identifying


def _candidates(model: nn.Module) -> Iterator[ModelSource]:
    """Every name that could be the model's, likeliest first."""
    config = _timm_config(model)
    if config is not None:
        architecture, tag = str(config["architecture"]), config.get("tag")
        name = f"{architecture}.{tag}" if tag else architecture
        yield from (ModelSource("timm", name, kwargs) for kwargs in _timm_kwargs(model, config))
    elif type(model).__module__.startswith("torchvision.models."):
        for name in torchvision_models.builders_of(model):
            yield from (ModelSource("torchvision", name, kwargs) for kwargs in torchvision_models.arguments_of(model))
    yield from (ModelSource("hf", *found) for found in hf_models.candidates(model))
    yield from (ModelSource("ultralytics", *found) for found in ultralytics_models.candidates(model))


def _timm_config(model: nn.Module) -> Mapping[str, Any] | None:
    """The pretrained configuration of the model, if it is one of timm's."""
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, Mapping) or "architecture" not in config or "input_size" not in config:
        return None
    import timm

    return config if timm.is_model(str(config["architecture"])) else None


def _timm_kwargs(model: nn.Module, config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The arguments by which the model may differ from its configuration."""
    kwargs: dict[str, Any] = {}
    if isinstance(getattr(model, "num_classes", None), int):
        kwargs["num_classes"] = model.num_classes
    channels, *default_size = config["input_size"]
    size = _timm_image_size(model)
    if size is not None and list(size) != default_size:
        kwargs["img_size"] = list(size)
    conv = _submodule(model, config.get("first_conv"))
    if isinstance(conv, nn.Conv2d) and conv.in_channels != channels:
        yield {**kwargs, "in_chans": conv.in_channels}
    yield kwargs


def _submodule(model: nn.Module, name: object) -> nn.Module | None:
    return dict(model.named_modules()).get(name) if isinstance(name, str) else None


def _timm_image_size(model: nn.Module) -> tuple[int, int] | None:
    """The image size [pixels] that the model was built for, where it keeps one."""
    for holder in (getattr(model, "patch_embed", None), model):
        size = getattr(holder, "img_size", None)
        if isinstance(size, int):
            return size, size
        if isinstance(size, (tuple, list)) and len(size) == 2:
            return int(size[0]), int(size[1])
    return None


def _rebuilds(source: ModelSource, model: nn.Module) -> bool:
    """Whether `source` builds a model like `model`."""
    built = _skeleton(source)
    return (
        built is not None
        and type(built) is type(model)
        and _shapes(built) == _shapes(model)
        and str(built) == str(model)
        and _same_settings(built, model)
    )


def _skeleton(source: ModelSource) -> nn.Module | None:
    """The model of `source` without its weights, global random state untouched; None if it cannot be built.

    Some models compute their widths with tensors, which the meta device has no values of; then only the
    parameters are put there, and if their constructor runs them, nothing is.
    """
    from accelerate import init_empty_weights

    python_state = random.getstate()
    places: tuple[Callable[[], AbstractContextManager[Any]], ...] = (
        lambda: torch.device("meta"),
        init_empty_weights,
        contextlib.nullcontext,
    )
    try:
        with torch.random.fork_rng():
            for place in places:
                with contextlib.suppress(InputError), place():
                    return source.build()
    finally:
        random.setstate(python_state)
    return None


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _same_settings(built: nn.Module, model: nn.Module) -> bool:
    """Whether every plain setting of a fresh model (a stride, a flag, a scale) is the model's too.

    What `str(module)` does not show counts as well: `transform_input`, `global_pool`, an attention's scale.
    """
    for fresh, own in zip(built.modules(), model.modules(), strict=True):
        if "forward" in vars(own) and "forward" not in vars(fresh):  # replaced on the object itself
            return False
        settings = {key: value for key, value in vars(fresh).items() if _is_setting(key, value)}
        missing = object()
        if any(vars(own).get(key, missing) != value for key, value in settings.items()):
            return False
    return True


def _is_setting(key: str, value: Any) -> bool:
    if key.startswith("_") or key in _UNSETTLED:
        return False
    if isinstance(value, (tuple, list)):
        return all(item is None or isinstance(item, (bool, int, float, str)) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _torchvision_size(model: nn.Module, source: ModelSource | None) -> tuple[int, int]:
    """Height and width [pixels]: the model's own, those of its published weights, or 224."""
    if isinstance(own := getattr(model, "image_size", None), int):
        return own, own
    if source is None and type(model).__module__.count(".") == 2:  # torchvision.models.MODULE: classification
        source = identify(model)
    size = _TORCHVISION_SIZES.get(type(model).__name__, 224)
    if source is not None and source.kind == "torchvision":
        size = torchvision_models.published_size(source.name) or size
    return size, size
