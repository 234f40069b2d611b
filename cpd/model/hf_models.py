"""Models of Hugging Face transformers by name.

`hf:PATH_OR_NAME` is a folder or a repository of the hub; `hf:ViTForImageClassification,hidden_size=64` is a class of
transformers with arguments of its configuration, the form in which a model is recorded: it says all that a fresh model
is built from, and names no file and no address.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from cpd.errors import InputError, first_line, needs_extra

if TYPE_CHECKING:
    pass

#: What a configuration holds that says nothing of the architecture.
_INCIDENTAL = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "_attn_implementation")
#: The same, of a configuration itself: its class says which one it is.
_KNOWN_BY_CLASS = (*_INCIDENTAL, "model_type")
_LABELS = ("id2label", "label2id")
#: Keys of a configuration that load something, or run code.
_LOADING = ("auto_map", "custom_pipelines", "quantization_config", "trust_remote_code", "use_pretrained_backbone")
_HARMLESS = re.compile(r"[\w .,+-]{0,64}")
_LARGEST, _LONGEST, _DEEPEST = 1e12, 4096, 6


def _library() -> Any:
    with needs_extra("hf", "A model named hf:…"):
        import transformers

    return transformers


def _class_of(name: str) -> Any:
    """The class of transformers that has a name; None where there is none."""
    library = _library()
    found = getattr(library, name, None) if name.isidentifier() else None
    known = isinstance(found, type) and issubclass(found, library.PreTrainedModel)
    return found if known else None


def is_class(name: str) -> bool:
    """Whether transformers has a class of that name; else the name is of a folder or of a repository."""
    return _class_of(name) is not None


def build(name: str, pretrained: bool, options: Mapping[str, Any]) -> nn.Module:
    """A model of a class with random weights, or of a folder or repository, with its weights if `pretrained`.

    Raises:
        InputError: if it cannot be built, or a folder's class is none of transformers'.
    """
    library, kind = _library(), _class_of(name)
    try:
        if kind is not None:
            built: nn.Module = kind(kind.config_class(**options)).eval()
            return built
        config: Any = library.AutoConfig.from_pretrained(name, **options)
        kind = _class_of((getattr(config, "architectures", None) or [""])[0])
        if kind is None:
            raise InputError(
                f"The configuration of {name} names no class of transformers as its architecture: build the model "
                "yourself, and pass it."
            )
        found = kind.from_pretrained(name, config=config) if pretrained else kind(config)
    except InputError:
        raise
    except Exception as error:  # of transformers, the hub, requests, the disk
        raise InputError(f"transformers cannot build {name!r}: {first_line(error)}.") from error
    loaded: nn.Module = found.eval()
    return loaded


def candidates(model: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """The class of a model of transformers, and what its configuration has that the default one has not."""
    if not type(model).__module__.startswith("transformers.") or _class_of(type(model).__name__) is not type(model):
        return
    config: Any = model.config
    yield type(model).__name__, _difference(config)


def _difference(config: Any) -> dict[str, Any]:
    """What a configuration has that one of its class without arguments has not, as JSON types."""
    everywhere = _plain(_library().PreTrainedConfig().to_dict(), _KNOWN_BY_CLASS)
    own = {
        name: {key: inner for key, inner in value.items() if key not in everywhere or inner != everywhere[key]}
        if isinstance(value, Mapping) and "model_type" in value
        else value
        for name, value in _plain(config.to_dict(), _KNOWN_BY_CLASS).items()
    }
    try:
        usual = _plain(type(config)().to_dict(), _KNOWN_BY_CLASS)
    except Exception:  # some cannot be made without arguments
        usual = {}
    found = {name: value for name, value in own.items() if name not in usual or usual[name] != value}
    labels = own.get("id2label")
    if labels is not None and all(name == f"LABEL_{number}" for number, name in labels.items()):
        for key in _LABELS:
            found.pop(key, None)
        if len(labels) != len(usual.get("id2label", labels)):
            found["num_labels"] = len(labels)
    return found


def _plain(config: Mapping[str, Any], left_out: tuple[str, ...]) -> dict[str, Any]:
    """A configuration as JSON types, less what is incidental, in the configurations within it, too."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return _plain(value, _INCIDENTAL)
        if isinstance(value, (tuple, list)):
            return [plain(item) for item in value]
        return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)

    return {str(name): plain(value) for name, value in config.items() if str(name) not in left_out}


def unsafe(name: str, options: Mapping[str, Any]) -> str | None:
    """What of a source that a file records is not built, in words; None where all of it is."""
    if not is_class(name):
        return f"{name} is no class of transformers"
    return _unsafe(options, _DEEPEST)


def _unsafe(options: Mapping[str, Any], depth: int) -> str | None:
    for key, value in options.items():
        if key in _LOADING and value:
            return f"{key} in its configuration says what is loaded"
        if key == "backbone" and value and "timm_backbone" not in (options.get("model_type"), _timm(options)):
            return "its configuration names a backbone that is looked up elsewhere"
        if key not in _LABELS and not _is_plain(value, depth):
            return f"{key} in its configuration is no plain number, word, truth value, list or mapping of those"
        inner = value if isinstance(value, Mapping) and key not in _LABELS else {}
        if depth and (fault := _unsafe(inner, depth - 1)):
            return fault
    return None


def _timm(options: Mapping[str, Any]) -> str:
    return "timm_backbone" if options.get("use_timm_backbone") else ""


def _is_plain(value: Any, depth: int) -> bool:
    if isinstance(value, (list, Mapping)):
        items = value.values() if isinstance(value, Mapping) else value
        return depth > 0 and len(value) <= _LONGEST and all(_is_plain(item, depth - 1) for item in items)
    if isinstance(value, str):
        return _HARMLESS.fullmatch(value) is not None
    return value is None or (isinstance(value, (int, float)) and abs(value) <= _LARGEST)
