"""Options: each is declared once, as a field of a dataclass, with its default, its help and its check.

`cpd.PruneConfig` and `cpd.DistillConfig` are made of such fields. The signatures and docstrings of functions, the
options of commands and the keys of recipes follow from them.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeVar

from cpd.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Check:
    """What an option may be.

    Attributes:
        wanted: what it may be, in words that follow "must be".
        accepts: whether a value is that.
        kind: the type of one value on a command line.
        read: where an option is given several times on a command line: makes its value of all those texts.
    """

    wanted: str
    accepts: Callable[[Any], bool]
    kind: type = str
    read: Callable[[Sequence[str]], Any] | None = None


@dataclass(frozen=True)
class Option:
    """One option of a config.

    Attributes:
        name: in Python and in a recipe; with dashes on a command line.
        default: where it is not given.
        annotation: its type in Python.
        help: what it does, in a sentence or two.
        check: what it may be.
        optional: whether it may be None too.
    """

    name: str
    default: Any
    annotation: str
    help: str
    check: Check
    optional: bool


def option(default: Any, check: Check, help: str, *, optional: bool = False) -> Any:
    """A field of a config; it may be None if that is the default, or if it is optional."""
    found = {"check": check, "help": help, "optional": optional or default is None}
    return dataclasses.field(default=default, metadata=found)


def options_of(config: Any) -> tuple[Option, ...]:
    """The options of a config, in the order in which they are declared."""
    return tuple(
        Option(item.name, item.default, str(item.type), **item.metadata) for item in dataclasses.fields(config)
    )


def check_options(config: Any) -> None:
    """Raise `InputError` unless every option of a config is what it may be."""
    for item in options_of(config):
        value = getattr(config, item.name)
        if not (value is None and item.optional) and not item.check.accepts(value):
            raise InputError(f"{item.name} must be {item.check.wanted}{', or None' * item.optional}; got {value!r}.")


def changed(config: Any) -> dict[str, Any]:
    """The options of a config that differ from the defaults."""
    return {item.name: value for item in options_of(config) if (value := getattr(config, item.name)) != item.default}


def check_names(given: Collection[str], known: Collection[str], what: str) -> None:
    """Raise `InputError` if an option is given that there is not, and name the one that may be meant."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            meant = f" Is {near[0]} meant?" if near else ""
            raise InputError(f"{what} has no option {name}.{meant} It has: {', '.join(sorted(known))}.")


# ------------------------------------------------------------------------------------------ checks


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def number(wanted: str, accepts: Callable[[float], bool]) -> Check:
    """A finite number."""
    return Check(f"a number {wanted}", lambda value: _is_number(value) and accepts(value), float)


def integer(least: int, below: int | None = None) -> Check:
    """An integer of at least `least`, and below `below` if that is given."""
    wanted = f"an integer of at least {least}" + ("" if below is None else f" and below {below}")

    def accepts(value: object) -> bool:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole and value >= least and (below is None or value < below)  # type: ignore[operator]

    return Check(wanted, accepts, int)


def choice(*names: str) -> Check:
    """One of several names."""
    return Check(f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names)


def flag() -> Check:
    """True or False."""
    return Check("True or False", lambda value: isinstance(value, bool), bool)


# ------------------------------------------------------------------------------------------ signatures


def takes_options(config: type, leave_out: Collection[str] = (), *, others: bool = False) -> Callable[[T], T]:
    """Make the options of a config those of a function that takes `**options`, or of a class whose constructor does.

    They are shown in its signature and, below the line `options:` of its docstring, with their help. An option that
    the function names itself stays where it is.

    Args:
        config: the config.
        leave_out: options that the function does not take.
        others: whether it takes arguments beside them by `**options`.
    """

    def decorated(target: T) -> T:
        function: Any = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
        signature = inspect.signature(function)
        every = list(signature.parameters.values())
        own, rest = every[:-1], every[-1:] if others else []
        names = {item.name for item in own}
        shown = [item for item in options_of(config) if item.name not in leave_out]
        added = [
            inspect.Parameter(
                item.name, inspect.Parameter.KEYWORD_ONLY, default=item.default, annotation=item.annotation
            )
            for item in shown
            if item.name not in names
        ]
        function.__signature__ = signature.replace(parameters=[*own, *added, *rest])
        target.__doc__ = documented(target.__doc__ or "", shown, "options:")
        return target

    return decorated


def documented(text: str, shown: Sequence[Option], heading: str) -> str:
    """A docstring with the help of options below the line that starts with `heading`, one level deeper."""
    lines = text.split("\n")
    for index, line in enumerate(lines):
        if line.strip().startswith(heading):
            indent = " " * (len(line) - len(line.lstrip()) + 4)
            end = index + 1
            while end < len(lines) and lines[end].startswith(indent):  # the heading's own further lines
                end += 1
            texts = (
                textwrap.fill(
                    f"{item.name}: {item.help}", 120, initial_indent=indent, subsequent_indent=f"{indent}    "
                )
                for item in shown
            )
            return "\n".join([*lines[:end], *texts, *lines[end:]])
    return text


def with_help(config: type[T]) -> type[T]:
    """Add the help of every option to the docstring of a config, below `Options:`."""
    config.__doc__ = documented(config.__doc__ or "", options_of(config), "Options:")
    return config


def plain(value: Any) -> Any:
    """An option as it is written to a checkpoint or a report: a function by its name."""
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return dict(value) if isinstance(value, Mapping) else value
