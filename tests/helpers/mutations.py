"""JSON with something changed at any place, for tests of what reads it."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

Places = list[tuple[Any, ...]]


def nested(depth: int) -> Any:
    """A list in a list in a list."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def places(value: Any, path: tuple[Any, ...] = ()) -> Places:
    """The path to every value in JSON; of a long list, to the first and the last item alone."""
    inside: Any = ()
    if isinstance(value, dict):
        inside = value.items()
    elif isinstance(value, list) and value:
        inside = [(index, value[index]) for index in {0, len(value) - 1}]
    return [path, *(found for key, item in inside for found in places(item, (*path, key)))]


OTHERS = [
    None, True, False, 0, -1, 1, 7, 2**63, 10**30, -(10**30), 0.5, 1e308, float("nan"), float("inf"), "", "x",
    "__class__", "../x", [], [[]], {}, {"x": 1}, [None], ["x"], [-1], nested(100), nested(500),
]  # fmt: skip


@st.composite
def mutations(draw: Any, document: Any) -> Any:
    """The document, with a value replaced by one of another kind, or a key dropped, doubled or renamed."""
    changed = copy.deepcopy(document)
    *way, last = draw(st.sampled_from([path for path in places(document) if path]))
    holder = changed
    for key in way:
        holder = holder[key]
    match draw(st.sampled_from(["replace"] * 6 + ["drop", "rename"])):
        case "drop":
            del holder[last]
        case "rename" if isinstance(holder, dict):
            holder[f"{last}x"] = holder.pop(last)
        case _:
            holder[last] = draw(st.sampled_from(OTHERS))
    return changed
