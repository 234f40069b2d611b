"""The integers that modules keep: by themselves, or inside tuples, lists, dicts and plain objects (a config, say).

An integer is named by its attribute and the keys that lead to it, joined by dots: `num_heads`, `widths.1`,
`sizes.0.1`, `cfg.num_heads`. What holds integers may be shared, also with other models; so it is never written to:
whoever changes one gets a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from enum import Enum
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from torch import nn

from cpd.model.tensors import attributes_of

#: The keys that lead to an integer: the name of the attribute, then those in what it holds.
Keys: TypeAlias = tuple[str, ...]

#: How deep integers are looked for, and in containers of how many parts at most.
MAX_DEPTH, MAX_PARTS = 4, 256
#: Of what types settings are.
_SETTINGS = (
    type(None), bool, int, float, str, tuple, list, dict, set, frozenset, type, Enum, torch.dtype, torch.device,
)  # fmt: skip


def integers(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Every integer that a module keeps, by its name."""
    found: list[tuple[str, int]] = []

    def note(keys: Keys, value: int) -> int:
        found.append((".".join(keys), value))
        return value

    for name, value in attributes_of(module):
        changed(value, note, (name,))
    yield from found


def changed(value: Any, change: Callable[[Keys, int], int], keys: Keys = ()) -> Any:
    """`value` with its integers changed: itself where none is, otherwise a copy of what holds them.

    Args:
        value: anything that a module keeps.
        change: what becomes of an integer, given the keys that lead to it.
        keys: those that lead to `value`.
    """
    if type(value) is int:
        return change(keys, value)
    parts = _parts(value) if len(keys) <= MAX_DEPTH else {}
    new = {key: changed(part, change, (*keys, str(key))) for key, part in parts.items()}
    if all(new[key] is part for key, part in parts.items()):
        return value
    if isinstance(value, tuple):
        return value._make(new.values()) if hasattr(value, "_make") else type(value)(new.values())
    result = copy.copy(value)
    for key, part in new.items():
        if part is not parts[key]:
            if isinstance(result, (dict, list)):
                result[key] = part
            else:
                vars(result)[key] = part
    return result


def get(module: nn.Module, name: str) -> Any:
    """What a module keeps under a name, see above.

    Raises:
        AttributeError: if it keeps nothing there.
    """
    first, *keys = name.split(".")
    value = getattr(module, first)
    for key in keys:
        parts = {str(other): part for other, part in _parts(value).items()}
        if key not in parts:
            raise AttributeError(f"{type(module).__name__} keeps nothing under {name}")
        value = parts[key]
    return value


def put(module: nn.Module, name: str, new: int) -> None:
    """Let an integer that a module keeps have another value; what holds it is copied before."""
    wanted = tuple(name.split("."))
    value = getattr(module, wanted[0])
    setattr(module, wanted[0], changed(value, lambda keys, old: new if keys == wanted else old, wanted[:1]))


def _parts(value: Any) -> dict[Any, Any]:
    """What a container holds, by index, key or name; nothing for what is none, or is not plain."""
    found: dict[Any, Any] = {}
    if type(value) in (tuple, list, torch.Size) or (isinstance(value, tuple) and hasattr(value, "_make")):
        found = dict(enumerate(value))
    elif isinstance(value, dict):
        found = {key: part for key, part in value.items() if type(key) in (str, int) and "." not in str(key)}
    elif _is_plain(value):
        found = dict(vars(value))
    return found if len(found) <= MAX_PARTS else {}


def _is_plain(value: Any, depth: int = MAX_DEPTH) -> bool:
    """Whether an object does nothing but hold settings, so that a copy of it is as good."""
    if not hasattr(value, "__dict__") or callable(value):
        return False
    kind: Any = type(value)
    parts = vars(value).values()
    copied = ("__reduce__", "__reduce_ex__")
    return (
        kind.__module__.partition(".")[0] != "torch"
        and not any(hasattr(kind, name) for name in ("__copy__", "__deepcopy__", "__setstate__", "__del__"))
        and any(all(getattr(kind, n) is getattr(known, n) for n in copied) for known in (object, SimpleNamespace))
        and all(isinstance(part, _SETTINGS) or (depth > 0 and _is_plain(part, depth - 1)) for part in parts)
    )
