"""The options of configs as options of commands: the same names, defaults and help."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any

import typer

from cpd.options import Option, options_of

Command = Callable[..., Any]
NONE = "none"


def takes(config: type, panel: str, leave_out: Collection[str] = (), **unset: str) -> Callable[[Command], Command]:
    """Make the options of a config those of a command that takes `**options`.

    Args:
        config: the config.
        panel: the heading of these options in the help.
        leave_out: options that the command does not take.
        unset: for options that the command decides on where they are not given: what it then takes, for the help.
    """

    def decorated(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        kind = inspect.Parameter.KEYWORD_ONLY
        *own, rest = signature.parameters.values()
        first, *others = (item.replace(kind=kind) for item in own)
        added = [_parameter(item, panel, unset) for item in options_of(config) if item.name not in leave_out]
        command.__signature__ = signature.replace(parameters=[first, *added, *others, rest])  # type: ignore[attr-defined]
        return command

    return decorated


def _parameter(item: Option, panel: str, unset: Mapping[str, str]) -> inspect.Parameter:
    default = None if item.name in unset else item.default
    show = unset.get(item.name, True)
    shown: dict[str, Any] = {"help": item.help, "rich_help_panel": panel, "show_default": show}
    kind: Any = item.check.kind
    if item.check.read is not None:
        kind, default = list[str], list(default or ())
    elif _can_be_unset(item):
        shown |= {"parser": _or_none(item), "metavar": f"{kind.__name__.upper()}|{NONE}"}
    kind = kind if default is not None else kind | None
    hint = Annotated[kind, typer.Option(**shown)]
    return inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _can_be_unset(item: Option) -> bool:
    """Whether None is another thing than leaving the option out."""
    return item.optional and item.default is not None


def _or_none(item: Option) -> Callable[[Any], Any]:
    """Reads a value, or the word that stands for None (which a recipe could not hold: there it means the default)."""

    def read(text: Any) -> Any:
        return NONE if str(text).lower() == NONE else item.check.kind(text)

    read.__name__ = item.check.kind.__name__
    return read


def values(config: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a command was given of a config's options, as Python takes them; what was not given is left out."""
    found: dict[str, Any] = {}
    for item in options_of(config):
        value = given.get(item.name)
        if item.check.read is not None:
            value = item.check.read(value) if value else None
        if value is not None:
            found[item.name] = None if value == NONE and _can_be_unset(item) else value
    return found
