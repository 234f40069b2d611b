"""Provenance: which attributes of which modules the integers come from that a forward passes to an op.

Every integer that a module keeps is replaced, on a copy, by a `Traced` one: an int that remembers where it was kept
and hands that on through arithmetic, so that `self.dim - self.pdim` is known to come from both.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from cpd.model import kept
from cpd.model.tensors import attributes_of


@dataclass(frozen=True, order=True)
class Place:
    """Where an integer that a forward reads is kept: the module, and its name there (`cpd.model.kept`)."""

    module: str
    name: str


class Traced(int):
    """An integer that knows the places it was computed from."""

    places: frozenset[Place]

    def __new__(cls, value: int, places: frozenset[Place]) -> Traced:
        """An integer of this value, computed from these places."""
        traced = super().__new__(cls, value)
        traced.places = places
        return traced


def _handing_on(function: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: Traced, *others: Any) -> Any:
        result = function(int(self), *(int(other) if isinstance(other, Traced) else other for other in others))
        places = self.places.union(*(other.places for other in others if isinstance(other, Traced)))
        return Traced(result, places) if type(result) is int else result

    return apply


def _swapped(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda left, right: function(right, left)


for _name in ("add", "sub", "mul", "floordiv", "mod", "pow", "lshift", "rshift"):
    _function = getattr(operator, _name)
    setattr(Traced, f"__{_name}__", _handing_on(_function))
    setattr(Traced, f"__r{_name}__", _handing_on(_swapped(_function)))
for _name in ("neg", "pos", "abs"):
    setattr(Traced, f"__{_name}__", _handing_on(getattr(operator, _name)))


def integers(model: nn.Module, path: str) -> Iterator[tuple[Place, int]]:
    """Every integer that the module at `path` keeps."""
    yield from ((Place(path, name), value) for name, value in kept.integers(model.get_submodule(path)))


def trace_integers(model: nn.Module) -> None:
    """Replace every integer that the modules of `model` keep by a `Traced` one of the same value, in place.

    What holds integers is copied for each module: where modules share it, each has its own.
    """
    for path, module in model.named_modules():

        def traced(keys: kept.Keys, value: int, path: str = path) -> int:
            return Traced(value, frozenset([Place(path, ".".join(keys))]))

        for name, value in attributes_of(module):
            vars(module)[name] = kept.changed(value, traced, (name,))


def places_of(value: Any) -> frozenset[Place]:
    """Where an integer comes from; nothing for a plain one."""
    return value.places if isinstance(value, Traced) else frozenset()
