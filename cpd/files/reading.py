"""Reading: JSON from a file that anybody may have written, as what the code declares it to be.

`parsed` gives plain values, none of them deep, endless or not finite; `conform` compares them with a type (a dataclass,
a `TypedDict`, or what those are made of) and makes an object of it. Whatever they do not take is an `ArtifactError`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NotRequired, TypeVar

from cpd.errors import ArtifactError
from cpd.options import shown

T = TypeVar("T")

#: How deep JSON may be nested, and how many bits an integer may have.
DEPTH, BITS = 64, 64


def read_json(path: Path, *, finite: bool = True) -> Any:
    """What a JSON file holds; `finite` as for `parsed`.

    Raises:
        ArtifactError: if it is missing, truncated, or no JSON of ours.
    """
    try:
        return parsed(path.read_bytes(), str(path), finite=finite)
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{path} is missing: {path.parent} is not a folder that cpd compress or result.save wrote."
        ) from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}.") from error


def parsed(text: str | bytes, where: str, *, finite: bool = True) -> Any:
    """JSON as plain values.

    Args:
        text: the JSON; bytes are UTF-8.
        where: what it was read from, for messages.
        finite: whether NaN and infinity, which JSON has no word for, are read as None, as they are written.

    Raises:
        ArtifactError: if it is no JSON, names a key twice, is nested too deep, or holds an integer that is too large.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key stands there twice")
        return found

    def number(digits: str) -> float | None:
        value = float(digits)
        return value if math.isfinite(value) or not finite else None

    def integer(digits: str) -> int:
        if len(digits) > BITS or (value := int(digits)).bit_length() > BITS:
            raise ValueError(f"an integer has more than {BITS} bits")
        return value

    try:
        text = text if isinstance(text, str) else text.decode()
        found = json.loads(text, object_pairs_hook=unique, parse_constant=number, parse_float=number, parse_int=integer)
        if _deeper(found, DEPTH):
            raise ValueError(f"it is nested more than {DEPTH} deep")
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where} cannot be read: {error}. It is truncated or not written by cpd.") from error
    return found


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the path of a file before what is wrong with what it holds."""
    try:
        yield
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error


def digest_of(content: Mapping[str, Any]) -> str:
    """The checksum of a JSON object, but for the entry that holds it."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def signed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the checksum of itself."""
    return {**content, "sha256": digest_of(content)}


def check_signed(content: Any, path: Path) -> None:
    """Raise `ArtifactError` unless a JSON object is as it was signed; earlier versions wrote no checksum."""
    if isinstance(content, Mapping) and "sha256" in content and content["sha256"] != digest_of(content):
        raise ArtifactError(f"{path} is not as it was saved: it is damaged, or was changed.")


def _deeper(value: Any, limit: int) -> bool:
    """Whether lists and objects lie in one another more than `limit` deep."""
    level = [value]
    for _ in range(limit + 1):
        parts = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list)))
        level = [part for several in parts for part in several]
    return bool(level)


def conform(value: Any, kind: type[T], what: str) -> T:
    """Plain values as what a type declares: objects as dataclasses or typed dicts, arrays as tuples or lists.

    Numbers are not made of text, nor integers of truth values. Entries that a dataclass does not know are left out,
    those of a typed dict stay as they are.

    Args:
        value: as `parsed` gives it, or as `to_dict` does.
        kind: a dataclass, a `TypedDict`, or a type that those are made of.
        what: what it should be, for messages, as "a plan".

    Raises:
        ArtifactError: saying where it differs.
    """
    try:
        found: T = _conform(value, kind)
    except _Mismatch as error:
        path = "".join(f".{part}" if isinstance(part, str) else f"[{part}]" for part in reversed(error.path))
        place = f"at {path.lstrip('.')}, " if path else ""
        raise ArtifactError(
            f"This is not {what} that cpd wrote: {place}{error}. It is truncated, or another program wrote it."
        ) from error
    return found


class _Mismatch(Exception):
    """A value is of another kind than is declared; `path` leads to it, from the inside out."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.path: list[str | int] = []


def _within(key: str | int, value: Any, kind: Any) -> Any:
    try:
        return _conform(value, kind)
    except _Mismatch as error:
        error.path.append(key)
        raise


def _conform(value: Any, kind: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _first(value, arguments)
    if origin is typing.Literal:
        return value if type(value) is str and value in arguments else _differs(value, kind)
    if origin in (tuple, list) and isinstance(value, (tuple, list)):
        return origin(_within(index, item, arguments[0]) for index, item in enumerate(value))
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return _record(value, kind)
    if typing.is_typeddict(kind) and isinstance(value, Mapping):
        return {**value, **_entries(value, kind, _needed(kind))}
    if origin is not None and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {_conform(key, arguments[0]): _within(str(key), item, arguments[1]) for key, item in value.items()}
    return _plain(value, kind)


def _plain(value: Any, kind: Any) -> Any:
    if kind is float:
        fits = type(value) is float or (type(value) is int and value.bit_length() <= BITS)
    elif kind is int:
        fits = type(value) is int and value.bit_length() < BITS
    elif kind in (None, type(None)):
        fits = value is None
    else:
        fits = kind in (str, bool) and type(value) is kind
    return value if fits else _differs(value, kind)


def _first(value: Any, kinds: tuple[Any, ...]) -> Any:
    """`value` as the first of several types that it is of; where only one is no None, that one tells what differs."""
    others = [kind for kind in kinds if kind is not type(None)]
    if value is None and len(others) < len(kinds):
        return None
    if len(others) == 1:
        return _conform(value, others[0])
    for kind in others:
        try:
            return _conform(value, kind)
        except _Mismatch:
            continue
    return _differs(value, " or ".join(map(_name, kinds)))


def _record(value: Mapping[str, Any], kind: Any) -> Any:
    missing = dataclasses.MISSING
    needed = [item.name for item in dataclasses.fields(kind) if item.default is item.default_factory is missing]
    return kind(**_entries(value, kind, needed))


def _entries(value: Mapping[str, Any], kind: Any, needed: Collection[str]) -> dict[str, Any]:
    """The entries that a type declares."""
    if lacking := sorted({*needed} - {*value}):
        what = "it" if typing.is_typeddict(kind) else f"the {_name(kind)}"
        raise _Mismatch(f"{what} lacks {', '.join(lacking)}")
    return {key: _within(key, value[key], hint) for key, hint in _hints(kind).items() if key in value}


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


@cache
def _needed(kind: Any) -> frozenset[str]:
    """The keys that a typed dict must have (`__required_keys__` knows nothing of annotations that are text)."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return frozenset(
        key for key, hint in hints.items() if kind.__total__ and typing.get_origin(hint) is not NotRequired
    )


def _differs(value: Any, kind: Any) -> Any:
    text = shown(value) if isinstance(value, (bool, int, float, str)) else type(value).__name__
    raise _Mismatch(f"{_name(kind)} is wanted, there is {text}")


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
