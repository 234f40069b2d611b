"""Sources that a file records: what of them is built, whoever wrote the file.

A saved result names its model, as `timm:resnet18,num_classes=10`. Only models that a library knows by name are built,
without weights, and with no other arguments than numbers, truth values, lists of those, and the names of a few kinds of
layers (of transformers: a configuration of plain values): such arguments name no file, no folder and no address.
Anything else that a source can say is for whoever loads the result to build.
"""

from __future__ import annotations

import math
from textwrap import shorten
from typing import Any

from torch import nn

from cpd.errors import ArtifactError, CPDError, first_line
from cpd.model import hf_models, ultralytics_models
from cpd.model.sources import BY_NAME, ModelSource, resolve

#: Arguments that say what weights are loaded, and from where.
_LOADING = ("pretrained", "weights", "checkpoint", "cache")
#: Arguments that name kinds of layers, which timm looks up in tables of its own.
_NAMES = ("act_layer", "aa_layer", "attn_layer", "global_pool", "mlp_layer", "norm_layer", "pool_type")
#: The largest number, and the longest list.
_LARGEST, _LONGEST = 1e6, 64

_OWN_CHECKS = {"hf": hf_models.unsafe, "ultralytics": ultralytics_models.unsafe}

REMEDY = "Build the model as the original was built, and pass it: cpd.load(folder, model=fresh)."


def unsafe(source: ModelSource) -> str | None:
    """What of a source by name is not built from a file, in words; None where all of it is."""
    if source.kind in _OWN_CHECKS:
        return _OWN_CHECKS[source.kind](source.name, source.kwargs)
    for key, value in source.kwargs.items():
        if key.startswith(_LOADING):
            return f"its argument {key} says what weights are loaded"
        named = key in _NAMES and isinstance(value, str) and value.isidentifier() and value.isascii()
        if not named and not _is_plain(value):
            return f"its argument {key} is no plain number, truth value or list of those"
    return None


def _is_plain(value: Any, depth: int = 3) -> bool:
    if isinstance(value, list):
        return depth > 0 and len(value) <= _LONGEST and all(_is_plain(item, depth - 1) for item in value)
    return value is None or (isinstance(value, (int, float)) and math.isfinite(value) and abs(value) <= _LARGEST)


def why_not_by_name(source: str) -> str | None:
    """Why `cpd.load` cannot build a source by itself, in words; None where it can."""
    if not source.startswith(BY_NAME):
        return "no library knows it by name"
    try:
        return unsafe(resolve(source))
    except CPDError as error:
        return str(error)


def rebuilt(source: str | None, model_class: str, *, trust: bool) -> nn.Module:
    """A fresh model of the source that a file records.

    Args:
        source: as the file has it.
        model_class: the class of the model, for messages.
        trust: whether a `package.module:factory` is imported and called, which runs its code.

    Raises:
        ArtifactError: if it is not built, for the reasons above or because it cannot be.
    """
    shown = shorten(source or "", 200, placeholder=" …")
    by_name = source is not None and source.startswith(BY_NAME)
    if source is None or not (by_name or trust):
        told = "" if source is None else f", only as {shown}, whose code is run with trust_source=True alone"
        raise ArtifactError(f"No library is known to build this model of class {model_class} by a name{told}. {REMEDY}")
    try:
        found = resolve(source)
        if found.by_name and (fault := unsafe(found)):
            raise ArtifactError(f"The source {shown} is not built from a file: {fault}. {REMEDY}")
        return found.build()
    except ArtifactError:
        raise
    except Exception as error:  # what builders make of odd arguments, and a factory of the user's
        raise ArtifactError(f"The model {shown} cannot be built here: {first_line(error)}. {REMEDY}") from error
