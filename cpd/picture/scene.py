"""The scene of the picture: where every layer, edge and frame stands, in which colour, and what its texts say."""

from __future__ import annotations

import colorsys
import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
from torch import nn

from cpd.coupling.comb import Comb
from cpd.coupling.cost import split_reason
from cpd.coupling.groups import Group
from cpd.picture.graph import Item
from cpd.picture.layout import Box, Layout, Point, layout, rows_of

GREY, PLAIN = "#8a9399", "#6b757b"
FIRST = (
    "#1f77b4", "#e8710a", "#2a9d4a", "#c2378a", "#7a52c7", "#b58900", "#0b9aa5", "#d64545", "#5b8c1a", "#8c5a3c",
    "#4c63d2", "#a83fc0",
)  # fmt: skip

ROW = 26.0
MONO, SANS = 7.3, 6.3
"""Pixels that a character of a name, and of the other texts, takes at most (on average, for the latter)."""
LONGEST_NAME, LONGEST_KIND = 26, 18
#: Colours shown of a folded block.
CHIPS = 12


@dataclass(frozen=True)
class Shape:
    """A node as drawn."""

    box: Box
    role: str
    path: str
    name: str
    kind: str
    widths: str
    groups: str
    colour: str
    stripes: tuple[tuple[float, float, str], ...]
    dashed: bool
    gone: bool
    title: str


@dataclass(frozen=True)
class Line:
    """An edge as drawn: its path and its arrow head."""

    path: str
    head: str
    colour: str
    groups: str
    gone: bool


@dataclass(frozen=True)
class Frame:
    """The box around a block of the model, or around a run of blocks of one parent; a page can fold it.

    Attributes:
        level: 1 of a block, 2 of a run of blocks.
        y: its top.
        width: of the box.
        height: of the box.
        label: the module's path.
        layers: how many layers are inside.
        colours: of the open groups inside, the widest first.
    """

    level: int
    y: float
    width: float
    height: float
    label: str
    layers: int
    colours: tuple[str, ...]


@dataclass(frozen=True)
class Scene:
    """All that is drawn of the graph."""

    shapes: tuple[Shape, ...]
    lines: tuple[Line, ...]
    frames: tuple[Frame, ...]
    width: float
    height: float


def arrange(graph: nx.DiGraph, comb: Comb, palette: Sequence[str]) -> Scene:
    """Place all that is drawn of `graph`, in the colours of `palette` (one for each group, as `colours` gives)."""
    items: dict[int, Item] = {index: graph.nodes[index]["item"] for index in graph}
    rows = rows_of(graph)
    blocks = _blocks(items, rows, comb.model)
    inside = {index: prefix for prefix, members in blocks.items() for index in members}
    names = {index: _short(item, inside.get(index)) for index, item in items.items()}
    widths = {index: _width(item, names[index]) for index, item in items.items()}
    widest = max((widths[index] for index, item in items.items() if item.role == "layer"), default=120)
    widths = {index: widest if items[index].role == "layer" else width for index, width in widths.items()}
    bands = [(min(rows[i] for i in members), max(rows[i] for i in members)) for members in blocks.values()]
    laid = layout(graph, rows, widths, ROW, bands)
    gutter = max((_text(prefix, 24, MONO) + 14 for prefix in blocks), default=0)
    width = laid.width + gutter
    removed = comb.removal(comb.removed).gone
    gone = {index for index, item in items.items() if removed.issuperset(item.nodes) and item.nodes}
    shapes = tuple(_shape(items[i], names[i], laid.boxes[i], comb.groups, palette, gone=i in gone) for i in graph)

    def frame(level: int, label: str, members: Sequence[int], top: float, bottom: float) -> Frame:
        found = {number for index in members for number in items[index].groups if comb.groups[number].frozen is None}
        widest = sorted(found, key=lambda number: (-comb.groups[number].size, number))
        layers = sum(items[index].role == "layer" for index in members)
        chips = tuple(palette[number] for number in widest[:CHIPS])
        return Frame(level, _round(top), _round(width - 16), _round(bottom - top), _cut(label, 24), layers, chips)

    spans = dict(zip(blocks, laid.bands, strict=True))
    frames = [frame(1, prefix, members, *spans[prefix]) for prefix, members in blocks.items()]
    for parent, run in _runs(list(blocks)):
        members = [index for prefix in run for index in blocks[prefix]]
        frames.append(frame(2, parent, members, spans[run[0]][0], spans[run[-1]][1]))
    lines = tuple(_lines(items, laid, comb.groups, palette, gone))
    return Scene(shapes, lines, tuple(frames), _round(width), _round(laid.height))


def _runs(blocks: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Blocks that follow one another and have one parent: (its path, theirs); at least two, and not all there are."""
    runs = [(parent, list(run)) for parent, run in itertools.groupby(blocks, lambda path: path.rpartition(".")[0])]
    return [(parent, run) for parent, run in runs if parent and 1 < len(run) < len(blocks)]


def _blocks(items: Mapping[int, Item], rows: Mapping[int, int], model: nn.Module) -> dict[str, list[int]]:
    """Blocks of the model whose rows nothing else stands in: {path: its nodes}.

    A block is a module of its own class in a list or sequence (a residual block, say), else a top-level module;
    where the rows of several overlap, the next larger one is tried.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    choices = {index: _enclosing(item.path, item.role, modules) for index, item in items.items()}
    while True:
        blocks: dict[str, list[int]] = {}
        for index, paths in choices.items():
            if paths:
                blocks.setdefault(paths[0], []).append(index)
        spans = {
            path: (min(rows[i] for i in members), max(rows[i] for i in members)) for path, members in blocks.items()
        }
        mixed = {
            path
            for path, (low, high) in spans.items()
            if any(low <= rows[index] <= high and paths[:1] != [path] for index, paths in choices.items())
        }
        if not mixed:
            kept = {path: members for path, members in blocks.items() if len(members) > 1}
            return dict(sorted(kept.items(), key=lambda block: spans[block[0]]))
        deepest = max(path.count(".") for path in mixed)  # a smaller one may be all that stands in a larger one's way
        gone = {path for path in mixed if path.count(".") == deepest}
        larger = {paths[1] for paths in choices.values() if paths and paths[0] in gone and len(paths) > 1}
        for index, paths in choices.items():
            rest = paths[1:] if paths and paths[0] in gone else paths
            shared = next((place for place, path in enumerate(rest) if path in larger), 0)
            choices[index] = rest[shared:]


def _enclosing(path: str, role: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """The blocks around a layer, the innermost first."""
    lists = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    parts = path.split(".") if path and role != "end" else []
    found = []
    for count in range(len(parts) - (role == "layer"), 0, -1):
        prefix, parent = ".".join(parts[:count]), ".".join(parts[: count - 1])
        module = modules.get(prefix)
        if module is None or isinstance(module, lists):
            continue
        if count == 1 or isinstance(modules.get(parent), lists):
            found.append(prefix)
    return found


def _short(item: Item, block: str | None) -> str:
    """The name inside its block's box."""
    name = item.name.removeprefix(f"{block}.") if block is not None else item.name
    return _cut(name, LONGEST_NAME)


def _cut(text: str, most: int) -> str:
    """The end of a text that is too long: the end tells two paths apart."""
    return text if len(text) <= most else f"…{text[-most + 1 :]}"


def _text(text: str, most: int, pixels: float) -> float:
    return min(len(text), most) * pixels


def _width(item: Item, name: str) -> float:
    """Pixels that the texts of a node take, with room between them; even, so that its middle is exact."""
    kind, widths = _text(item.kind, LONGEST_KIND, SANS), _text(item.widths, 24, SANS)
    room = 22 + (12 if name and kind else 0) + (14 if widths else 0)
    return 2.0 * math.ceil((room + len(name) * MONO + kind + widths) / 2)


def _shape(item: Item, name: str, box: Box, groups: Sequence[Group], palette: Sequence[str], *, gone: bool) -> Shape:
    own = [groups[index] for index in item.groups]
    free = [index for index in item.groups if groups[index].frozen is None]
    stripe = (box.height - 6) / max(len(item.groups), 1)
    return Shape(
        box=Box(_round(box.x), _round(box.y), _round(box.width), box.height),
        role=item.role,
        path=item.name or item.path,
        name=name,
        kind=_cut(item.kind, LONGEST_KIND),
        widths=_cut(item.widths, 24),
        groups=references(item.groups),
        colour=_colour(item.groups, groups, palette),
        stripes=tuple(
            (_round(box.y + 3 + number * stripe), _round(stripe), palette[index])
            for number, index in enumerate(item.groups)
        ),
        dashed=any(not groups[index].exact for index in free),
        gone=gone,
        title="\n".join([_heading(item), *(["removed with its branch"] if gone else map(sentence, own))]),
    )


def _heading(item: Item) -> str:
    words = [item.name or item.path or "the model", item.kind]
    if item.role == "layer":
        words.append(f"{item.before} → {item.after}" if item.before else item.after)
    else:
        words.append(item.after)
    return " · ".join(word for word in words if word)


def sentence(group: Group) -> str:
    """All that the picture says of a group."""
    return f"group {group.name}: {details(group)}"


def details(group: Group) -> str:
    """How large a group is, whether it is frozen or exact, and what it is tied to."""
    state = f"frozen: {group.frozen}" if group.frozen is not None else _exactness(group)
    state = "; ".join([state, *_tied(group.ties)])
    return f"{counted(group.size, 'channel')}, {counted(len(group.members), 'member')}, {state}"


def _exactness(group: Group) -> str:
    return "exact" if group.exact else f"inexact: {group.inexact}"


def _tied(ties: Sequence[str]) -> list[str]:
    """Each reason of a tie once, with its number of places."""
    places: dict[str, dict[str, None]] = {}
    for tie in ties:
        why, place = split_reason(tie)
        places.setdefault(why, {})[place] = None
    return [
        f"tied: {why}"
        + (f" [{next(iter(at))}]" if len(at) == 1 and "" not in at else f" ({counted(len(at), 'place')})")
        for why, at in places.items()
    ]


def counted(number: int, word: str) -> str:
    """A number of things, such as "1 channel" or "64 channels"."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def _colour(own: Sequence[int], groups: Sequence[Group], palette: Sequence[str]) -> str:
    """That of the widest open group; grey where all are frozen, plain where there is none."""
    free = [index for index in own if groups[index].frozen is None]
    if free:
        return palette[max(free, key=lambda index: groups[index].size)]
    return GREY if own else PLAIN


def _lines(
    items: Mapping[int, Item], laid: Layout, groups: Sequence[Group], palette: Sequence[str], gone: Collection[int]
) -> Iterable[Line]:
    for (start, end), points in sorted(laid.routes.items()):
        own = items[start].groups
        (x, y), (before, _) = points[-1], points[-2]
        head = f"M{_round(x)} {_round(y)}" + ("l-3.5 -6h7z" if _round(before) == _round(x) else "l-6 -3.5v7z")
        pale = start in gone or (end in gone and items[end].role == "layer")
        yield Line(_rounded(points), head, _colour(own, groups, palette), references(own), pale)


def _rounded(points: Sequence[Point]) -> str:
    """A path through the corners, each rounded."""
    path = f"M{_round(points[0][0])} {_round(points[0][1])}"
    for (ax, ay), (bx, by), (cx, cy) in zip(points, points[1:], points[2:], strict=False):
        first, second = abs(bx - ax) + abs(by - ay), abs(cx - bx) + abs(cy - by)
        radius = min(8.0, first / 2, second / 2)
        if not radius:
            continue
        ux, uy, vx, vy = (bx - ax) / first, (by - ay) / first, (cx - bx) / second, (cy - by) / second
        path += f"L{_round(bx - ux * radius)} {_round(by - uy * radius)}"
        path += f"Q{_round(bx)} {_round(by)} {_round(bx + vx * radius)} {_round(by + vy * radius)}"
    return path + f"L{_round(points[-1][0])} {_round(points[-1][1])}"


def _round(value: float) -> float:
    return round(value, 1)


def references(groups: Iterable[int]) -> str:
    """The numbers of the groups, as the file names them."""
    return " ".join(f"g{index}" for index in groups)


def colours(groups: Sequence[Group]) -> list[str]:
    """A colour for each group: grey if it is frozen, else its own."""
    count = 0
    palette = []
    for group in groups:
        palette.append(GREY if group.frozen is not None else _own_colour(count))
        count += group.frozen is None
    return palette


def _own_colour(number: int) -> str:
    """The first few are chosen by hand; then hues a golden angle apart, in turn light, dark and dull."""
    if number < len(FIRST):
        return FIRST[number]
    hue = (number * 0.381966 + 0.2) % 1
    light, strong = ((0.46, 0.75), (0.6, 0.6), (0.4, 0.45))[number % 3]
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, light, strong))
