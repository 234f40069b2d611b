"""Models of ultralytics by name: `ultralytics:yolo11n.pt` with its weights, `ultralytics:yolo11n.yaml,nc=3` without."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, cast

from torch import nn

from cpd.errors import InputError, first_line, needs_extra

#: What a model may be built with that its file says otherwise: classes, points of a pose, channels of an image.
_ARGUMENTS = ("nc", "kpt_shape", "channels")


def build(name: str, pretrained: bool, options: Mapping[str, Any]) -> nn.Module:
    """The model in a file of weights (.pt), or that a file of layers (.yaml) describes, with random weights.

    Of a file of weights ultralytics downloads those that it publishes; without `pretrained` the file of layers of the
    same name is taken.

    Raises:
        InputError: if there is no such file, or an option is none of a model's.
    """
    with needs_extra("ultralytics", "A model named ultralytics:…"):
        from ultralytics import RTDETR, YOLO
        from ultralytics.nn.tasks import guess_model_task, yaml_model_load
    unknown = [option for option in options if option not in _ARGUMENTS]
    if unknown:
        raise InputError(f"A model of ultralytics has no argument {unknown[0]!r}; it has: {', '.join(_ARGUMENTS)}.")
    wrapper = RTDETR if "rtdetr" in Path(name).stem else YOLO
    try:
        if name.endswith(".pt") and pretrained:
            return cast(nn.Module, wrapper(name).model.float().eval())
        layers = {**yaml_model_load(f"{name.removesuffix('.pt').removesuffix('.yaml')}.yaml"), **options}
        task = "detect" if wrapper is RTDETR else guess_model_task(layers)
        wrapped = wrapper.__new__(wrapper)
        nn.Module.__init__(wrapped)
        model = wrapper.task_map.fget(wrapped)[task]["model"](layers, verbose=False)
        model.args, model.task = _arguments(), task
    except (Exception, SystemExit) as error:  # of ultralytics, its downloads, the disk
        raise InputError(f"ultralytics cannot build {name!r}: {first_line(error)}.") from error
    return cast(nn.Module, model.eval())


def _arguments() -> Any:
    """The settings that a model of ultralytics carries, among them the weights of the parts of its loss."""
    from ultralytics.cfg import get_cfg

    return get_cfg()


def candidates(model: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """The file of layers that a model was built from, if it comes with ultralytics, and what it was built with."""
    if not type(model).__module__.startswith("ultralytics.") or "ultralytics" not in sys.modules:
        return
    layers = getattr(model, "yaml", None)
    if not isinstance(layers, dict) or not layers.get("yaml_file"):
        return
    name = Path(str(layers["yaml_file"])).name
    if is_published(name):
        from ultralytics.nn.tasks import yaml_model_load

        usual = yaml_model_load(name)
        options = {key: deepcopy(layers[key]) for key in _ARGUMENTS if key in layers and layers[key] != usual.get(key)}
        if options.get("channels") == 3:
            del options["channels"]
        yield name, options


@cache
def _published() -> frozenset[str]:
    """The names of the files of layers that come with ultralytics, without the letter of their scale."""
    import ultralytics

    return frozenset(path.name for path in (Path(ultralytics.__file__).parent / "cfg" / "models").rglob("*.yaml"))


def is_published(name: str) -> bool:
    """Whether a file of layers comes with ultralytics."""
    from ultralytics.nn.tasks import guess_model_scale

    scale = guess_model_scale(name)
    return name in _published() or any(
        name[:place] + name[place + 1 :] in _published() for place, letter in enumerate(name) if letter == scale
    )


def unsafe(name: str, options: Mapping[str, Any]) -> str | None:
    """What of a source that a file records is not built, in words; None where all of it is."""
    with needs_extra("ultralytics", "A model named ultralytics:…"):
        known = name.endswith(".yaml") and Path(name).name == name and is_published(name)
    if not known:
        return f"{name} is no file of layers that comes with ultralytics"
    for key, value in options.items():
        numbers = value if isinstance(value, list) else [value]
        if key not in _ARGUMENTS or len(numbers) > 4 or not all(isinstance(item, int) for item in numbers):
            return f"its argument {key} is no whole number or short list of those"
    return None
