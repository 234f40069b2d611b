"""The coupling groups of well-known models, as they were when read against the models' source.

`CPD_GOLDEN=write pytest tests/coupling/test_golden.py` writes the files anew.
"""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path

import pytest

from cpd.coupling.comb import Comb
from cpd.coupling.groups import Group
from helpers.zoo import MODELS, comb, dense, images

FOLDER = Path(__file__).parent / "golden"
NAMES = ["resnet18", "mobilenetv2_100", "densenet121", "vit_tiny_patch16_224", "convnext_atto", "swin_t"]


def members(group: Group) -> list[str]:
    """Each member as "tensor dim", those of one module together: "bn1.{weight,bias} 0"."""
    places: dict[tuple[str, int], list[str]] = {}
    for member in group.members:
        path, _, name = member.tensor.rpartition(".")
        places.setdefault((path, member.dim), []).append(name)
    return [
        f"{path}.{names[0] if len(names) == 1 else '{' + ','.join(names) + '}'} {dim}".removeprefix(".")
        for (path, dim), names in places.items()
    ]


def described(combed: Comb) -> str:
    """One line of JSON a group."""
    lines = [
        json.dumps(
            {
                "name": group.name,
                "size": group.size,
                "frozen": group.frozen is not None,
                "exact": group.exact,
                "ties": len(group.ties),
                "members": members(group),
            }
        )
        for group in combed.groups
    ]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def difference(expected: str, found: str) -> str:
    """What is not alike, group by group, long lists of members by what came and went."""
    old, new = ({group["name"]: group for group in json.loads(text)} for text in (expected, found))
    lines = [f"- {name}: gone" for name in old if name not in new]
    lines += [f"+ {name}: new, {new[name]}" for name in new if name not in old]
    for name in old:
        for key, value in old[name].items() if name in new else ():
            other = new[name][key]
            if key == "members":
                changes = [line for line in difflib.ndiff(value, other) if line[0] in "+-"]
                lines += [f"  {name}: member {line}" for line in changes]
            elif value != other:
                lines.append(f"  {name}: {key} is {other}, was {value}")
    if not lines:
        lines = [f"  the order of the groups: {list(new)}, was {list(old)}"]
    return "\n".join(lines)


@pytest.mark.parametrize("name", NAMES)
def test_groups_are_those_that_were_checked(name: str) -> None:
    make, side = MODELS[name]
    found = described(comb(dense(make()), images(side)))
    path = FOLDER / f"{name}.json"
    if os.environ.get("CPD_GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(found)
    expected = path.read_text()
    if found != expected:
        pytest.fail(f"the groups of {name} changed:\n{difference(expected, found)}", pytrace=False)


def test_a_difference_is_told_group_by_group() -> None:
    old = '[{"name": "a", "size": 4, "members": ["w 0", "v 1"]}, {"name": "b", "size": 2, "members": []}]'
    new = '[{"name": "a", "size": 3, "members": ["w 0", "u 1"]}, {"name": "c", "size": 2, "members": []}]'
    told = difference(old, new)
    for part in ("- b: gone", "+ c: new", "a: size is 3, was 4", "a: member - v 1", "a: member + u 1"):
        assert part in told
