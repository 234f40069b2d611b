"""Which ATen ops work element by element, and which are another under a second name, by torch's own registry.

An op is pointwise if it has that tag, or if what it is made of has: `torch.multiply` has none, and calls `mul`. Torch
knows what most untagged ops are made of; such an op is run on a few tensors without values, and what it calls is noted.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

_Call: TypeAlias = tuple[OpOverload, tuple[Any, ...], dict[str, Any]]

_aten = torch.ops.aten
#: Ops that compute nothing, and copies: of one element each.
_IDLE = {_aten.detach, _aten.alias, _aten.clone, _aten._to_copy, _aten.lift_fresh, _aten.empty_like, _aten.copy_}
#: Values for arguments without a default that are not tensors, by their type in the schema.
_VALUES: dict[str, Any] = {"number": 1, "int": 1, "float": 1.0, "bool": False, "Optional[str]": None}
_SHAPE = (2, 3)
#: Names of ops that have a rule of their own (`cpd.rules`): those are not taken apart.
RULED: set[str] = set()


class _Calls(TorchDispatchMode):
    """Notes every op that reaches the dispatcher, with its arguments."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = list[_Call]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.found.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@cache
def is_pointwise(op: OpOverload) -> bool:
    """Whether each element of an op's result follows from the elements of its inputs in that place alone."""
    if torch.Tag.pointwise in op.tags:
        return True
    twin = _out_of_place(op)
    if twin is not None:
        return is_pointwise(twin)
    made_of = ({call for call, _, _ in calls if call.overloadpacket not in _IDLE} for _, calls in _runs(op))
    return any(calls and all(torch.Tag.pointwise in call.tags for call in calls) for calls in made_of)


@cache
def first_name(op: OpOverload) -> str:
    """The name of the op that an op is another name of: `mul` of `multiply`, `view` of `view_copy`; else its own."""
    name = str(op.overloadpacket.__name__)
    if torch.Tag.pointwise in op.tags:
        return name
    twin = _out_of_place(op)
    if twin is not None:
        return f"{first_name(twin)}_"
    viewed = getattr(_aten, name.removesuffix("_copy"), None) if name.endswith("_copy") else None
    if viewed is not None and _names(op) in [_names(getattr(viewed, other)) for other in viewed.overloads()]:
        return name.removesuffix("_copy")
    for given, calls in _runs(op) if name not in RULED else ():
        if len(calls) == 1 and torch.Tag.pointwise in calls[0][0].tags and _alike(given, calls[0]):
            return str(calls[0][0].overloadpacket.__name__)
    return name


def _out_of_place(op: OpOverload) -> OpOverload | None:
    """`add.Tensor` for `add_.Tensor`, `__and__` for `__iand__`; None where an op is no such variant."""
    name = str(op.overloadpacket.__name__)
    if not re.fullmatch(r"__i\w+__|\w*[^_]_", name):
        return None
    packet = getattr(_aten, f"__{name[3:]}" if name.startswith("__i") else name[:-1], None)
    found: OpOverload | None = getattr(packet, op._overloadname, None)
    return found


def _names(op: OpOverload) -> list[str]:
    """The names of an op's arguments."""
    return [argument.name for argument in op._schema.arguments]


def _alike(one: _Call, other: _Call) -> bool:
    """Whether two calls were given the same under the same names."""
    pairs = zip(one[1], other[1], strict=False)
    same = (a is b or (not isinstance(a, Tensor) and a == b) for a, b in pairs)
    return _names(one[0]) == _names(other[0]) and one[2] == other[2] and len(one[1]) == len(other[1]) and all(same)


def _runs(op: OpOverload) -> Iterator[tuple[_Call, list[_Call]]]:
    """A call of an op that torch can take apart, and what it called then; for each type that it runs on."""
    decompose = op.decompose if op._can_decompose() else decomposition_table.get(op)
    for dtype in (torch.float32, torch.int64):
        given = _arguments(op, dtype)
        if given is None or decompose is None:
            return
        calls = _Calls()
        try:
            with torch.no_grad(), warnings.catch_warnings(action="ignore"), calls:
                result = decompose(*given[0], **given[1])
        except Exception:  # an op may refuse what it is given for any reason
            continue
        if isinstance(result, Tensor) and tuple(result.shape) == _SHAPE:
            yield (op, *given), calls.found


def _arguments(op: OpOverload, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Small tensors without values, and numbers, for an op that changes none; None where it needs more."""
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for argument in op._schema.arguments:
        kind = str(argument.type)
        if argument.alias_info is not None and argument.alias_info.is_write:
            return None
        if kind == "Optional[Tensor]":  # ops that look at these without asking end the process (gru_cell, torch 2.9)
            return None
        if argument.has_default_value():
            value = argument.default_value
        elif kind == "Tensor":
            value = torch.empty(_SHAPE, dtype=dtype, device="meta")
        elif kind in _VALUES:
            value = _VALUES[kind]
        else:
            return None
        if not argument.kwarg_only:
            positional.append(value)
        elif not argument.has_default_value():
            named[argument.name] = value
    return tuple(positional), named
