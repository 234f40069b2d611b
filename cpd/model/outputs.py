"""Which parts of a model's output matter: named by keys, attributes and positions, or picked by a function.

Those keep their width; what nobody reads (hidden states, lists of features) may become narrower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from cpd.errors import InputError, first_line, of_the_user

Part: TypeAlias = str | int
Outputs: TypeAlias = Part | Sequence[Part] | Callable[[Any], Any]


def whole(output: Any) -> Any:
    """All of an output."""
    return output


def reader(outputs: Outputs | None) -> Callable[[Any], Any]:
    """A function that gives the parts of an output that matter; all of it for None.

    Args:
        outputs: a key, an attribute or a position of the output, `a.b` or `1.0` for one inside another, several of
            them, or a function of the output.
    """
    if outputs is None:
        return whole
    if callable(outputs):
        return _Asked(outputs)
    return _Named((outputs,) if isinstance(outputs, (str, int)) else tuple(outputs))


@dataclass(frozen=True)
class _Asked:
    """Gives the part of an output that a function of the user's picks."""

    pick: Callable[[Any], Any]

    def __call__(self, output: Any) -> Any:
        with of_the_user("outputs", "on the model's output"):
            return self.pick(output)


@dataclass(frozen=True)
class _Named:
    """Gives the parts of an output that have these names: one as it is, several in a tuple.

    An output that is a single tensor (another teacher's, say) is given as it is.
    """

    names: tuple[Part, ...]

    def __call__(self, output: Any) -> Any:
        if isinstance(output, Tensor):
            return output
        found = tuple(_part(output, name) for name in self.names)
        return found[0] if len(found) == 1 else found


def _part(output: Any, name: Part) -> Any:
    found = output
    for key in (name,) if isinstance(name, int) else name.split("."):
        try:
            found = _child(found, key)
        except (AttributeError, IndexError, KeyError, TypeError):
            known = ", ".join(names_of(output).values()) or "nothing by name"
            raise InputError(f"The output has no part {name!r}; outputs can be: {known}.") from None
    return found


def _child(value: Any, key: Part) -> Any:
    """What a container holds under a key, at a position, or as an attribute."""
    if isinstance(value, Tensor):
        raise KeyError(key)
    if isinstance(value, Mapping) and key in value:
        return value[key]
    if isinstance(key, int) or key.removeprefix("-").isdecimal():
        items = list(value.values()) if isinstance(value, Mapping) else value
        return items[int(key)]
    return getattr(value, key)


def names_of(output: Any) -> dict[int, str]:
    """The name of each tensor of an output, by its place among the leaves; "" of one that is the whole."""
    names = {id(tensor): name for name, tensor in _named(output, "")}
    leaves = pytree.tree_leaves(output)
    return {place: names.get(id(leaf), str(place)) for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}


def _named(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        yield from _each(value, path)
    elif isinstance(value, (tuple, list)):
        fields = getattr(value, "_fields", range(len(value)))
        yield from _each(dict(zip(fields, value, strict=True)), path)
    elif hasattr(value, "__dict__"):
        yield from _each(vars(value), path)


def _each(items: Mapping[Any, Any], path: str) -> Iterator[tuple[str, Tensor]]:
    for key, item in items.items():
        yield from _named(item, f"{path}.{key}" if path else str(key))


def outputs_sentence(names: Sequence[str]) -> str:
    """What to say of a model of which these outputs matter."""
    return f"These outputs keep their width: {', '.join(names)}. The others may become narrower."


def read_by(outputs: Outputs, output: Any) -> frozenset[int]:
    """The leaves of an output, by their places, that matter: those that are read, and those that are given back.

    Raises:
        InputError: if the output has no such parts, or the function fails on it or reads nothing of it.
    """
    if isinstance(output, Tensor):
        raise InputError("The model returns a single tensor, so there are no parts to choose from: leave outputs out.")
    with _Watching(output) as watching:
        try:
            watching.note((outputs if callable(outputs) else reader(outputs))(output))
        except InputError:
            raise
        except Exception as error:  # the user's function may raise anything
            raise InputError(
                f"The function outputs= fails on the model's output, a {type(output).__name__}: {first_line(error)}. "
                "It receives the output, with tensors that hold no values, and must return the part that you use."
            ) from error
    if not watching.places:
        raise InputError("outputs= selects no tensor of the model's output: select the parts that you use.")
    return frozenset(watching.places)


class _Watching(TorchFunctionMode):
    """Notes which leaves of an output are read within the block."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        leaves = enumerate(pytree.tree_leaves(output))
        self.place_of = {id(leaf): place for place, leaf in leaves if isinstance(leaf, Tensor)}
        self.places: set[int] = set()

    def note(self, value: Any) -> None:
        """These leaves are read."""
        self.places |= {self.place_of[id(leaf)] for leaf in pytree.tree_leaves(value) if id(leaf) in self.place_of}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what any function of torch is given, and call it."""
        self.note((args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def without_values(leaves: Sequence[Any], layout: pytree.TreeSpec) -> Any:
    """An output of this layout: a tensor without values for each tensor, everything else as it is."""
    return pytree.tree_unflatten(
        [
            torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
            if isinstance(leaf, Tensor)
            else leaf
            for leaf in leaves
        ],
        layout,
    )
