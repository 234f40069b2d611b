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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

import jinja2

from cpd.coupling.comb import COMB, Comb
from cpd.coupling.cost import split_reason
from cpd.coupling.groups import Group
from cpd.errors import ArtifactError, InputError, some
from cpd.options import PATH, Check, checked
from cpd.picture.graph import contract, input_groups
from cpd.picture.scene import GREY, arrange, colours, details, references, sentence
from cpd.plan import PLAN, Plan

SUFFIXES = (".svg", ".html")
MARK = "cpd: a picture of coupling groups"
"""Every picture names itself so, which is how a later one knows that it may take its place."""

LEGEND_WIDTH, LEGEND_CHARACTERS, NAME_CHARACTERS = 440.0, 60, 54
"""Pixels of an SVG's legend, and the characters that a line of text, and one of a name, may have in it."""
HEAD, LINE = 50.0, 15.0
"""Where the first line of text of that legend stands, and how far one is from the next."""
SAID = (
    "One colour: channels that go together. Grey: frozen. Dashed: inexact. A striped edge: the width is a product or a "
    "sum of several groups.",
    "A layer with channels of two groups counts for both.",
)
"""What every legend says."""
#: What the channels of the input are called, and the reasons of groups that cannot but be frozen.
INPUT, OUTPUT = "the model's input channels", "the model's output"
_MILLISECONDS = Check(
    "a mapping of names of groups to milliseconds, as cpd.profile_model(…).groups",
    lambda value: (
        isinstance(value, Mapping)
        and all(isinstance(name, str) and isinstance(ms, (int, float)) for name, ms in value.items())
    ),
)
#: Layers and operations from which on a page begins with its blocks folded.
MANY = 120
#: Members of a group in its title.
MEMBERS = 20


@checked(path=PATH)
def check_path(path: str | os.PathLike[str]) -> Path:
    """Make sure that a picture can be written to `path`, before any work is done.

    Raises:
        InputError: if it ends in neither `.svg` nor `.html`, is a folder, lies in a folder that is not there or cannot
            be written to, or is a file that is not an earlier picture.
    """
    target = Path(path)
    if target.suffix.lower() not in SUFFIXES:
        raise InputError(f"A picture must be an .svg or .html file; got {target}.")
    if target.is_dir():
        raise InputError(f"{target} is a folder: pass a file for the picture.")
    if not target.parent.is_dir():
        raise InputError(f"The folder {target.parent} of the picture {target.name} does not exist: create it first.")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
        head = target.read_bytes()[:400] if target.exists() else b""
    except OSError as error:
        raise InputError(f"The picture {target} cannot be written: {error.strerror or error}.") from error
    if head and MARK.encode() not in head:
        raise InputError(f"{target} exists and is not a picture that cpd drew: remove it, or choose another name.")
    return target


@checked(comb=COMB, path=PATH, plan=PLAN, milliseconds=_MILLISECONDS)
def draw(
    comb: Comb,
    path: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    milliseconds: Mapping[str, float] | None = None,
) -> Path:
    """Draw the grouped graph of a model to a self-contained `.svg` or `.html` file.

    Args:
        comb: what `cpd.comb` found.
        path: the file; an earlier picture there is replaced.
        plan: the branches that it removes are drawn pale.
        milliseconds: {group name: ms of the layers with its channels}, as `cpd.profile_model` finds them; None tells
            the share of the MACs alone.

    Returns:
        The path written.

    Raises:
        InputError: if `check_path` refuses the path.
        ArtifactError: if the file cannot be written.
    """
    target = check_path(path)
    comb = comb if plan is None else comb.without(plan.removed)
    text = render(comb, html=target.suffix.lower() == ".html", milliseconds=milliseconds or {})
    try:
        target.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise ArtifactError(f"The picture {target} cannot be written: {error.strerror or error}.") from error
    return target


def render(comb: Comb, *, html: bool, milliseconds: Mapping[str, float] = MappingProxyType({})) -> str:
    """The picture as the text of an HTML page or of an SVG file."""
    graph = contract(comb)
    shares = comb.open_share
    palette = colours(comb.groups)
    scene = arrange(graph, comb, palette)
    macs = comb.cost.macs_share()
    held = [Held(macs.get(group.axis, 0.0), milliseconds.get(group.name)) for group in comb.groups]
    entries = _legend(comb.groups, palette, held, input_groups(graph, comb))
    name = type(comb.model).__name__
    summary = (
        f"{len(comb.open)} of {len(comb.groups)} groups can be pruned: they hold {shares['parameters']:.1%} of the "
        f"parameters and {shares['macs']:.1%} of the MACs."
    )
    heading = _wrapped([summary, *SAID], LEGEND_CHARACTERS)
    lines = _placed(entries, HEAD + LINE * len(heading) + 16)
    values = {
        "mark": MARK,
        "title": name,
        "summary": summary,
        "heading": heading,
        "said": SAID,
        "scene": scene,
        "entries": [entry for entry in entries if not entry.trivial],
        "trivial": [entry for entry in entries if entry.trivial],
        "lines": lines,
        "html": html,
        "folded": len(graph) > MANY,
        "width": scene.width if html else scene.width + LEGEND_WIDTH,
        "height": scene.height if html else max(scene.height, lines[-1].bottom if lines else 0, 120),
        "legend_x": scene.width + 16,
        "head": HEAD,
        "line": LINE,
    }
    return _environment().get_template("picture.html.j2" if html else "picture.svg.j2").render(**values)


@dataclass(frozen=True)
class Held:
    """What lies in the layers with the channels of a group: a share of the MACs, and ms where they are known."""

    macs: float
    ms: float | None

    def __str__(self) -> str:
        """In a few words."""
        share = "less than 0.1%" if self.macs < 0.001 else f"{self.macs:.1%}"
        found = f"in {share} of the MACs" if self.macs else ""
        return found if self.ms is None else ", ".join([*([found] if found else []), f"{self.ms:.3g} ms"])


@dataclass(frozen=True)
class Entry:
    """A line of the legend: one open group, or the frozen ones of one reason.

    Attributes:
        name: of the group.
        detail: how large it is, whether it is frozen or exact.
        held: what lies in its layers, in words.
        share: of the MACs, in per cent of them.
        colour: of the group.
        groups: as the file names them.
        dashed: whether it is drawn so.
        title: what is shown of it beside the pointer.
        trivial: whether it cannot but be frozen: what comes into the model, or what it gives.
    """

    name: str
    detail: str
    held: str
    share: float
    colour: str
    groups: str
    dashed: bool
    title: str
    trivial: bool = False


def _legend(
    groups: Sequence[Group], palette: Sequence[str], held: Sequence[Held], inputs: Collection[int]
) -> list[Entry]:
    entries = []
    frozen: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        if group.frozen is not None:
            reason = INPUT if index in inputs else re.sub(r"\d+", "N", split_reason(group.frozen)[0])
            frozen.setdefault(reason, []).append(index)
            continue
        of = references([index])
        entries.append(
            Entry(
                group.name, details(group), str(held[index]), round(100 * held[index].macs, 1), palette[index], of,
                not group.exact, _members(group),
            )
        )  # fmt: skip
    for reason, indices in frozen.items():
        first, more = groups[indices[0]], len(indices) - 1
        name = f"{first.name} and {more} more" if more else first.name
        detail = f"frozen: {first.frozen} and {more} more places" if more else details(first)
        if reason == INPUT:
            name, detail = INPUT, f"{', '.join(groups[index].name for index in indices)}: {detail}"
        title = "\n".join(sentence(groups[index]) for index in indices)
        trivial = reason in (INPUT, OUTPUT)
        entries.append(Entry(name, detail, "", 0.0, GREY, references(indices), False, title, trivial))
    return entries


def _members(group: Group) -> str:
    members = some(group.members, MEMBERS, separator="\n")
    return f"{group.name}:\n{members}"


@dataclass(frozen=True)
class Placed:
    """A legend entry of an SVG: its lines of text, where it stands and where it ends."""

    entry: Entry
    y: float
    names: tuple[str, ...]
    lines: tuple[str, ...]

    @property
    def bottom(self) -> float:
        """Where the next may stand."""
        return self.y + 17 * len(self.names) + LINE * len(self.lines) + 7


def _placed(entries: Sequence[Entry], y: float) -> list[Placed]:
    placed = []
    for entry in entries:
        names = _wrapped([entry.name], NAME_CHARACTERS)
        texts = _wrapped([entry.detail, *([entry.held] if entry.held else [])], LEGEND_CHARACTERS)
        placed.append(Placed(entry, y, tuple(names), tuple(texts)))
        y = placed[-1].bottom
    return placed


def _wrapped(texts: Sequence[str], most: int) -> list[str]:
    """Lines of so many characters at most."""
    return [line for text in texts for line in textwrap.wrap(text, most) or [""]]


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
