"""Options and arguments: what each may be is declared once, and looked at before anything is done.

`cpd.PruneConfig` and `cpd.DistillConfig` are made of options: fields of a dataclass, each with its default, its help
and its check. The signatures and docstrings of functions, the options of commands and the keys of recipes follow from
them. What a public function takes beside them is looked at by `checked`, with checks of the same kind.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import os
import reprlib
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Integral, Number, Real
from pathlib import Path
from typing import Any, TypeVar, cast

from cpd.errors import InputError

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


#: No count is larger, and no other integer: what would never end, or fits no memory, is refused at once.
LARGEST, MOST = 10**9, 1e18


@dataclass(frozen=True)
class Check:
    """What an option or an argument may be.

    Attributes:
        wanted: what it may be, in words that follow "must be".
        accepts: whether a value is that.
        kind: the type of one value on a command line.
        read: where an option is given several times on a command line: makes its value of all those texts.
        names: the names that it may be, of which the nearest is named where another one is given.
        fault: of a value that is accepted: what is wrong with it all the same, in words that follow its name.
    """

    wanted: str
    accepts: Callable[[Any], bool]
    kind: type = str
    read: Callable[[Sequence[str]], Any] | None = None
    names: Callable[[], Collection[str]] = tuple
    fault: Callable[[Any], str | None] = lambda value: None

    def demand(self, name: str, value: Any, *, optional: bool = False) -> None:
        """Raise `InputError` unless a value is what it may be, or is None and may be that."""
        if value is None and optional:
            return
        if not self.accepts(value):
            near = difflib.get_close_matches(value, self.names(), 1) if isinstance(value, str) else []
            meant = f" Is {near[0]} meant?" if near else ""
            raise InputError(f"{name} must be {self.wanted}{', or None' * optional}; got {shown(value)}.{meant}")
        if (fault := self.fault(value)) is not None:
            raise InputError(f"{name} {fault}")


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
    """Raise `InputError` unless every option of a config is what it may be; its numbers become Python's own."""
    for item in options_of(config):
        value = getattr(config, item.name)
        item.check.demand(item.name, value, optional=item.optional)
        object.__setattr__(config, item.name, own_number(value))


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


def shown(value: Any) -> str:
    """A value as a message shows it: short, and whatever it is."""
    if isinstance(value, type):
        return f"the class {value.__qualname__}"
    if not isinstance(value, (bool, Number, str, bytes, list, tuple, dict, set, range, Path, type(None))):
        return type(value).__qualname__
    kind = f"{type(value).__qualname__} " if isinstance(value, (list, tuple, dict, set)) else ""
    try:
        return kind + textwrap.shorten(reprlib.repr(value), 120, placeholder=" …")
    except Exception:  # an integer of thousands of digits, or what a class of the user's makes of itself
        return type(value).__qualname__


def _is_number(value: object) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def own_number(value: Any) -> Any:
    """A number of another library, as NumPy's, as Python's own, which files and torch take; else what is given."""
    if type(value) in (bool, int, float) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def number(wanted: str, accepts: Callable[[float], bool]) -> Check:
    """A finite number that somebody may mean."""
    return Check(
        f"a number {wanted}".strip(), lambda value: _is_number(value) and accepts(value), float, fault=_too_large
    )


def _too_large(value: float) -> str | None:
    huge = isinstance(value, Integral) and abs(value) > MOST
    return f"is too large: at most {MOST:g} makes sense; got {shown(value)}." if huge else None


def integer(least: int, most: int = LARGEST) -> Check:
    """An integer from `least` to `most`."""

    def accepts(value: object) -> bool:
        return isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= most

    return Check(f"an integer from {least} to {most}", accepts, int)


def several(accepts: Callable[[Any], bool], wanted: str, count: int | None = None) -> Check:
    """Values in a list, a tuple or an array: so many, or at least one, each of which is accepted."""

    def accept(values: Any) -> bool:
        if not isinstance(values, Collection) or isinstance(values, (str, bytes, Mapping, Set)):
            return False
        try:
            items = [*values]
        except TypeError:  # an array that is a single number
            return False
        return bool(items) and count in (None, len(items)) and all(map(accepts, items))

    return Check(wanted, accept)


def choice(*names: str) -> Check:
    """One of several names."""
    return Check(
        f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names, names=lambda: names
    )


def flag() -> Check:
    """True or False."""
    return Check("True or False", lambda value: isinstance(value, bool), bool)


def instance(kind: type | tuple[type, ...], wanted: str) -> Check:
    """An object of a class; the class itself is none."""
    return Check(wanted, lambda value: isinstance(value, kind))


def function(form: str) -> Check:
    """Something that is called as `form` says. A class is called to make an object: that is another thing."""
    return Check(f"a function, called as {form}", is_function)


def is_function(value: object) -> bool:
    """Whether a value can be called, and is no class."""
    return callable(value) and not isinstance(value, type)


def text(wanted: str) -> Check:
    """A string that is not empty."""
    return Check(wanted, lambda value: isinstance(value, str) and bool(value))


def or_none(check: Check) -> Check:
    """The same, or None: for an argument that has no default."""
    return dataclasses.replace(
        check, wanted=f"{check.wanted}, or None", accepts=lambda value: value is None or check.accepts(value),
        fault=lambda value: None if value is None else check.fault(value),
    )  # fmt: skip


def _is_path(value: object) -> bool:
    found = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    return isinstance(found, str) and found != "" and "\0" not in found


#: What several functions take.
PATH = Check("the path of a file or folder, as 'out' or pathlib.Path('out')", _is_path)
SEED = integer(0, 2**31 - 1)
THREADS = integer(1, 1024)
SECONDS = number("of seconds, above 0 and at most 86400 (a day)", lambda value: 0 < value <= 86400)
LIMIT = integer(1)
FLAG = flag()
NUMBER = number("", lambda value: True)


def _are_parts(value: Any) -> bool:
    parts = value if isinstance(value, (list, tuple)) else [value]
    return bool(parts) and all(isinstance(item, (str, int)) and not isinstance(item, bool) for item in parts)


OUTPUTS = Check(
    "a name or a position, several of them, or a function of the output",
    lambda value: is_function(value) or _are_parts(value),
    read=tuple,
)


def read_shares(texts: Sequence[str], rules: Collection[str] = ()) -> Any:
    """`PATTERN=SHARE`, several times, as a mapping; or the name of one of the rules."""
    if len(texts) == 1 and texts[0] in rules:
        return texts[0]
    try:
        return {pattern: float(share) for pattern, _, share in (text.rpartition("=") for text in texts)}
    except ValueError:
        forms = ", ".join([*rules, "or PATTERN=SHARE" if rules else "PATTERN=SHARE"])
        raise InputError(f"ratios takes {forms}, as in 'layer4*=0.5'; got {', '.join(texts)}.") from None


def are_shares(value: Any) -> bool:
    """Whether a value is a mapping from patterns of names to shares of at least 0 and below 1."""
    share = number("", lambda item: 0 <= item < 1)
    return isinstance(value, Mapping) and all(isinstance(name, str) and share.accepts(value[name]) for name in value)


MAPPING = Check("a mapping", lambda value: isinstance(value, Mapping))
LOSS = function("loss(output, target)")
EVALUATE = function("evaluate(model)")


# ------------------------------------------------------------------------------------------ signatures


def checks_of(config: Any, *names: str) -> dict[str, Check]:
    """The checks of some options of a config, for a function that takes them too."""
    return {item.name: item.check for item in options_of(config) if item.name in names}


def checked(**checks: Check) -> Callable[[F], F]:
    """Look at the arguments of a function before it does anything; one whose default is None may be None.

    Numbers of other libraries, as NumPy's, are handed on as Python's own.

    Args:
        checks: what each argument may be, by its name.
    """

    def decorated(called: F) -> F:
        signature = inspect.signature(called)
        optional = {name for name in checks if signature.parameters[name].default is None}
        ordered = [(name, checks[name]) for name in signature.parameters if name in checks]

        @functools.wraps(called)
        def looked_at(*args: Any, **kwargs: Any) -> Any:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:
                return called(*args, **kwargs)  # which says it in Python's own words
            given = bound.arguments
            for name, check in ordered:
                if name in given:
                    check.demand(name, given[name], optional=name in optional)
                    given[name] = own_number(given[name])
            return called(*bound.args, **bound.kwargs)

        return cast(F, looked_at)

    return decorated


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
