"""Tasks: what a model is for, as far as compressing it asks: its batches, its loss, its metric, where it comes from."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    """A module of this room, imported when it is first used: `cpd.tasks.yolo` after `import cpd` alone."""
    if name.startswith("_") or find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
