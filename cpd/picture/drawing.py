"""A picture of the coupling groups: the model's layers from top to bottom, each in the colour of its group.

    the traced operations -> layers and the ops that join them (`cpd.picture.graph`)
        -> rows and columns (`cpd.picture.layout`) -> shapes, lines and texts (`cpd.picture.scene`) -> SVG or HTML

The file is self-contained.
"""

from __future__ import annotations

import os
import re
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jinja2

from cpd.coupling.comb import COMB, Comb
from cpd.coupling.cost import split_reason
from cpd.coupling.groups import Group
from cpd.errors import ArtifactError, InputError
from cpd.options import PATH, checked
from cpd.picture.graph import contract
from cpd.picture.scene import GREY, arrange, colours, counted, details, references, sentence
from cpd.plan import PLAN, Plan

SUFFIXES = (".svg", ".html")
MARK = "cpd: a picture of coupling groups"
"""Every picture names itself so, which is how a later one knows that it may take its place."""

LEGEND_WIDTH, LEGEND_CHARACTERS = 440.0, 64
#: Layers and operations from which on a page begins with its blocks folded.
MANY = 120


@checked(path=PATH)
def check_path(path: str | os.PathLike[str]) -> Path:
    """Make sure that a picture can be written to `path`, before any work is done.

    Raises:
        InputError: if it ends in neither `.svg` nor `.html`, is a folder, lies in a folder that is not there or cannot
            be written to, or is a file that is not an earlier picture.
    """
    target = Path(path)
    if target.suffix.lower() not in SUFFIXES:
        raise InputError(f"A picture is an .svg or .html file; got {target}.")
    if target.is_dir():
        raise InputError(f"{target} is a folder; name a file for the picture.")
    if not target.parent.is_dir():
        raise InputError(f"The folder {target.parent} of the picture {target.name} does not exist; create it first.")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
        head = target.read_bytes()[:400] if target.exists() else b""
    except OSError as error:
        raise InputError(f"The picture {target} cannot be written: {error.strerror or error}.") from error
    if head and MARK.encode() not in head:
        raise InputError(f"{target} exists and is not a picture that cpd drew; remove it or give another name.")
    return target


@checked(comb=COMB, path=PATH, plan=PLAN)
def draw(comb: Comb, path: str | os.PathLike[str], *, plan: Plan | None = None) -> Path:
    """Draw the grouped graph of a model to a self-contained `.svg` or `.html` file.

    Args:
        comb: what `cpd.comb` found.
        path: the file; an earlier picture there is replaced.
        plan: the branches that it removes are drawn pale.

    Returns:
        The path written.

    Raises:
        InputError: if `check_path` refuses the path.
        ArtifactError: if the file cannot be written.
    """
    target = check_path(path)
    comb = comb if plan is None else comb.without(plan.removed)
    text = render(comb, html=target.suffix.lower() == ".html")
    try:
        target.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise ArtifactError(f"The picture {target} cannot be written: {error.strerror or error}.") from error
    return target


def render(comb: Comb, *, html: bool) -> str:
    """The picture as the text of an HTML page or of an SVG file."""
    graph = contract(comb)
    shares = comb.open_share
    palette = colours(comb.groups)
    scene = arrange(graph, comb, palette)
    entries = _legend(comb.groups, palette)
    name = type(comb.model).__name__
    summary = (
        f"{len(comb.open)} of {len(comb.groups)} groups are open: they hold {shares['parameters']:.1%} of the "
        f"parameters and {shares['macs']:.1%} of the MACs."
    )
    lines = _placed(entries)
    values = {
        "mark": MARK,
        "title": name,
        "summary": summary,
        "scene": scene,
        "entries": entries,
        "lines": lines,
        "html": html,
        "folded": len(graph) > MANY,
        "width": scene.width if html else scene.width + LEGEND_WIDTH,
        "height": scene.height if html else max(scene.height, lines[-1].y + 24 if lines else 0, 120),
        "legend_x": scene.width + 16,
    }
    return _environment().get_template("picture.html.j2" if html else "picture.svg.j2").render(**values)


@dataclass(frozen=True)
class Entry:
    """A line of the legend: one open group, or the frozen ones of one reason."""

    name: str
    detail: str
    colour: str
    groups: str
    dashed: bool
    title: str


def _legend(groups: Sequence[Group], palette: Sequence[str]) -> list[Entry]:
    entries = []
    frozen: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        if group.frozen is not None:
            frozen.setdefault(re.sub(r"\d+", "N", split_reason(group.frozen)[0]), []).append(index)
            continue
        of = references([index])
        entries.append(Entry(group.name, details(group), palette[index], of, not group.exact, _members(group)))
    for indices in frozen.values():
        first = groups[indices[0]]
        if len(indices) == 1:
            name, detail = first.name, f"{counted(first.size, 'channel')}, frozen: {first.frozen}"
        else:
            name = f"{first.name} and {len(indices) - 1} more"
            detail = f"frozen: {first.frozen} and {len(indices) - 1} more places"
        title = "\n".join(sentence(groups[index]) for index in indices)
        entries.append(Entry(name, detail, GREY, references(indices), False, title))
    return entries


def _members(group: Group) -> str:
    shown = [str(member) for member in group.members[:20]]
    more = len(group.members) - len(shown)
    return "\n".join([f"{group.name}:", *shown, *([f"and {more} more"] if more else [])])


@dataclass(frozen=True)
class Placed:
    """A legend entry of an SVG: its lines of text and where it stands."""

    entry: Entry
    y: float
    lines: tuple[str, ...]


def _placed(entries: Sequence[Entry]) -> list[Placed]:
    placed = []
    y = 128.0
    for entry in entries:
        lines = tuple(textwrap.wrap(entry.detail, LEGEND_CHARACTERS))
        placed.append(Placed(entry, y, lines))
        y += 17 + 15 * len(lines) + 7
    return placed


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_printable,
    )
    return environment


def _printable(value: object) -> object:
    """Text without the control characters that XML forbids."""
    return (
        re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]", "\ufffd", value)
        if type(value) is str
        else value
    )
